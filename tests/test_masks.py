"""Masks drawn from keys: Philox as published, the same bits in every backend, and uniform noise."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of

from fastkd.ops import random_masking
from fastkd.ops.masked.random_masking import philox, uniforms

# Counter, key and result of philox4x32-10 in the known-answer file of Random123.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[torch.Tensor]:
    return [torch.tensor(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize("counter, key, result", KNOWN)
def test_philox_gives_the_known_answers(counter, key, result):
    assert philox(words(counter), words(key)) == words(result)


def test_noise_of_key_zero_is_the_first_word_of_the_known_answer():
    assert uniforms(torch.zeros(1, dtype=torch.int64), 3)[0, 0] == (0x6627E8D5 >> 8) / 2**24


def test_every_backend_draws_the_same_masks(each_backend):
    keys = torch.tensor([0, -1, 1, 2**63 - 1, -(2**63), 0x299F31D0A4093822], device=device_of(each_backend))
    masking = random_masking(len(keys), 300, 0.75, keys=keys)
    want = torch.argsort(uniforms(keys, 300), dim=1, stable=True)
    assert torch.equal(masking.ids_shuffle, want)
    alone = random_masking(1, 300, 0.75, keys=keys[3:4])
    assert torch.equal(alone.ids_shuffle, want[3:4])


# Patches 8 and 47 of this key draw the same 24 bits (found by search).
TIE = 892


def test_patches_with_equal_noise_keep_their_order(each_backend):
    keys = torch.tensor([TIE], device=device_of(each_backend))
    noise = uniforms(keys, 196)[0]
    first, second = [patch for patch in range(196) if (noise == noise[patch]).sum() == 2]
    ids = random_masking(1, 196, 0.5, keys=keys).ids_restore[0]
    assert ids[second] == ids[first] + 1


def test_noise_is_uniform_and_keys_are_independent():
    noise = uniforms(torch.arange(2000), 49)
    assert noise.min() >= 0 and noise.max() < 1
    counts = torch.histc(noise, 16, 0, 1)
    expected = noise.numel() / 16
    assert ((counts - expected).square() / expected).sum() < 45  # chi-square of 15 degrees of freedom: p < 1e-4
    assert torch.corrcoef(noise.T)[~torch.eye(49, dtype=torch.bool)].abs().max() < 0.12
    visible = random_masking(2000, 49, 0.75, keys=torch.arange(2000)).mask.eq(0).float().mean(0)
    assert (visible - 12 / 49).abs().max() < 0.05


def test_keys_are_checked():
    keys = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="random_masking: keys: got keys and noise, expected one of them"):
        random_masking(2, 4, 0.5, keys=keys, noise=torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"keys: got shape \(2,\), expected \(3,\)"):
        random_masking(3, 4, 0.5, keys=keys)
    with pytest.raises(TypeError, match="keys: got float32, expected int64"):
        random_masking(2, 4, 0.5, keys=torch.zeros(2))
