"""ScaleKD: strong vision transformers teach any backbone through features (Fan et al., NeurIPS 2024).

Two cross attention projectors (one per view, see `fastkd.ops.features.dual_view`) turn the student's stage 3 into
tokens of the teacher's stage 3. These run through the teacher's own frozen last stage, which is how its parameters
teach, and meet the teacher's final tokens T. What comes out is the query with which two more projectors read the
student's stage 4, whose tokens meet T again:

    p3 = CAP(x3, learned query)      g3 = tail(p3)      p4 = CAP(x4, query = g3)      per view, nothing detached
    loss = 0.5 CE + 0.5 KL(teacher || student) + plain(g3, T) + alt(g3', T) + plain(p4, T) + alt(p4', T)

At a teacher that keeps its grid (ViT, BEiT) p4 passes through the tail as well. All of this is for training alone: the
student is what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastkd import ops
from fastkd.models.cross_attention_projector import CrossAttentionProjector
from fastkd.models.frozen import Frozen
from fastkd.models.stages import Tail, as_map, as_tokens, features_of_a_blank, late_stages, tail_of
from fastkd.models.taps import Taps, Where, places

from ._method import Method

Size = tuple[int, tuple[int, int]]  # channels, (height, width)
FEATURE_LOSSES = ("plain_3", "alt_3", "plain_4", "alt_4")


class ScaleKDLosses(nn.Module):
    """The four feature losses of ScaleKD and the projectors behind them, apart from how features are made.

    Args:
        student: (channels, (height, width)) of the student's stages 3 and 4.
        entry, exit: the same of the teacher's tokens where its last stage begins and ends.
        tail: [B, N3, C3] -> [B, N4, C4], the teacher's frozen last stage.
        alpha: factors of the plain and the alternative losses; 0 for the second leaves the alternative view out.
        num_heads: of the projectors at stage 3 and 4; default 8 and 8, fewer where they do not divide the teacher's
            widths or leave less than 16 channels each.
        norm: ``"batch"`` or ``"layer"``, in the projectors.
        perception: False leaves stage 3 and the tail out: one learned query reads stage 4.
        softmax_scale: of the projectors.
    """

    def __init__(
        self,
        student: tuple[Size, Size],
        entry: Size,
        exit: Size,
        tail: Tail | Callable[..., Tensor],
        *,
        alpha: tuple[float, float] = (0.08, 0.06),
        num_heads: tuple[int, int] | None = None,
        norm: str = "batch",
        perception: bool = True,
        softmax_scale: float = 5.0,
    ) -> None:
        super().__init__()
        self.alpha, self.perception = tuple(alpha), perception
        self._tail = (tail,)  # in a tuple: frozen, and no part of the module
        self.tail_again = perception and entry == exit
        views = ("plain", "alt") if self.alpha[1] else ("plain",)
        num_heads = num_heads or tuple(_heads(size[0], 8) for size in (entry, exit))

        def projectors(source: Size, goal: Size, heads: int, learned: bool) -> nn.ModuleDict:
            options = dict(num_heads=heads, softmax_scale=softmax_scale, learned_query=learned, norm=norm)
            make = CrossAttentionProjector
            return nn.ModuleDict({v: make(source[0], goal[0], goal[1], source[1], **options) for v in views})

        self.stage3 = projectors(student[0], entry, num_heads[0], True) if perception else nn.ModuleDict()
        self.stage4 = projectors(student[1], exit, num_heads[1], not perception)

    def forward(
        self, stage3: Tensor, stage4: Tensor, teacher: Tensor, prefix: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            stage3, stage4: features of the student, [B, C, H, W].
            teacher: [B, N4, C4], the teacher's final tokens, without gradient.
            prefix: [B, P, C3], its prefix tokens at the entry of the tail, where the tail takes some.

        Returns:
            plain_3, alt_3, plain_4, alt_4: float32 scalars; 0 for what is left out.
        """
        target = ops.dual_view_target(teacher)
        queries: list[Tensor | None] = [None] * len(self.stage4)
        zero = torch.zeros((), device=teacher.device)
        first = zero, zero
        if self.perception:
            queries = self._through([cap(stage3) for cap in self.stage3.values()], prefix)
            first = self._compare(queries, target)
        read = [cap(stage4, query) for cap, query in zip(self.stage4.values(), queries)]
        second = self._compare(self._through(read, prefix) if self.tail_again else read, target)
        return dict(zip(FEATURE_LOSSES, (*first, *second)))

    def _through(self, views: list[Tensor], prefix: Tensor | None) -> list[Tensor]:
        """Both views through the tail as one batch."""
        tokens, tail = torch.cat(views), self._tail[0]
        if prefix is None:
            return list(tail(tokens).chunk(len(views)))
        return list(tail(tokens, torch.cat([prefix] * len(views))).chunk(len(views)))

    def _compare(self, views: list[Tensor], target: ops.DualViewTarget) -> tuple[Tensor, Tensor]:
        plain, alt = ops.dual_view_loss(tuple(views) if len(views) == 2 else views[0], target, alpha=self.alpha)
        return plain, alt if self.alpha[1] else torch.zeros_like(alt)


