"""Attention transfer (Zagoruyko & Komodakis 2017, section 3.1): where a network looks, whatever its channels say.

A feature map F [N, C, positions] becomes one attention map per sample, u(x) = x / max(||x||_2, 1e-12):

    a[n, i] = mean over c of |F[n, c, i]|^p        A[n] = u(a[n])

    mean    mean over samples and positions of (A_s - A_t)^2        (the authors' code, mdistiller, RepDistiller)
    paper   mean over samples of ||A_s[n] - A_t[n]||_2              (eq. 2; torchdistill)

    q = d loss / d a_s = (g - A (A . g)) / ||a_s||                  g = d loss / d A_s, A = A_s
    d loss / d F_s     = q[n, i] p |F|^(p-1) sign(F) / C            ||a_s|| < 1e-12: q = g / 1e-12, no projection

Forward reads both features once and keeps q, one number per position; backward reads the student once and writes its
gradient: 4 feature-sized transfers where the formula in single steps takes 14.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "at_loss"
MODES = ("mean", "paper")
NORM_FLOOR = 1e-12


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _attention(feature: Tensor, p: float) -> Tensor:
    return feature.to(_wide(feature.dtype)).abs().pow(p).mean(1)


def _fill_forward(student, teacher, p, paper, loss, q) -> None:
    a, b = _attention(student, p), _attention(teacher, p)
    norm = torch.linalg.vector_norm(a, dim=1, keepdim=True)
    u = a / norm.clamp_min(NORM_FLOOR)
    d = u - F.normalize(b, dim=1, eps=NORM_FLOOR)
    distance = torch.linalg.vector_norm(d, dim=1, keepdim=True)
    if paper:
        loss.copy_(distance.mean())
        g = torch.where(distance == 0, 0, d / (len(d) * distance))
    else:
        loss.copy_(d.square().mean())
        g = 2 * d / d.numel()
    tangent = g - u * (u * g).sum(1, keepdim=True)
    q.copy_(torch.where(norm < NORM_FLOOR, g, tangent) / norm.clamp_min(NORM_FLOOR))


def _fill_backward(grad_loss, student, q, p, grad_student) -> None:
    feature = student.to(q.dtype)
    slope = feature if p == 2 else feature.abs().pow(p - 1) * feature.sign()
    grad_student.copy_(slope * (grad_loss * q * (p / student.shape[1])).unsqueeze(1))


_TRITON = "fastkd.ops.features.at_loss_triton"
forward = Kernel(OP, reference=_fill_forward, triton=f"{_TRITON}:forward")
backward = Kernel(f"{OP}_backward", reference=_fill_backward, triton=f"{_TRITON}:backward")


@custom_op("at_loss")
def _op(student: Tensor, teacher: Tensor, p: float, paper: bool) -> tuple[Tensor, Tensor]:
    wide = _wide(student.dtype)
    loss = torch.empty((), dtype=wide, device=student.device)
    q = torch.empty((student.shape[0], student.shape[2]), dtype=wide, device=student.device)
    forward(student, teacher, p, paper, loss, q)
    return loss, q


@_op.register_fake
def _(student, teacher, p, paper):
    wide = _wide(student.dtype)
    q = torch.empty((student.shape[0], student.shape[2]), dtype=wide, device=student.device)
    return torch.empty((), dtype=wide, device=student.device), q


@custom_op("at_loss_backward")
def _op_backward(grad_loss: Tensor, student: Tensor, q: Tensor, p: float) -> Tensor:
    grad_student = torch.empty_like(student)  # channels_last stays channels_last
    backward(grad_loss, student, q, p, grad_student)
    return grad_student


@_op_backward.register_fake
def _(grad_loss, student, q, p):
    return torch.empty_like(student)


def _setup_context(ctx, inputs, output) -> None:
    student, _, ctx.p, _ = inputs
    ctx.save_for_backward(student, output[1])


def _autograd(ctx, grad_loss: Tensor, grad_q):
    return _op_backward(grad_loss, *ctx.saved_tensors, ctx.p), None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def at_loss(student: Tensor, teacher: Tensor, p: float = 2.0, mode: str = "mean") -> Tensor:
    """Attention transfer: distance between the normalised spatial attention maps of two features.

    Args:
        student: [N, Cs, ...] with 1 to 3 spatial dimensions, floating. channels_last maps are read in place.
        teacher: [N, Ct, ...], any number of channels; floating, its dtype may differ from the student's. Must not
            require grad. Where the sizes differ, each larger side is average-pooled to the smaller one first.
        p: power of the absolute values, >= 1.
        mode: ``mean`` (mean squared difference; usual weight 1000) or ``paper`` (mean distance per sample).

    Returns:
        Scalar, float32 (float64 for float64 features).

    Raises:
        ValueError: other numbers of samples or dimensions, an empty dimension, p < 1, an unknown mode, or a teacher
            that requires grad.
        TypeError: float64 on one side only.
    """
    if mode not in MODES:
        _check.fail(OP, "mode", repr(mode), "one of " + ", ".join(MODES))
    if not p >= 1:
        _check.fail(OP, "p", p, "a power of at least 1", "below it the gradient of a zero is infinite")
    ndim = min(max(student.ndim, 3), 5) if isinstance(student, Tensor) else 4
    _check.check_tensor(OP, "student", student, ndim)
    _check.check_tensor(OP, "teacher", teacher, ndim)
    _check.check_no_grad(OP, "teacher", teacher, "a distillation loss must not train the teacher")
    _check.check_same_device(OP, student=student, teacher=teacher)
    if student.shape[0] != teacher.shape[0]:
        _check.fail(OP, "student", f"{student.shape[0]} samples", f"{teacher.shape[0]} like teacher")
    for name, feature in (("student", student), ("teacher", teacher)):
        if feature.numel() == 0:
            _check.fail(OP, name, f"shape {tuple(feature.shape)}", "no empty dimension")
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
        got = f"{teacher.dtype} with a student in {student.dtype}".replace("torch.", "")
        _check.fail(OP, "teacher", got, "float64 on both sides or on none", "cast one of them", TypeError)
    size = tuple(map(min, student.shape[2:], teacher.shape[2:]))
    student, teacher = (_resized(x, size).flatten(2) for x in (student, teacher))
    return _op(student, teacher, float(p), mode == "paper")[0]


def _resized(feature: Tensor, size: tuple[int, ...]) -> Tensor:
    if feature.shape[2:] == size:
        return feature
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
    return pool(feature, size)


class ATLoss(torch.nn.Module):
    """`at_loss` as a module; ``forward(student, teacher)``, also for lists of features: the mean over their pairs."""

    def __init__(self, p: float = 2.0, mode: str = "mean") -> None:
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, student: Tensor | list[Tensor], teacher: Tensor | list[Tensor]) -> Tensor:
        if isinstance(student, Tensor):
            return at_loss(student, teacher, self.p, self.mode)
        losses = [at_loss(s, t, self.p, self.mode) for s, t in zip(student, teacher, strict=True)]
        return torch.stack(losses).mean()

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode}"


def _reference(student: Tensor, teacher: Tensor, p: float = 2.0, mode: str = "mean") -> Tensor:
    size = tuple(map(min, student.shape[2:], teacher.shape[2:]))
    a, b = (F.normalize(_attention(_resized(x, size), p).flatten(1), dim=1) for x in (student, teacher))
    if mode == "mean":
        return F.mse_loss(a, b)
    return torch.linalg.vector_norm(a - b, dim=1).mean()


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    batch, channels, size = case["batch"], case["channels"], case["size"]
    student = torch.randn(batch, channels, *size, generator=random)
    size = case.get("teacher_size", size)
    teacher = 2 * torch.randn(batch, case.get("teacher_channels", channels), *size, generator=random) + 0.3
    teacher_dtype = torch.float32 if case.get("teacher_float32") and dtype != torch.float64 else dtype
    student, teacher = student.to(device, dtype), teacher.to(device, teacher_dtype)
    if case.get("channels_last"):
        student, teacher = (x.transpose(1, -1).contiguous().transpose(1, -1) for x in (student, teacher))
    return dict(student=student, teacher=teacher, p=case.get("p", 2.0), mode=case.get("mode", "mean"))


def _law(kwargs: dict) -> None:
    """Equal features give 0 with zero gradient, and the loss sees neither scale nor sign nor the order of channels."""
    teacher, options = kwargs["teacher"], dict(p=kwargs["p"], mode=kwargs["mode"])
    leaf = teacher.clone().requires_grad_()
    loss = at_loss(leaf, teacher, **options)
    assert loss < 1e-6, loss
    if options["mode"] == "mean":
        assert torch.autograd.grad(loss, leaf)[0].abs().max() < 1e-5
    student = teacher.roll(1, -1)
    plain = at_loss(student, teacher, **options)
    changed = at_loss(-4 * student.flip(1), teacher / 2, **options)
    torch.testing.assert_close(changed, plain, rtol=1e-4, atol=1e-6)


def _bytes_moved(kwargs: dict) -> int:
    return 3 * tensor_bytes(kwargs["student"]) + tensor_bytes(kwargs["teacher"])


SPEC = register(
    OpSpec(
        name=OP,
        function=at_loss,
        reference=_reference,
        kernels=(forward, backward),
        build=_build,
        differentiable=("student",),
        cases={
            "p2": dict(batch=3, channels=5, size=(4, 5), teacher_channels=7),
            "paper": dict(batch=2, channels=6, size=(3, 3), mode="paper"),
            "p1": dict(batch=2, channels=4, size=(2, 3), p=1.0),
            "p3_channels_last": dict(batch=2, channels=9, size=(3, 4), p=3.0, channels_last=True),
            "teacher_larger": dict(batch=2, channels=3, size=(3, 4), teacher_size=(6, 3), teacher_float32=True),
            "one_row": dict(batch=1, channels=1, size=(33,), teacher_channels=2),
        },
        space=dict(
            batch=(1, 3), channels=(1, 5, 17), size=((1, 2), (3, 3), (5, 26)), teacher_channels=(1, 8),
            p=(1.0, 1.5, 2.0, 4.0), mode=MODES, channels_last=(False, True), teacher_float32=(False, True),
            seed=tuple(range(3)),
        ),
        bench={"resnet_28": dict(batch=32, channels=256, size=(28, 28))},
        bytes_moved=_bytes_moved,
        flops=lambda k: 6 * k["student"].numel() + 2 * k["teacher"].numel(),
        golden="classic_kd_feature",
        law=_law,
    )
)  # fmt: skip
