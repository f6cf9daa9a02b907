"""Noise-contrastive loss of one feature against a memory bank (CRD, Tian et al. 2020, eq. 11 to 19; the authors' code).

Per sample n: feature f [D], indices idx [K + 1] of bank rows m, the first being its own (the positive), and x_k =
exp(m[idx_k] . f / T) / Z. With c' = K / n_data and c = c' + eps,

    loss = -1/N sum_n [ log(x_0 / (x_0 + c)) + sum_{k >= 1} log(c' / (x_k + c)) ]

which is a sum of logistic losses of u_k = m[idx_k] . f / T - log Z - log c, and is computed as such: no exponential
overflows.

    loss = 1/N sum_n [ softplus(-u_0) + sum_{k >= 1} softplus(u_k) + K log(c / c') ]
    d loss / d f = 1/(N T) [ -sigmoid(-u_0) m[idx_0] + sum_{k >= 1} sigmoid(u_k) m[idx_k] ]

Loss and gradient take one walk over the gathered rows, each of which is used for both while it is in registers. The
gathered [N, K + 1, D] tensor, 4.3 GB for N = 256, K = 16384 and D = 256, never exists. Z and the bank are constants.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "crd_nce_loss"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shift(z: Tensor, negatives: int, n_data: int, eps: float) -> Tensor:
    """log Z + log c, 0-d in the dtype of z."""
    return z.log() + math.log(negatives / n_data + eps)


def _fill_forward(feature, bank, index, shift, temperature, constant, grad_feature, loss) -> None:
    samples, total = len(feature), constant
    for n in range(samples):  # one sample's rows at a time
        rows = bank[index[n]].to(feature.dtype)
        u = (rows @ feature[n]) / temperature - shift
        slope = torch.sigmoid(u)
        slope[0] -= 1
        total = total - (F.logsigmoid(-u[1:]).sum() + F.logsigmoid(u[0])) / samples
        grad_feature[n] = slope @ rows / (samples * temperature)
    loss.copy_(torch.as_tensor(total))


forward = Kernel(OP, reference=_fill_forward, triton="fastkd.ops.features.crd_nce_loss_triton:forward")


@custom_op("crd_nce_loss")
def _op(
    feature: Tensor, bank: Tensor, index: Tensor, shift: Tensor, temperature: float, constant: float
) -> tuple[Tensor, Tensor]:
    loss = torch.empty((), dtype=feature.dtype, device=feature.device)
    grad_feature = torch.empty(feature.shape, dtype=feature.dtype, device=feature.device)
    with torch.autocast(feature.device.type, enabled=False):
        forward(feature, bank, index, shift, temperature, constant, grad_feature, loss)
    return loss, grad_feature


@_op.register_fake
def _(feature, bank, index, shift, temperature, constant):
    grad_feature = torch.empty(feature.shape, dtype=feature.dtype, device=feature.device)
    return torch.empty((), dtype=feature.dtype, device=feature.device), grad_feature


@custom_op("crd_nce_loss_backward")
def _op_backward(grad_loss: Tensor, grad_feature: Tensor) -> Tensor:
    return grad_feature * grad_loss


@_op_backward.register_fake
def _(grad_loss, grad_feature):
    return torch.empty_like(grad_feature)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])


def _autograd(ctx, grad_loss: Tensor, grad_grad):
    return _op_backward(grad_loss, *ctx.saved_tensors), *[None] * 5


_op.register_autograd(_autograd, setup_context=_setup_context)


def crd_nce_loss(
    feature: Tensor, bank: Tensor, contrast_index: Tensor, z: Tensor, temperature: float = 0.07, *, eps: float = 1e-7
) -> Tensor:
    """Noise-contrastive estimation of one side of CRD.

    Args:
        feature: [N, D], floating, usually of unit length.
        bank: [n_data, D] memory of the other side; floating (16 bits halve what is read), float64 with float64 only.
            Must not require grad.
        contrast_index: [N, K + 1] int64 rows of the bank, column 0 the positive. Repeats are fine.
        z: 0-d, the normaliser, > 0; see `crd_normaliser`.
        temperature: > 0.
        eps: added to K / n_data in the denominators, as the authors do.

    Returns:
        Scalar, float32 (float64 for float64 features): sum over positive and negatives, mean over samples.

    Raises:
        ValueError: shapes that do not fit, no sample or no negative, temperature <= 0, a bank that requires grad.
        TypeError: an index that is not int64, or float64 on one side only.
    """
    _check.check_tensor(OP, "feature", feature, 2)
    _check.check_tensor(OP, "bank", bank, 2)
    _check.check_tensor(OP, "contrast_index", contrast_index, 2, (torch.int64,))
    _check.check_tensor(OP, "z", z, 0)
    _check.check_no_grad(OP, "bank", bank, "memory is written, not trained")
    _check.check_same_device(OP, feature=feature, bank=bank, contrast_index=contrast_index, z=z)
    if feature.shape[0] == 0 or feature.shape[1] != bank.shape[1]:
        _check.fail(OP, "feature", f"shape {tuple(feature.shape)}", f"[N, {bank.shape[1]}] like bank, N > 0")
    if contrast_index.shape[0] != feature.shape[0] or contrast_index.shape[1] < 2:
        expected = f"[{feature.shape[0]}, K + 1] with K >= 1"
        _check.fail(OP, "contrast_index", f"shape {tuple(contrast_index.shape)}", expected)
    if not temperature > 0:
        _check.fail(OP, "temperature", temperature, "a positive number")
    if (feature.dtype == torch.float64) != (bank.dtype == torch.float64):
        got = f"{bank.dtype} with a feature in {feature.dtype}".replace("torch.", "")
        _check.fail(OP, "bank", got, "float64 on both sides or on none", "cast one of them", TypeError)
    wide = _wide(feature.dtype)
    negatives, n_data = contrast_index.shape[1] - 1, bank.shape[0]
    shift = _shift(z.detach().to(wide), negatives, n_data, eps)
    constant = negatives * math.log1p(eps * n_data / negatives)
    bank, contrast_index = bank.contiguous(), contrast_index.contiguous()
    return _op(feature.to(wide).contiguous(), bank, contrast_index, shift, float(temperature), constant)[0]


@torch.no_grad()
def crd_normaliser(feature: Tensor, bank: Tensor, contrast_index: Tensor, temperature: float = 0.07) -> Tensor:
    """Z = n_data * mean over all [N, K + 1] entries of exp(bank[idx] . feature / T); 0-d, taken from the first batch.

    Shapes as in `crd_nce_loss`. One sample's rows are gathered at a time.
    """
    wide = _wide(feature.dtype)
    with torch.autocast(feature.device.type, enabled=False):
        logits = [bank[rows].to(wide) @ f / temperature for f, rows in zip(feature.to(wide), contrast_index)]
    return torch.logsumexp(torch.cat(logits), 0).exp() * (bank.shape[0] / contrast_index.numel())


def _reference(feature, bank, contrast_index, z, temperature=0.07, *, eps=1e-7) -> Tensor:
    wide = _wide(feature.dtype)
    rows = bank.to(wide)[contrast_index]  # [N, K + 1, D]
    u = (rows @ feature.to(wide).unsqueeze(2)).squeeze(2) / temperature
    negatives, n_data = contrast_index.shape[1] - 1, len(bank)
    u = u - _shift(z.to(wide), negatives, n_data, eps)
    sums = F.logsigmoid(u[:, 0]).sum() + F.logsigmoid(-u[:, 1:]).sum()  # softplus(x) = -logsigmoid(-x), exact anywhere
    return -sums / len(feature) + negatives * math.log1p(eps * n_data / negatives)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    samples, negatives, n_data, width = case["batch"], case["negatives"], case["n_data"], case["width"]
    feature = F.normalize(torch.randn(samples, width, generator=random))
    bank = F.normalize(torch.randn(n_data, width, generator=random))
    index = torch.randint(n_data, (samples, negatives + 1), generator=random)
    bank_dtype = torch.bfloat16 if case.get("bank_bfloat16") and dtype != torch.float64 else dtype
    return dict(
        feature=feature.to(device, dtype), bank=bank.to(device, bank_dtype), contrast_index=index.to(device),
        z=torch.tensor(case.get("z", 2.0) * n_data).to(device, _wide(dtype)), temperature=case.get("temperature", 0.07),
    )  # fmt: skip


def _law(kwargs: dict) -> None:
    """The order of negatives does not matter, and a batch is the mean of its samples."""
    plain = crd_nce_loss(**kwargs)
    index = torch.cat([kwargs["contrast_index"][:, :1], kwargs["contrast_index"][:, 1:].flip(1)], 1)
    torch.testing.assert_close(crd_nce_loss(**(kwargs | dict(contrast_index=index))), plain, rtol=1e-5, atol=1e-6)
    one = [
        crd_nce_loss(**(kwargs | dict(feature=f[None], contrast_index=i[None])))
        for f, i in zip(kwargs["feature"], kwargs["contrast_index"])
    ]
    torch.testing.assert_close(torch.stack(one).mean(), plain, rtol=1e-5, atol=1e-6)


def _bytes_moved(kwargs: dict) -> int:
    rows = kwargs["contrast_index"].numel() * kwargs["bank"].shape[1] * kwargs["bank"].element_size()
    return rows + tensor_bytes(kwargs["contrast_index"]) + 3 * tensor_bytes(kwargs["feature"])


SPEC = register(
    OpSpec(
        name=OP,
        function=crd_nce_loss,
        reference=_reference,
        kernels=(forward,),
        build=_build,
        differentiable=("feature",),
        cases={
            "odd": dict(batch=3, negatives=36, n_data=23, width=21),
            "vectors": dict(batch=2, negatives=32, n_data=40, width=128),
            "bank_bfloat16": dict(batch=2, negatives=17, n_data=30, width=24, bank_bfloat16=True),
            "one_negative": dict(batch=1, negatives=1, n_data=5, width=5, z=0.01),
            "sharp": dict(batch=2, negatives=20, n_data=9, width=8, temperature=0.005, z=1e-3),
        },
        space=dict(
            batch=(1, 4), negatives=(1, 15, 16, 70), n_data=(8, 50), width=(8, 33, 64), z=(0.5, 30.0),
            bank_bfloat16=(False, True), temperature=(0.07, 1.0), seed=tuple(range(3)),
        ),
        bench={"k4096": dict(batch=64, negatives=4096, n_data=50_000, width=128)},
        bytes_moved=_bytes_moved,
        flops=lambda k: 4 * k["contrast_index"].numel() * k["bank"].shape[1],
        golden="classic_kd_crd",
        law=_law,
    )
)  # fmt: skip
