"""Random patch masking of MAE (He et al. 2022, section 3) and DMAE (Bai et al. 2023).

Per image, patches are ordered by uniform noise; the first ``int(L * (1 - mask_ratio))`` are visible.

    ids_shuffle = argsort(noise)           patch index at each place of the shuffled order
    ids_restore = argsort(ids_shuffle)     place of each patch in the shuffled order: its rank
    mask[b, i]  = 1 where ids_restore[b, i] >= n, else 0

The rank is counted directly (#{j: noise_j < noise_i}), so nothing is sorted; ties go to the lower patch index.

The noise is given, or a function of one 64-bit key per image: that of patch j is the upper 24 bits of the first word of
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with this key and counter j. All
backends draw the same bits, no noise tensor exists, and a captured CUDA graph draws new masks from new keys.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def visible_patches(op: str, num_patches: int, mask_ratio: float) -> int:
    """`num_visible` of checked arguments."""
    if not 0 <= mask_ratio < 1:
        _check.fail(op, "mask_ratio", mask_ratio, "a number in [0, 1)")
    keep = num_visible(num_patches, mask_ratio)
    if keep == 0:
        _check.fail(
            op, "mask_ratio", mask_ratio, f"at most {1 - 1 / num_patches:.4g} for {num_patches} patches",
            "no patch would be visible: lower mask_ratio or use more patches",
        )  # fmt: skip
    return keep


def _reference(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    return ids_shuffle, ids_restore, (ids_restore >= keep).float()


def _fill_reference(noise: Tensor, keep: int, ids_shuffle: Tensor, ids_restore: Tensor, mask: Tensor) -> None:
    for out, value in zip((ids_shuffle, ids_restore, mask), _reference(noise, keep)):
        out.copy_(value)


_MULTIPLIERS, _WEYL, _WORD = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10: four random words from a counter of four words and a key of two.

    Args:
        counter, key: int64 tensors that broadcast, each holding a 32-bit word: 0 <= word < 2^32.

    Returns:
        Four int64 tensors of such words.
    """

    def product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
        # By halves of the word: the whole product does not fit int64.
        high, low = (word >> 16) * factor, (word & 0xFFFF) * factor
        return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD

    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        (upper0, lower0), (upper2, lower2) = product(c0, _MULTIPLIERS[0]), product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = upper2 ^ c1 ^ k0, lower2, upper0 ^ c3 ^ k1, lower0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def uniforms(keys: Tensor, num_patches: int) -> Tensor:
    """The noise that `random_masking` makes of keys: [B, L] float32 multiples of 2^-24 in [0, 1) for keys [B] int64."""
    patch = torch.arange(num_patches, device=keys.device)
    zero = torch.zeros_like(patch)
    words = philox((patch, zero, zero, zero), (keys[:, None] & _WORD, (keys[:, None] >> 32) & _WORD))
    return (words[0] >> 8).float() * 2.0**-24


def _fill_from_keys(keys: Tensor, keep: int, ids_shuffle: Tensor, ids_restore: Tensor, mask: Tensor) -> None:
    _fill_reference(uniforms(keys, mask.shape[1]), keep, ids_shuffle, ids_restore, mask)


_TRITON = "fastkd.ops.masked.random_masking_triton"
kernel = Kernel(OP, reference=_fill_reference, triton=f"{_TRITON}:random_masking", cuda=True)
keyed_kernel = Kernel(
    "random_masking_keyed", reference=_fill_from_keys, triton=f"{_TRITON}:random_masking_keyed", cuda=True
)