class ScaleKD(Method):
    """A classifier of any kind that learns from a Swin, ViT or BEiT.

    Args:
        student: timm model that takes images [B, C, H, W] and returns logits; or any other, with `taps`.
        teacher: timm's Swin, ViT, DeiT or BEiT with the same classes; or any other, with `taps` and `teacher_tail`.
        taps: ``{"student": (stage 3, stage 4), "teacher": (entry, exit)}`` where timm's structure does not tell, see
            `fastkd.models.taps.Taps`; entry and exit are those of `teacher_tail`.
        teacher_tail: [B, N, C] -> [B, N', C'], what the teacher makes of patch tokens at its entry. It is frozen with
            the teacher. Default: the last stage of a Swin, the last `tail_blocks` of a ViT, and the final norm.
        tail_blocks: default a quarter of the depth.
        ce_weight, kd_weight: of cross-entropy with the labels and with the teacher's softmax (as a divergence: without
            the teacher's entropy, which no gradient sees).
        alpha, num_heads, perception, softmax_scale: see `ScaleKDLosses`. Default heads as released, 16 and 24,
            or 8 and 8 for students with one grid for all blocks; fewer for narrow teachers.
        norm: of the projectors; default ``"layer"`` for ConvNeXt students, ``"batch"`` for others.
        img_size, in_chans: of the images; default 224 or what the teacher was made for, 3 channels.
    """

    losses = ("loss", "logit_loss", *FEATURE_LOSSES)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        taps: Mapping[str, Where | Sequence[Where]] | None = None,
        teacher_tail: Callable[[Tensor], Tensor] | None = None,
        tail_blocks: int | None = None,
        ce_weight: float = 0.5,
        kd_weight: float = 0.5,
        alpha: tuple[float, float] = (0.08, 0.06),
        num_heads: tuple[int, int] | None = None,
        norm: str | None = None,
        perception: bool = True,
        softmax_scale: float = 5.0,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
    ) -> None:
        super().__init__(student)
        taps = taps or {}
        ours = places(taps, "student") or late_stages(student)
        theirs = places(taps, "teacher")
        for side, found in (("student", ours), ("teacher", theirs)):
            if len(found) != 2 and (found or teacher_tail is not None):
                expected = "two, (stage 3, stage 4)" if side == "student" else "two, (entry, exit) of teacher_tail"
                raise ValueError(f"ScaleKD: taps: got {len(found)} places in the {side}, expected {expected}")
        if theirs and teacher_tail is None:
            raise ValueError("ScaleKD: taps: got places in the teacher, expected none without teacher_tail")
        tail = tail_of(teacher, tail_blocks) if teacher_tail is None else Tail(*theirs, teacher_tail)
        self.teacher = Frozen(teacher, (tail.entry, tail.exit))
        self.ce_weight, self.kd_weight = ce_weight, kd_weight
        self._taps, self._tail = (Taps(student, ours),), (tail,)
        shape = in_chans, *_image_size(img_size, teacher)
        x3, x4 = (as_map(x, student) for x in features_of_a_blank(student, ours, shape))
        entry, exit = (as_tokens(x, teacher) for x in features_of_a_blank(teacher, (tail.entry, tail.exit), shape))
        widths = entry[0].shape[-1], exit[0].shape[-1]
        heads = (8, 8) if x3.shape[2:] == x4.shape[2:] else (16, 24)
        self.features = ScaleKDLosses(
            tuple((x.shape[1], tuple(x.shape[2:])) for x in (x3, x4)),
            (widths[0], entry[2]),
            (widths[1], exit[2]),
            tail,
            alpha=alpha,
            num_heads=num_heads or tuple(map(_heads, widths, heads)),
            norm=norm or ("layer" if type(student).__name__ == "ConvNeXt" else "batch"),
            perception=perception,
            softmax_scale=softmax_scale,
        ).to(x3.device)

    @property
    def taps(self) -> Taps:
        """The student's; to be entered around compiled code, as those of `teacher`."""
        return self._taps[0]

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            images: uint8 [B, H, W, C], or floating [B, C, H, W] normalised for the student.
            target: [B] int64 classes, or [B, classes] probabilities.

        Returns:
            float32 scalars by the names in `losses`; logits: [B, classes] of the student, detached.
        """
        images, tail = self.prepare(images), self._tail[0]
        taught, (entry, exit) = self.teacher(images, mean=self.mean, std=self.std)
        with torch.no_grad():
            goal = tail.finish(as_tokens(exit, self.teacher.model)[0])
            prefix = as_tokens(entry, self.teacher.model)[1] if tail.prefix else None
        logits, stages = self._taps[0](images)
        if logits.shape != taught.shape:
            raise ValueError(
                f"ScaleKD: teacher: got logits {tuple(taught.shape)}, expected {tuple(logits.shape)} like the student's"
            )
        features = self.features(*(as_map(x, self.student) for x in stages), goal, prefix)
        logit_loss = ops.logit_loss(logits, taught, target, ce=self.ce_weight, kl=self.kd_weight)
        return {
            "loss": logit_loss + sum(features.values()), "logit_loss": logit_loss, **features,
            "logits": logits.detach(),
        }  # fmt: skip


def _heads(width: int, wanted: int) -> int:
    """The largest divisor of a width that is not above the wanted number of heads and leaves 16 channels to each."""
    return next(h for h in range(min(wanted, max(width // 16, 1)), 0, -1) if width % h == 0)


def _image_size(img_size: int | tuple[int, int] | None, teacher: nn.Module) -> tuple[int, int]:
    if img_size is None:
        img_size = getattr(getattr(teacher, "patch_embed", None), "img_size", None) or 224
    return (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
