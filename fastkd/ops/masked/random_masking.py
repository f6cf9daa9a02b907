"""Random patch masking of MAE (He et al. 2022, section 3) and DMAE (Bai et al. 2023).

Per image, patches are ordered by uniform noise; the first ``int(L * (1 - mask_ratio))`` are visible.

    ids_shuffle = argsort(noise)           patch index at each place of the shuffled order
    ids_restore = argsort(ids_shuffle)     place of each patch in the shuffled order: its rank
    mask[b, i]  = 1 where ids_restore[b, i] >= n, else 0

The rank is counted directly (#{j: noise_j < noise_i}), so nothing is sorted; ties go to the lower patch index.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "random_masking"


class Masking(NamedTuple):
    """Which patches of each image are visible.

    Attributes:
        ids_keep: [B, n] int64, visible patches in shuffled order (noise ascending), a view of `ids_shuffle`.
        ids_restore: [B, L] int64, place of each patch in the shuffled order.
        mask: [B, L] float32 in raster order, 0 visible and 1 masked.
        ids_shuffle: [B, L] int64, all patches in shuffled order: visible first, then masked.
    """

    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor
    ids_shuffle: Tensor

    @property
    def ids_masked(self) -> Tensor:
        """[B, L - n] int64, masked patches in shuffled order, a view of `ids_shuffle`."""
        return self.ids_shuffle[:, self.ids_keep.shape[1] :]


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """n = int(L * (1 - mask_ratio)), truncated in double precision exactly as the published code does."""
    return int(num_patches * (1 - mask_ratio))


def _reference(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    return ids_shuffle, ids_restore, (ids_restore >= keep).float()


def _fill_reference(noise: Tensor, keep: int, ids_shuffle: Tensor, ids_restore: Tensor, mask: Tensor) -> None:
    for out, value in zip((ids_shuffle, ids_restore, mask), _reference(noise, keep)):
        out.copy_(value)


kernel = Kernel(
    OP,
    reference=_fill_reference,
    triton="fastkd.ops.masked.random_masking_triton:random_masking",
    cuda=True,
)


@custom_op("random_masking")
def _op(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_shuffle = torch.empty(noise.shape, dtype=torch.int64, device=noise.device)
    ids_restore = torch.empty_like(ids_shuffle)
    mask = torch.empty(noise.shape, dtype=torch.float32, device=noise.device)
    kernel(noise, keep, ids_shuffle, ids_restore, mask)
    return ids_shuffle, ids_restore, mask


@_op.register_fake
def _(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.empty(noise.shape, dtype=torch.int64, device=noise.device)
    return ids, torch.empty_like(ids), torch.empty(noise.shape, dtype=torch.float32, device=noise.device)


def random_masking(
    batch: int,
    num_patches: int,
    mask_ratio: float,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Masking:
    """Draws, per image, which patches stay visible.

    Args:
        batch: images B.
        num_patches: patches L per image.
        mask_ratio: share of masked patches in [0, 1); ``int(L * (1 - mask_ratio))`` patches stay visible.
        noise: optional [B, L] floating tensor that fixes the permutation; ascending noise is the shuffled order.
        generator: source of the noise where `noise` is not given.
        device: device of the result; default that of `noise`, else the current default device.

    Returns:
        `Masking` (ids_keep, ids_restore, mask, ids_shuffle).

    Raises:
        ValueError: mask_ratio outside [0, 1), no patch visible, or noise of another shape.
    """
    if not 0 <= mask_ratio < 1:
        _check.fail(OP, "mask_ratio", mask_ratio, "a number in [0, 1)")
    keep = num_visible(num_patches, mask_ratio)
    if keep == 0:
        _check.fail(
            OP, "mask_ratio", mask_ratio, f"at most {1 - 1 / num_patches:.4g} for {num_patches} patches",
            "no patch would be visible: lower mask_ratio or use more patches",
        )  # fmt: skip
    if noise is None:
        noise = torch.rand(batch, num_patches, generator=generator, device=device)
    else:
        _check.check_tensor(OP, "noise", noise, 2)
        _check.check_shape(OP, "noise", noise, (batch, num_patches), "(batch, num_patches)")
        noise = noise.detach() if device is None else noise.detach().to(device)
    ids_shuffle, ids_restore, mask = _op(noise, keep)
    return Masking(ids_shuffle[:, :keep], ids_restore, mask, ids_shuffle)


def _reference_masking(batch, num_patches, mask_ratio, *, noise, generator=None, device=None) -> Masking:
    keep = num_visible(num_patches, mask_ratio)
    ids_shuffle, ids_restore, mask = _reference(noise, keep)
    return Masking(ids_shuffle[:, :keep], ids_restore, mask, ids_shuffle)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    batch, patches = case["batch"], case["patches"]
    random = torch.Generator().manual_seed(case.get("seed", 0))
    noise = torch.rand(batch, patches, generator=random)
    if case.get("ties"):
        noise = (noise * 4).floor()
    if case.get("strided"):
        noise = noise.t().contiguous().t()
    return dict(batch=batch, num_patches=patches, mask_ratio=case["ratio"], noise=noise.to(device, dtype))


def _law(kwargs: dict) -> None:
    """The mask counts L - n, ids_shuffle is a permutation and ids_restore its inverse."""
    result = random_masking(**kwargs)
    patches, keep = kwargs["num_patches"], result.ids_keep.shape[1]
    assert (result.mask.sum(1) == patches - keep).all()
    order = torch.arange(patches, device=result.mask.device).expand_as(result.ids_restore)
    assert torch.equal(result.ids_shuffle.sort(1).values, order)
    assert torch.equal(result.ids_shuffle.gather(1, result.ids_restore), order)


SPEC = register(
    OpSpec(
        name=OP,
        function=random_masking,
        reference=_reference_masking,
        kernels=(kernel,),
        build=_build,
        differentiable=(),
        cases={
            "vit_75": dict(batch=3, patches=196, ratio=0.75),
            "odd": dict(batch=2, patches=37, ratio=0.6),
            "keep_one": dict(batch=2, patches=16, ratio=0.9),
            "keep_all": dict(batch=2, patches=9, ratio=0.0),
            "one_patch": dict(batch=1, patches=1, ratio=0.0),
            "ties": dict(batch=3, patches=50, ratio=0.5, ties=True),
            "strided": dict(batch=4, patches=33, ratio=0.5, strided=True),
        },
        space=dict(
            batch=(1, 2, 5), patches=(1, 2, 15, 16, 17, 64, 100), ratio=(0.0, 0.25, 0.5, 0.75), ties=(False, True),
            strided=(False, True), seed=tuple(range(5)),
        ),
        bench={"vit_90": dict(batch=128, patches=196, ratio=0.9)},
        bytes_moved=lambda k: tensor_bytes(k["noise"]) + k["noise"].numel() * (8 + 8 + 4),
        flops=lambda k: k["noise"].numel() * k["num_patches"] * 3,
        golden="dmae_random_masking",
        law=_law,
    )
)  # fmt: skip
