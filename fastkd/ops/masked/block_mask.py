"""Square patches of an image set to zero (MIC, Hoyer et al. 2023, section 3.2).

A coarse grid of round(H / b) x round(W / b) cells (ties to even) draws uniform noise, one grid per image; a pixel is
kept where the noise of its cell exceeds the ratio r:

    cell of row i   min(floor(i * (h / H)), h - 1)      i * (h / H) rounded to float32, as nearest interpolation has it
    mask[b, i, j]   noise[b, cell(i), cell(j)] > r      one mask for all channels
    out             image where mask, else 0            0 is the mean of a normalised image

b is the side of a patch only where it divides the image; else the grid is stretched over it. `mask_image` reads the
coarse grid and never stores a mask. Its gradient is the same op on the upstream gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "mask_image"


def grid_size(height: int, width: int, block_size: int) -> tuple[int, int]:
    """Cells (rows, columns) of the coarse grid; Python's round takes ties to the even number, as the released code."""
    return round(height / block_size), round(width / block_size)


def _cells(pixels: int, cells: int, device: torch.device) -> Tensor:
    """[pixels] int64, the cell of each pixel by the rule of PyTorch's nearest interpolation."""
    place = torch.arange(pixels, dtype=torch.float32, device=device) * (cells / pixels)
    return place.long().clamp_(max=cells - 1)


def _enlarged(keep: Tensor, height: int, width: int) -> Tensor:
    rows, columns = (_cells(n, m, keep.device) for n, m in zip((height, width), keep.shape[2:]))
    return keep[:, :, rows][:, :, :, columns]


def _fill_reference(images, keep, out) -> None:
    mask = _enlarged(keep, *images.shape[2:])
    out.copy_(torch.where(mask, images, torch.zeros((), dtype=images.dtype, device=images.device)))


kernel = Kernel(OP, reference=_fill_reference, triton="fastkd.ops.masked.block_mask_triton:mask_image")


@custom_op(OP)
def _op(images: Tensor, keep: Tensor) -> Tensor:
    out = torch.empty(images.shape, dtype=images.dtype, device=images.device)
    if out.numel():
        kernel(images, keep, out)
    return out


@_op.register_fake
def _(images, keep):
    return torch.empty(images.shape, dtype=images.dtype, device=images.device)


@custom_op("mask_image_backward")
def _op_backward(grad_out: Tensor, keep: Tensor) -> Tensor:
    grad_images = torch.empty(grad_out.shape, dtype=grad_out.dtype, device=grad_out.device)
    if grad_images.numel():
        kernel(grad_out, keep, grad_images)
    return grad_images


@_op_backward.register_fake
def _(grad_out, keep):
    return torch.empty(grad_out.shape, dtype=grad_out.dtype, device=grad_out.device)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _autograd(ctx, grad_out: Tensor):
    return _op_backward(grad_out, *ctx.saved_tensors), None


_op.register_autograd(_autograd, setup_context=_setup_context)


def _kept(
    op: str, shape: torch.Size | tuple[int, ...], block_size: int, mask_ratio: float, noise: Tensor | None,
    generator: torch.Generator | None, device: torch.device,
) -> Tensor:  # fmt: skip
    """[B, 1, rows, columns] bool: the cells whose noise, given or new, exceeds the ratio."""
    batch, _, height, width = shape
    if not 0 <= mask_ratio <= 1:
        _check.fail(op, "mask_ratio", mask_ratio, "a number from 0 to 1")
    if block_size < 1:
        _check.fail(op, "block_size", block_size, "a positive int (pixels)")
    grid = grid_size(height, width, block_size)
    if 0 in grid:
        got = f"{block_size} for images of {height} x {width} pixels"
        _check.fail(op, "block_size", got, "less than twice the shorter side", "else the grid has no cell")
    if noise is None:
        noise = torch.rand((batch, 1, *grid), generator=generator, device=device)
    else:
        _check.check_tensor(op, "noise", noise, 4, (torch.float32, torch.float64))
        meaning = "(B, 1, round(H / block_size), round(W / block_size))"
        _check.check_shape(op, "noise", noise, (batch, 1, *grid), meaning)
    return noise > mask_ratio


