"""The classics: any classifier learns from any other by one loss on logits or features, beside cross entropy.

    loss = ce_weight * CE(student, target) + weight * classic(student, teacher)

The losses are those of `fastkd.nn`. Where a loss on logits takes cross entropy along, both come out of one pass.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import fastkd.nn as criteria
from fastkd import ops
from fastkd.models.frozen import Frozen
from fastkd.models.taps import Taps, Where, places

from ._method import Method

# Name of a loss: its module in fastkd.nn.
ON_LOGITS = {
    "kd": "KDLoss", "dkd": "DKDLoss", "nkd": "NKDLoss", "jsd": "JSDLoss", "reverse_kl": "ReverseKLLoss",
    "tvd": "TVDLoss", "dist": "DISTLoss", "standardized_kd": "StandardizedKDLoss", "logit_cosine": "LogitCosineLoss",
}  # fmt: skip
ON_FEATURES = {"hint": "HintLoss", "at": "ATLoss", "sp": "SPLoss", "rkd": "RKDLoss", "pkt": "PKTLoss"}


class KD(Method):
    """A classifier that learns from another one.

    Args:
        student: takes images [B, C, H, W] and returns logits [B, classes].
        teacher: likewise, or a `Frozen`; None trains by cross entropy alone.
        loss: a name in `ON_LOGITS` or `ON_FEATURES`.
        taps: for losses on features ``{"student": ..., "teacher": ...}``, a place each or several (see
            `fastkd.models.taps.Taps`); the loss is summed over pairs. Default: the last block or stage of both.
        weight, ce_weight: of the loss and of cross entropy.
        label_smoothing: of the cross entropy.
        img_size, in_chans: of the images, only for ``"hint"``: its projectors are as wide as features turn out to be.
        options: what the loss takes, such as ``temperature=4``.
    """

    losses = ("loss",)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loss: str = "kd",
        *,
        taps: Mapping[str, Where | Sequence[Where]] | None = None,
        weight: float = 1.0,
        ce_weight: float = 1.0,
        label_smoothing: float = 0.0,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        **options: float,
    ) -> None:
        super().__init__(student)
        if loss not in ON_LOGITS and loss not in ON_FEATURES:
            known = (*ON_LOGITS, *ON_FEATURES)
            near = difflib.get_close_matches(loss, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"KD: loss: got {loss!r}, expected one of {', '.join(known)}{hint}")
        if weight == 0:
            teacher = None
        elif weight < 0 or ce_weight < 0:
            raise ValueError(f"KD: weight, ce_weight: got {weight} and {ce_weight}, expected at least 0")
        on_features = loss in ON_FEATURES and teacher is not None
        if taps is not None and not on_features:
            raise ValueError(f"KD: taps: got {dict(taps)}, expected none: {loss!r} compares logits")
        taps = (taps or dict(student=-1, teacher=-1)) if on_features else {}
        ours, theirs = places(taps, "student"), places(taps, "teacher")
        if len(ours) != len(theirs):
            raise ValueError(f"KD: taps: got {len(ours)} and {len(theirs)} places, expected pairs")
        if teacher is not None and not isinstance(teacher, Frozen):
            teacher = Frozen(teacher, theirs)
        self.teacher = teacher
        self._taps = (Taps(student, ours),)  # in a tuple: no part of the module
        self.loss, self.weight, self.ce_weight, self.label_smoothing = loss, weight, ce_weight, label_smoothing
        self.criteria = nn.ModuleList()
        if teacher is not None:
            self._add_criteria(options, on_features, img_size, in_chans)
        elif options:
            raise ValueError(f"KD: {', '.join(options)}: got values for a loss, expected none without a teacher")

    def _add_criteria(self, options: dict, on_features: bool, img_size, in_chans: int) -> None:
        kind = getattr(criteria, (ON_FEATURES if on_features else ON_LOGITS)[self.loss])
        known = inspect.signature(kind).parameters
        unknown = sorted(set(options) - set(known))
        if unknown:
            takes = [name for name in known if name not in ("weight", "inplace", "reduction", "projector")]
            raise ValueError(f"KD: options: got {', '.join(unknown)}, expected some of {', '.join(takes)}")
        self._takes_target = len(inspect.signature(kind.forward).parameters) > 3
        self._fused = "ce_weight" in known and self.label_smoothing == 0 or "label_smoothing" in known
        if on_features:
            self.criteria.extend(self._feature_criteria(kind, options, img_size, in_chans))
            return
        if self._fused:
            options = {"ce_weight": self.ce_weight / self.weight, **options}
            if self.label_smoothing:
                options["label_smoothing"] = self.label_smoothing
        self.criteria.append(kind(**options))

    @torch.no_grad()
    def _feature_criteria(self, kind: type[nn.Module], options: dict, img_size, in_chans: int) -> list[nn.Module]:
        """One per pair; those of hint with a projector wherever the channels of a pair differ."""
        if self.loss != "hint":
            return [kind(**options) for _ in self._taps[0].where]
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        device = next(self.student.parameters()).device
        was_training = self.student.training
        self.student.eval()  # so that no running statistics see this picture
        blank = torch.zeros(1, in_chans, *size, device=device)
        ours, theirs = self._taps[0](blank).features, self.teacher(blank).features
        self.student.train(was_training)
        return [kind(**options, projector=projector(a, b)) for a, b in zip(ours, theirs)]

    @property
    def taps(self) -> Taps:
        """To be entered around compiled code, see `Taps`."""
        return self._taps[0]

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            images: uint8 [B, H, W, C], or floating [B, C, H, W] normalised for the student.
            target: [B] int64 classes; or [B, classes] probabilities, for losses that take them.

        Returns:
            loss: float32 scalar; logits: [B, classes] of the student, detached.
        """
        images = self.prepare(images)
        logits, features = self._taps[0](images)
        result = {"logits": logits.detach()}
        if self.teacher is None:
            return {"loss": self.ce_weight * self._cross_entropy(logits, target), **result}
        taught, wanted = self.teacher(images, mean=self.mean, std=self.std)
        if logits.shape != taught.shape and not features:
            raise ValueError(
                f"KD: teacher: got logits {tuple(taught.shape)}, expected {tuple(logits.shape)} like the student's; "
                "fine-tune a teacher on these classes (--teacher none trains one), or compare features"
            )
        if features:
            loss = sum(criterion(a, b) for criterion, a, b in zip(self.criteria, features, wanted))
        else:
            loss = self.criteria[0](logits, taught, *((target,) if self._takes_target else ()))
        loss = self.weight * loss
        if self.ce_weight and (features or not self._fused):
            loss = loss + self.ce_weight * self._cross_entropy(logits, target)
        return {"loss": loss, **result}

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        return ops.logit_loss(logits, None, target, ce=1.0, label_smoothing=self.label_smoothing)


def projector(student: Tensor, teacher: Tensor) -> nn.Module | None:
    """From the student's width to the teacher's: 1 x 1 convolution of maps, linear of tokens; None for equal ones."""
    dim = 1 if student.ndim == 4 else -1
    ours, theirs = student.shape[dim], teacher.shape[1 if teacher.ndim == 4 else -1]
    if ours == theirs:
        return None
    return nn.Conv2d(ours, theirs, 1) if student.ndim == 4 else nn.Linear(ours, theirs)
