"""Decoder input of a masked autoencoder (MAE, He et al. 2022, section 3; DMAE, Bai et al. 2023).

The encoder's n visible tokens and a row for each patch that it has not seen become one sequence, with positions. Per
image b, with R prefix tokens and K >= n patches listed in ids (visible ones first):

    out[b, r]     = tokens[b, r]     + pos[r]                                           r < R
    out[b, R + j] = tokens[b, R + j] + pos[R + ids[b, j]]                               j < n
    out[b, R + j] = fill[0]          + pos[R + ids[b, j]]                               n <= j < K, one fill row
    out[b, R + j] = fill[ids[b, j]]  + pos[R + ids[b, j]]                               n <= j < K, a fill row per patch

Rows stay in the order of ids. Attention does not depend on the order of its tokens, so the un-shuffle of the published
code is not needed: predictions come in the order of ids too. With G = d loss / d out:

    dtokens = G[:, :R + n]        dfill[0] = sum of G over all filled rows        dfill[l] = ... over those of patch l

dtokens is a view of G, so nothing is moved for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "decoder_assemble"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fill_forward(tokens, fill, pos_embed, ids, num_prefix, out) -> None:
    wide, given = _wide(out.dtype), tokens.shape[1]
    rest = ids[:, given - num_prefix :]
    filled = fill.to(wide)[rest if len(fill) > 1 else torch.zeros_like(rest)]
    x = torch.cat((tokens.to(wide), filled), 1)
    if pos_embed is not None:
        x[:, :num_prefix] += pos_embed[:num_prefix].to(wide)
        x[:, num_prefix:] += pos_embed.to(wide)[num_prefix + ids]
    out.copy_(x)


def _fill_backward(grad_out, ids, given, num_prefix, grad_fill) -> None:
    grad, rest = grad_out[:, given:].to(_wide(grad_out.dtype)), ids[:, given - num_prefix :]
    rows = rest if len(grad_fill) > 1 else torch.zeros_like(rest)
    total = torch.zeros(grad_fill.shape, dtype=grad.dtype, device=grad.device)
    grad_fill.copy_(total.index_put((rows,), grad, accumulate=True))


_TRITON = "fastkd.ops.masked.decoder_assemble_triton"
forward = Kernel(OP, reference=_fill_forward, triton=f"{_TRITON}:forward", cuda=True)
backward = Kernel(f"{OP}_backward", reference=_fill_backward, triton=f"{_TRITON}:backward", cuda=True)


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _empty_out(tokens: Tensor, ids: Tensor, num_prefix: int) -> Tensor:
    batch, _, width = tokens.shape
    return torch.empty(batch, num_prefix + ids.shape[1], width, dtype=tokens.dtype, device=tokens.device)


@custom_op("decoder_assemble")
def _op(tokens: Tensor, fill: Tensor, pos_embed: Tensor | None, ids: Tensor, num_prefix: int) -> Tensor:
    out = _empty_out(tokens, ids, num_prefix)
    pos_embed = None if pos_embed is None else pos_embed.contiguous()
    forward(_unit_stride(tokens), fill.contiguous(), pos_embed, ids, num_prefix, out)
    return out


@_op.register_fake
def _(tokens, fill, pos_embed, ids, num_prefix):
    return _empty_out(tokens, ids, num_prefix)


@custom_op("decoder_assemble_backward")
def _op_backward(
    grad_out: Tensor, ids: Tensor, given: int, num_prefix: int, fill_rows: int, fill_dtype: torch.dtype
) -> Tensor:
    grad_fill = torch.empty(fill_rows, grad_out.shape[2], dtype=fill_dtype, device=grad_out.device)
    backward(_unit_stride(grad_out), ids, given, num_prefix, grad_fill)
    return grad_fill


@_op_backward.register_fake
def _(grad_out, ids, given, num_prefix, fill_rows, fill_dtype):
    return torch.empty(fill_rows, grad_out.shape[2], dtype=fill_dtype, device=grad_out.device)


def _setup_context(ctx, inputs, output) -> None:
    tokens, fill, _, ids, ctx.num_prefix = inputs
    ctx.given, ctx.fill_rows, ctx.fill_dtype = tokens.shape[1], fill.shape[0], fill.dtype
    ctx.save_for_backward(ids)


def _autograd(ctx, grad_out: Tensor):
    grad_fill = None
    if ctx.needs_input_grad[1]:
        grad_fill = _op_backward(grad_out, *ctx.saved_tensors, ctx.given, ctx.num_prefix, ctx.fill_rows, ctx.fill_dtype)
    return grad_out[:, : ctx.given], grad_fill, None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def decoder_assemble(
    tokens: Tensor, fill: Tensor, pos_embed: Tensor | None, ids: Tensor, num_prefix: int = 1
) -> Tensor:
    """Puts the tokens of visible patches and fill rows for the other patches into one sequence, with positions.

    All inputs may have any strides. Gradients flow to tokens and fill; pos_embed is a constant. Sums are made in
    float32 (float64 for float64 tokens), so a float32 mask token or position table loses nothing under bfloat16 tokens.

    Args:
        tokens: [B, R + n, D] embedded encoder output, prefix tokens first.
        fill: [1, D] the mask token; or [L, D] a row for each patch (for what is computed once for the whole batch,
            such as the queries, keys and values of mask token plus position).
        pos_embed: [R + L, D] positions, prefix rows first, or None where none are to be added.
        ids: [B, K] int64 in [0, L), K >= n: raster index of the n visible patches in the order of tokens, then of the
            patches to fill. No patch twice in an image. K = L decodes all patches.
        num_prefix: R, prefix tokens in tokens.

    Returns:
        [B, R + K, D] in the dtype of tokens, rows in the order of ids.

    Raises:
        ValueError: shapes or devices that do not fit, pos_embed that requires grad.
        TypeError: dtypes that are not floating, ids that is not int64.
    """
    _check.check_tensor(OP, "tokens", tokens, 3)
    _check.check_tensor(OP, "fill", fill, 2)
    _check.check_tensor(OP, "ids", ids, 2, (torch.int64,))
    batch, given, width = tokens.shape
    if not 0 <= num_prefix <= given:
        _check.fail(OP, "num_prefix", num_prefix, f"0 to {given}, the tokens of an image")
    visible = given - num_prefix
    _check.check_shape(OP, "ids", ids, (batch, ids.shape[1]), "(B, K) with the B of tokens")
    if ids.shape[1] < visible:
        _check.fail(OP, "ids", f"{ids.shape[1]} patches an image", f"the {visible} visible ones or more")
    _check.check_shape(OP, "fill", fill, (fill.shape[0], width), "(1 or L, D) with the D of tokens")
    if pos_embed is not None:
        _check.check_tensor(OP, "pos_embed", pos_embed, 2)
        _check.check_shape(OP, "pos_embed", pos_embed, (pos_embed.shape[0], width), "(R + L, D) with the D of tokens")
        _check.check_no_grad(OP, "pos_embed", pos_embed, "positions are constants here")
        patches = pos_embed.shape[0] - num_prefix
        if patches < ids.shape[1]:
            _check.fail(
                OP, "pos_embed", f"{pos_embed.shape[0]} rows", f"{num_prefix} + L, L at least {ids.shape[1]} as in ids"
            )
        if fill.shape[0] not in (1, patches):
            _check.fail(OP, "fill", f"{fill.shape[0]} rows", f"1 or L = {patches}")
    elif fill.shape[0] != 1 and fill.shape[0] < ids.shape[1]:
        _check.fail(OP, "fill", f"{fill.shape[0]} rows", f"1 or L, at least {ids.shape[1]} as in ids")
    _check.check_same_device(OP, tokens=tokens, fill=fill, pos_embed=pos_embed, ids=ids)
    wide = _wide(tokens.dtype)
    if fill.dtype != tokens.dtype:
        fill = fill.to(wide)
    if pos_embed is not None and pos_embed.dtype != tokens.dtype:
        pos_embed = pos_embed.to(wide)
    return _op(tokens, fill, pos_embed, ids, num_prefix)


def _reference(tokens, fill, pos_embed, ids, num_prefix=1) -> Tensor:
    batch, given, width = tokens.shape
    rest = ids[:, given - num_prefix :]
    filled = fill.expand(batch, rest.shape[1], width) if len(fill) == 1 else fill[rest]
    x = torch.cat((tokens, filled.to(tokens.dtype)), 1)
    if pos_embed is not None:
        prefix = torch.arange(num_prefix, device=ids.device).expand(batch, -1)
        x = x + pos_embed[torch.cat((prefix, num_prefix + ids), 1)]
    return x.to(tokens.dtype)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    batch, patches, width, prefix = case["batch"], case["patches"], case["width"], case["prefix"]
    visible = max(1, int(patches * case["keep"]))
    ids = torch.rand(batch, patches, generator=random).argsort(1)
    ids = ids[:, : visible + int((patches - visible) * case.get("fraction", 1.0))].to(device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = wide if case.get("mixed") else dtype

    def normal(shape: tuple, dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=random).to(device, dtype)
        return values.mT.contiguous().mT if case.get("strided") else values

    return dict(
        tokens=normal((batch, prefix + visible, width), dtype),
        fill=normal((patches if case.get("per_patch") else 1, width), table),
        pos_embed=normal((prefix + patches, width), table) if case.get("pos", True) else None,
        ids=ids.t().contiguous().t() if case.get("strided") else ids,
        num_prefix=prefix,
    )


def _law(kwargs: dict) -> None:
    """Patches to fill in another order give the same rows in that order, bit for bit."""
    visible = kwargs["tokens"].shape[1] - kwargs["num_prefix"]
    ids, given = kwargs["ids"], kwargs["tokens"].shape[1]
    flipped = torch.cat((ids[:, :visible], ids[:, visible:].flip(1)), 1)
    out, other = (decoder_assemble(**{**kwargs, "ids": i}) for i in (ids, flipped))
    assert torch.equal(out[:, :given], other[:, :given]) and torch.equal(out[:, given:], other[:, given:].flip(1))


def _bytes_moved(kwargs: dict) -> int:
    # Tokens read, output written; in backward the filled rows of its gradient are read. Tables stay in cache.
    tokens, ids = kwargs["tokens"], kwargs["ids"]
    row = tokens.shape[2] * tokens.element_size()
    filled = ids.numel() - tokens.shape[0] * (tokens.shape[1] - kwargs["num_prefix"])
    return 2 * tensor_bytes(tokens) + 2 * filled * row


SPEC = register(
    OpSpec(
        name=OP,
        function=decoder_assemble,
        reference=_reference,
        kernels=(forward, backward),
        build=_build,
        differentiable=("fill", "tokens"),
        cases={
            "mae": dict(batch=3, patches=12, keep=0.25, width=24, prefix=1),
            "mixed_dtypes": dict(batch=2, patches=10, keep=0.3, width=33, prefix=1, mixed=True),
            "no_prefix": dict(batch=2, patches=9, keep=0.5, width=16, prefix=0),
            "registers": dict(batch=2, patches=9, keep=0.5, width=16, prefix=5),
            "keep_one": dict(batch=2, patches=16, keep=0.01, width=8, prefix=1),
            "keep_all": dict(batch=2, patches=6, keep=1.0, width=8, prefix=1),
            "subset": dict(batch=3, patches=20, keep=0.25, width=16, prefix=1, fraction=0.4),
            "per_patch": dict(batch=3, patches=12, keep=0.25, width=24, prefix=1, per_patch=True),
            "per_patch_no_pos": dict(batch=4, patches=7, keep=0.5, width=40, prefix=1, per_patch=True, pos=False),
            "per_patch_subset": dict(
                batch=2, patches=20, keep=0.25, width=16, prefix=2, per_patch=True, fraction=0.2, mixed=True
            ),
            "no_pos": dict(batch=2, patches=5, keep=0.5, width=16, prefix=1, pos=False),
            "strided": dict(batch=2, patches=9, keep=0.5, width=18, prefix=1, strided=True),
            "strided_per_patch": dict(batch=2, patches=9, keep=0.5, width=18, prefix=1, per_patch=True, strided=True),
            "one_of_each": dict(batch=1, patches=1, keep=1.0, width=1, prefix=0),
        },
        space=dict(
            batch=(1, 2, 5), patches=(1, 2, 9, 16), keep=(0.01, 0.5, 1.0), width=(1, 7, 32), prefix=(0, 1, 4),
            fraction=(0.0, 0.5, 1.0), per_patch=(False, True), pos=(False, True), mixed=(False, True),
            strided=(False, True), seed=tuple(range(5)),
        ),
        bench={
            "decoder_75": dict(batch=128, patches=196, keep=0.25, width=512, prefix=1, mixed=True),
            "decoder_95": dict(batch=128, patches=196, keep=0.05, width=512, prefix=1, mixed=True),
            "shared_qkv_95": dict(batch=128, patches=196, keep=0.05, width=1536, prefix=1, per_patch=True, pos=False),
        },
        bytes_moved=_bytes_moved,
        flops=lambda k: 2 * (k["num_prefix"] * len(k["ids"]) + k["ids"].numel()) * k["tokens"].shape[2],
        law=_law,
    )
)  # fmt: skip