def block_mask(
    shape: torch.Size | tuple[int, int, int, int],
    block_size: int,
    mask_ratio: float,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random mask of square patches for a batch of images.

    Args:
        shape: (B, C, H, W) of the images.
        block_size: side of a patch in pixels.
        mask_ratio: probability with which a patch is masked, from 0 to 1.
        noise: optional [B, 1, round(H / block_size), round(W / block_size)] in [0, 1), instead of new random numbers.
        generator: of the random numbers; one of the device.
        device: of the mask; default that of the noise or of the generator, else the current one.

    Returns:
        [B, 1, H, W] bool, True where the image is kept (noise > mask_ratio).

    Raises:
        ValueError: mask_ratio outside [0, 1], a block so large that the grid has no cell, noise of another shape.
    """
    if len(shape) != 4:
        _check.fail("block_mask", "shape", tuple(shape), "(B, C, H, W)")
    if device is None and (noise is not None or generator is not None):
        device = (noise if noise is not None else generator).device
    return _enlarged(_kept("block_mask", shape, block_size, mask_ratio, noise, generator, device), *shape[2:])


def mask_image(
    images: Tensor,
    block_size: int,
    mask_ratio: float,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``images * block_mask(...)`` without a mask in memory; masked pixels are 0 even where they were not finite.

    Args:
        images: [B, C, H, W] floating, normalised (0 is the mean of a channel), any strides.
        block_size, mask_ratio, noise, generator: as in `block_mask`; noise and generator on the images' device.

    Returns:
        [B, C, H, W], dtype of the images, contiguous; gradients reach the pixels that are kept.

    Raises:
        ValueError, TypeError: as `block_mask`, or images that are not floating.
    """
    _check.check_tensor(OP, "images", images, 4)
    _check.check_same_device(OP, images=images, noise=noise)
    return _op(images, _kept(OP, images.shape, block_size, mask_ratio, noise, generator, images.device))


class BlockMask(torch.nn.Module):
    """`mask_image` as a module; ``forward(images, noise=None)``."""

    def __init__(self, block_size: int, mask_ratio: float) -> None:
        super().__init__()
        self.block_size, self.mask_ratio = block_size, mask_ratio

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return mask_image(images, self.block_size, self.mask_ratio, noise=noise)

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}, mask_ratio={self.mask_ratio}"


def _reference(images, block_size, mask_ratio, *, noise) -> Tensor:
    return images * _enlarged(noise > mask_ratio, *images.shape[2:])


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    shape = (case["batch"], case["channels"], *case["size"])
    images = torch.randn(shape, generator=random).to(device, dtype)
    if case.get("channels_last"):
        images = images.contiguous(memory_format=torch.channels_last)
    grid = grid_size(*case["size"], case["block"])
    noise = torch.rand((case["batch"], 1, *grid), generator=random).to(device)
    return dict(images=images, block_size=case["block"], mask_ratio=case["ratio"], noise=noise)


def _law(kwargs: dict) -> None:
    """Masking twice changes nothing more; what is masked by one ratio is masked by a larger one."""
    images = kwargs["images"]
    once = mask_image(**kwargs)
    assert torch.equal(mask_image(**kwargs | dict(images=once)), once)
    kept = block_mask(images.shape, kwargs["block_size"], kwargs["mask_ratio"], noise=kwargs["noise"])
    assert torch.equal(once, torch.where(kept, images, 0))
    more = block_mask(images.shape, kwargs["block_size"], (1 + kwargs["mask_ratio"]) / 2, noise=kwargs["noise"])
    assert not (more & ~kept).any()


SPEC = register(
    OpSpec(
        name=OP,
        function=mask_image,
        reference=_reference,
        kernels=(kernel,),
        build=_build,
        differentiable=("images",),
        cases={
            "even": dict(batch=2, channels=3, size=(16, 24), block=8, ratio=0.5),
            "odd": dict(batch=2, channels=2, size=(19, 13), block=4, ratio=0.6),
            "rounded_index": dict(batch=1, channels=1, size=(198, 4), block=4, ratio=0.5),
            "tie_to_even": dict(batch=2, channels=1, size=(10, 14), block=4, ratio=0.4),
            "channels_last": dict(batch=2, channels=3, size=(9, 8), block=3, ratio=0.5, channels_last=True),
            "all_masked": dict(batch=1, channels=3, size=(6, 7), block=8, ratio=1.0),
        },
        space=dict(
            batch=(1, 3), channels=(1, 3), size=((1, 1), (5, 33), (40, 17), (30, 7)), block=(1, 3, 8),
            ratio=(0.0, 0.4, 0.7, 1.0), channels_last=(False, True), seed=tuple(range(5)),
        ),
        bench={"seg_1024": dict(batch=2, channels=3, size=(1024, 1024), block=64, ratio=0.7)},
        # Each way: kept pixels are read, all are written.
        bytes_moved=lambda k: int(2 * (2 - k["mask_ratio"]) * tensor_bytes(k["images"])),
        flops=lambda k: 2 * k["images"].numel(),
        golden="mic_block_mask",
        law=_law,
    )
)  # fmt: skip