def _outputs(batch: int, patches: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    ids_shuffle = torch.empty((batch, patches), dtype=torch.int64, device=device)
    mask = torch.empty((batch, patches), dtype=torch.float32, device=device)
    return ids_shuffle, torch.empty_like(ids_shuffle), mask


@custom_op("random_masking")
def _op(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(*noise.shape, noise.device)
    kernel(noise, keep, *outputs)
    return outputs


@_op.register_fake
def _(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(*noise.shape, noise.device)


@custom_op("random_masking_keyed")
def _keyed_op(keys: Tensor, patches: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(keys.shape[0], patches, keys.device)
    keyed_kernel(keys, keep, *outputs)
    return outputs


@_keyed_op.register_fake
def _(keys: Tensor, patches: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(keys.shape[0], patches, keys.device)


def random_masking(
    batch: int,
    num_patches: int,
    mask_ratio: float,
    *,
    noise: Tensor | None = None,
    keys: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Masking:
    """Draws, per image, which patches stay visible.

    Args:
        batch: images B.
        num_patches: patches L per image.
        mask_ratio: share of masked patches in [0, 1); ``int(L * (1 - mask_ratio))`` patches stay visible.
        noise: optional [B, L] floating tensor that fixes the permutation; ascending noise is the shuffled order.
        keys: optional [B] int64 tensor that fixes it: image b gets the noise that Philox makes of ``keys[b]``, the
            same on every device and in every batch (see `uniforms`).
        generator: source of the noise where neither is given.
        device: device of the result; default that of `noise` or `keys`, else the current default device.

    Returns:
        `Masking` (ids_keep, ids_restore, mask, ids_shuffle).

    Raises:
        ValueError: mask_ratio outside [0, 1), no patch visible, noise or keys of another shape, or both of them.
    """
    keep = visible_patches(OP, num_patches, mask_ratio)
    if keys is not None:
        if noise is not None:
            _check.fail(OP, "keys", "keys and noise", "one of them", "both fix the permutation")
        _check.check_tensor(OP, "keys", keys, 1, (torch.int64,))
        _check.check_shape(OP, "keys", keys, (batch,), "(batch,)")
        keys = keys if device is None else keys.to(device)
        ids_shuffle, ids_restore, mask = _keyed_op(keys, num_patches, keep)
        return Masking(ids_shuffle[:, :keep], ids_restore, mask, ids_shuffle)
    if noise is None:
        noise = torch.rand(batch, num_patches, generator=generator, device=device)
    else:
        _check.check_tensor(OP, "noise", noise, 2)
        _check.check_shape(OP, "noise", noise, (batch, num_patches), "(batch, num_patches)")
        noise = noise.detach() if device is None else noise.detach().to(device)
    return ordered_masking(noise, keep)


def ordered_masking(noise: Tensor, keep: int) -> Masking:
    """Masks from any order: the `keep` patches of least noise [B, L] are visible."""
    ids_shuffle, ids_restore, mask = _op(noise, keep)
    return Masking(ids_shuffle[:, :keep], ids_restore, mask, ids_shuffle)


def _reference_masking(batch, num_patches, mask_ratio, *, noise=None, keys=None) -> Masking:
    keep = num_visible(num_patches, mask_ratio)
    noise = uniforms(keys, num_patches) if noise is None else noise
    ids_shuffle, ids_restore, mask = _reference(noise, keep)
    return Masking(ids_shuffle[:, :keep], ids_restore, mask, ids_shuffle)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    batch, patches = case["batch"], case["patches"]
    random = torch.Generator().manual_seed(case.get("seed", 0))
    sizes = dict(batch=batch, num_patches=patches, mask_ratio=case["ratio"])
    if case.get("keys"):
        return sizes | dict(keys=torch.randint(-(2**63), 2**63 - 1, (batch,), generator=random).to(device))
    noise = torch.rand(batch, patches, generator=random)
    if case.get("ties"):
        noise = (noise * 4).floor()
    if case.get("strided"):
        noise = noise.t().contiguous().t()
    return sizes | dict(noise=noise.to(device, dtype))


def _law(kwargs: dict) -> None:
    """The mask counts L - n, ids_shuffle is a permutation and ids_restore its inverse."""
    result = random_masking(**kwargs)
    patches, keep = kwargs["num_patches"], result.ids_keep.shape[1]
    assert (result.mask.sum(1) == patches - keep).all()
    order = torch.arange(patches, device=result.mask.device).expand_as(result.ids_restore)
    assert torch.equal(result.ids_shuffle.sort(1).values, order)
    assert torch.equal(result.ids_shuffle.gather(1, result.ids_restore), order)


def _bytes_moved(kwargs: dict) -> int:
    outputs = kwargs["batch"] * kwargs["num_patches"] * (8 + 8 + 4)
    return tensor_bytes(kwargs.get("noise"), kwargs.get("keys")) + outputs


def _flops(kwargs: dict) -> int:
    """Compares, and ten rounds of four multiplications and six other integer operations where noise is drawn."""
    patches = kwargs["batch"] * kwargs["num_patches"]
    return patches * (kwargs["num_patches"] * 3 + (100 if "keys" in kwargs else 0))


SPEC = register(
    OpSpec(
        name=OP,
        function=random_masking,
        reference=_reference_masking,
        kernels=(kernel, keyed_kernel),
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
            "keys": dict(batch=3, patches=196, ratio=0.75, keys=True),
            "keys_odd": dict(batch=2, patches=37, ratio=0.6, keys=True),
            "keys_one_patch": dict(batch=1, patches=1, ratio=0.0, keys=True),
        },
        space=dict(
            batch=(1, 2, 5), patches=(1, 2, 15, 16, 17, 64, 100), ratio=(0.0, 0.25, 0.5, 0.75), ties=(False, True),
            strided=(False, True), keys=(False, True), seed=tuple(range(5)),
        ),
        bench={
            "vit_90": dict(batch=128, patches=196, ratio=0.9),
            "vit_90_keys": dict(batch=128, patches=196, ratio=0.9, keys=True),
        },
        bytes_moved=_bytes_moved,
        flops=_flops,
        golden="dmae_random_masking",
        law=_law,
    )
)  # fmt: skip
