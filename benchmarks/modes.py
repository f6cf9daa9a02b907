"""The ways to run a DMAE step that the benchmark compares, behind one interface."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from baselines import SIZES, Recipe, eager, released
from common import DTYPES, seconds
from stages import peak_bytes
from torch import Tensor, nn

import fastkd.data
from fastkd.methods import DMAE
from fastkd.models import MaskedAutoencoderViT, Teacher, VisionTransformer
from fastkd.ops import random_masking
from fastkd.train import CudaGraphs, TrainingStep, adamw
from fastkd.train.host import same_bits

LOSSES = ("pixel_loss", "align_loss")
EXACT_MODES = ("released", "eager", "compiled", "exact_eager", "exact")  # exact_eager: exact without a CUDA graph
INEXACT_MODES = ("decode_25", "cross")  # decode_fraction=0.25; decoder="cross"
SCALE = 2.0**12  # of float16 gradients
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclasses.dataclass
class Batch:
    """The same pictures and masks twice: uint8 NHWC with keys (fastkd), normalised float32 NCHW with noise (peers)."""

    raw: Tensor
    floats: Tensor
    keys: Tensor
    noise: Tensor

    @classmethod
    def random(cls, recipe: Recipe, size: int, seed: int = 0, pin: bool = False) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        raw = torch.randint(
            0, 256, (size, recipe.image, recipe.image, recipe.channels), dtype=torch.uint8, generator=generator
        )
        keys = torch.randint(2**62, (size,), generator=generator)
        # Ranks: noise of the same masks without ties, which argsort may break either way.
        noise = random_masking(size, recipe.patches, 0.0, keys=keys).ids_restore / recipe.patches
        batch = cls(raw, normalise(raw, torch.float32), keys, noise)
        return batch._map(Tensor.pin_memory) if pin else batch

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*(function(getattr(self, field.name)) for field in dataclasses.fields(self)))

    def to(self, device: str) -> Batch:
        return self._map(lambda t: t.to(device, non_blocking=True))

    def inputs(self, mode: Mode) -> tuple[Tensor, Tensor]:
        """Pictures and what fixes the masks, as this mode takes them."""
        return (self.raw, self.keys) if mode.raw else (self.floats, self.noise)


def normalise(raw: Tensor, dtype: torch.dtype) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64, device=raw.device) for values in IMAGENET)
    return ((raw.double() / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype).contiguous()


class FastStep:
    """A step as `fastkd distill` runs it, through fastkd's public names only.

    Args:
        graphs: makes what captures the step, such as `CudaGraphs`; None: eager steps.
    """

    def __init__(
        self,
        base: released.DMAE,
        dtype: torch.dtype,
        device: str,
        decode_fraction: float = 1.0,
        decoder: str = "self",
        graphs: Callable[[], object] | None = None,
    ) -> None:
        recipe = base.recipe
        sizes = [
            dict(zip(("embed_dim", "depth", "num_heads"), SIZES[name])) for name in (recipe.student, recipe.teacher)
        ]
        shape = dict(img_size=recipe.image, patch_size=recipe.patch, in_chans=recipe.channels)
        student = MaskedAutoencoderViT(
            **shape, **sizes[0], decoder_embed_dim=recipe.decoder_width, decoder_depth=recipe.decoder_blocks,
            decoder_num_heads=recipe.decoder_heads, decoder=decoder,
        )  # fmt: skip
        student.load_state_dict(base.student.state_dict())
        vit = VisionTransformer(**shape, **sizes[1])
        vit.load_state_dict({k: v for k, v in base.teacher.state_dict().items() if k in vit.state_dict()})
        teacher = Teacher(vit, recipe.teacher_tap, dtype=dtype if dtype.itemsize == 2 else None)
        self.model = DMAE(
            student, teacher, (recipe.student_tap,), (recipe.teacher_tap,), decode_fraction=decode_fraction
        ).to(device)
        self.model.aligned_feature_projection_heads[0].load_state_dict(base.projector.state_dict())
        self.dtype, self.device, self.graphs = dtype, device, graphs
        self.optimizer = adamw(self.model, lr=1.5e-4, capturable=graphs is not None)
        # Scaled as in the gate: no step is skipped for an overflow.
        self.scaler = torch.amp.GradScaler(device, init_scale=SCALE, enabled=dtype == torch.float16)
        self._ratio: float | None = None
        self._step: TrainingStep | None = None

    def forward(self, images: Tensor, keys: Tensor, mask_ratio: float) -> dict[str, Tensor]:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype.itemsize == 2):
            return self.model(images, mask_ratio, keys=keys)

    def __call__(self, images: Tensor, keys: Tensor, mask_ratio: float) -> Tensor:
        """Losses of a training step."""
        if mask_ratio != self._ratio:  # a graph has one ratio
            self._ratio, self._step = mask_ratio, None  # gives its memory back before the next one takes some
            amp = self.dtype if self.dtype.itemsize == 2 else None
            graphs = self.graphs() if self.graphs else None
            self._step = TrainingStep(
                self.model, self.optimizer, mask_ratio, amp=amp, scaler=self.scaler, graphs=graphs
            )
        with same_bits(torch.device(self.device)):  # as training runs it
            return self._step(iter([fastkd.data.Batch(images, keys, None, ())]))

    def captured(self, images: Tensor, keys: Tensor, mask_ratio: float, restore: Callable[[], None]) -> tuple:
        """(losses, gradients) of a replayed step, the very thing that is timed.

        A graph gives no gradients away, but AdamW remembers them: from zero, exp_avg = (1 - beta1) * gradient.
        """
        for _ in range(TrainingStep.WARM_UP + 1):
            self(images, keys, mask_ratio)
        if self._step.graphs is None:
            raise SystemExit("the exact step could not be captured as a CUDA graph; time --modes exact_eager instead")
        restore()
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        losses = self(images, keys, mask_ratio).tolist()
        share = 1 - self.optimizer.defaults["betas"][0]
        gradients = {name: self.optimizer.state[p]["exp_avg"] / share for name, p in self.trained().items()}
        return dict(zip(LOSSES, losses[1:])), gradients

    def trained(self) -> dict[str, nn.Parameter]:
        heads = self.model.aligned_feature_projection_heads[0]
        student = {f"student.{k}": v for k, v in self.model.student.named_parameters() if v.requires_grad}
        return student | {f"projector.{k}": v for k, v in heads.named_parameters()}

    @contextlib.contextmanager
    def marked(self, clock: Callable):
        """Lets `clock` hear where the stages of this model begin."""
        model, student = self.model, self.model.student
        decode = student.decode_features

        def marked_decode(tokens: Tensor, *args, **kwargs) -> Tensor:
            clock("decoder", tokens)
            features = decode(tokens, *args, **kwargs)
            clock("loss", features)  # holds the last linear layer here; the peers have it in the decoder
            return features

        hooks = [
            model.register_forward_pre_hook(lambda *_: clock("teacher")),
            student.register_forward_pre_hook(lambda *_: clock("student")),
        ]
        hooks.append(self.optimizer.register_step_pre_hook(lambda *_: clock("optimiser")))
        student.decode_features = marked_decode
        try:
            yield
        finally:
            del student.decode_features
            for hook in hooks:
                hook.remove()


def copied(build: Callable[[Recipe], released.DMAE], base: released.DMAE, device: str) -> released.DMAE:
    """A peer with the weights of `base`, made without initialising any of its own."""
    with torch.device("meta"):
        model = build(base.recipe)
    weights = base.state_dict()
    model.load_state_dict({k: weights[k].to(device, copy=True) for k in model.state_dict()}, assign=True)
    return model


class Mode:
    """One way to run the step in one dtype: weights, step and what is known of it.

    Attributes:
        name, dtype: as in the result rows.
        label: both together.
    """

    def __init__(
        self, name: str, dtype: str, base: released.DMAE, device: str, compile: str = "blocks",
        compile_mode: str = "default", written_out: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.dtype, self.label = name, dtype, f"{name} {dtype}"
        self.device, self.exact = device, name in EXACT_MODES
        self.raw = name in ("exact_eager", "exact", *INEXACT_MODES)
        graphs = partial(CudaGraphs, torch.device(device)) if device == "cuda" and name != "exact_eager" else None
        self.compile, self._is_compiled = compile if name == "compiled" else None, False
        kind = DTYPES[dtype]
        if name == "released":
            self.run = released.Step(copied(released.DMAE, base, device), kind)
        elif name in ("eager", "compiled"):
            model = copied(partial(eager.DMAE, written_out=written_out), base, device)
            self.run = eager.Step(model, kind, self.compile, compile_mode)
        else:
            self.run = FastStep(
                base, kind, device, 0.25 if name == "decode_25" else 1.0, "cross" if name == "cross" else "self", graphs
            )
        self._start = {k: v.detach().clone() for k, v in base.trained().items()}
        missing = set(self._start) ^ set(self.parameters())
        if missing:
            raise RuntimeError(f"{self.label}: parameters do not match those of released: {sorted(missing)[:5]}")

    @property
    def captured(self) -> bool:
        """Whether the step is replayed from a CUDA graph."""
        return isinstance(self.run, FastStep) and self.run.graphs is not None

    @property
    def is_whole(self) -> bool:
        """Whether nothing can be timed inside the step: one graph, compiled or captured."""
        return self.compile == "whole" or self.captured

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.run.trained() if isinstance(self.run, FastStep) else self.run.model.trained()

    def restore(self) -> None:
        """Back to the weights that all modes start from."""
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(self._start[name])
        self._drop_gradients()

    def step(self, batch: Batch, mask_ratio: float, clock: Callable | None = None) -> None:
        """A whole training step from a batch on the device; `clock` hears where each stage begins."""
        with self._marked(clock):
            self.run(*batch.inputs(self), mask_ratio)

    @contextlib.contextmanager
    def _marked(self, clock: Callable | None):
        if clock is None or self.is_whole:
            yield
        elif isinstance(self.run, FastStep):
            with self.run.marked(clock):
                yield
        else:
            self.run.model.mark = clock
            try:
                yield
            finally:
                self.run.model.mark = None

    def gradients(self, batch: Batch, mask_ratio: float) -> tuple[dict[str, float], dict[str, Tensor], int]:
        """(losses, gradients, peak bytes above the resident ones) of the starting weights.

        Without an optimiser step; for a captured step, losses and gradients are those of a replay.
        """
        scale, out = SCALE if self.dtype == "float16" else 1.0, {}

        def run() -> None:
            out.update(self.run.forward(*batch.inputs(self), mask_ratio))
            (out["loss"] * scale).backward()
            for name in tuple(out):
                out[name] = out[name].detach() if name in LOSSES else None

        if self.compile and not (self.compile == "blocks" and self._is_compiled):
            run()  # so that compilation is not counted
            self._drop_gradients()
            self._is_compiled = True
        peak, _ = peak_bytes(run, self.device)
        losses = {name: out[name].item() for name in LOSSES}
        found = {name: p.grad if scale == 1 else p.grad / scale for name, p in self.parameters().items()}
        self._drop_gradients()
        if self.captured:
            losses, found = self.run.captured(*batch.inputs(self), mask_ratio, self.restore)
        return losses, found, peak

    def _drop_gradients(self) -> None:
        for p in self.parameters().values():
            p.grad = None


def faster_attention(recipe: Recipe, dtype: str, device: str, batch: int) -> tuple[bool, dict[str, float]]:
    """(whether attention written out beats scaled_dot_product_attention, seconds of both) on a decoder block."""
    block = released.Block(recipe.decoder_width, recipe.decoder_heads).to(device)
    x = torch.randn(batch, recipe.patches + 1, recipe.decoder_width, device=device, requires_grad=True)

    def run(written_out: bool) -> None:
        with torch.autocast(device, DTYPES[dtype], enabled=DTYPES[dtype].itemsize == 2):
            y = eager.run_block(block, x, written_out)
        y.backward(x.detach())

    times: dict[str, list[float]] = {"sdpa": [], "written out": []}
    for _ in range(6):  # the first round warms up
        for name, found in times.items():
            found.append(seconds(partial(run, name == "written out"), device))
    best = {name: min(found[1:]) for name, found in times.items()}
    return best["written out"] < best["sdpa"], best
