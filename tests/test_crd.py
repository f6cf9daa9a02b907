"""CRDLoss: banks and normalisers over several steps, checkpoints, draws, autocast, errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from fastkd.nn import CRDLoss
from fastkd.ops import crd_nce_loss, crd_normaliser

N_DATA, K, WIDTH = 30, 12, 8


def module(seed=0, **options) -> CRDLoss:
    torch.manual_seed(seed)
    return CRDLoss(6, 9, N_DATA, WIDTH, **(dict(nce_k=K) | options))


def batch(seed):
    random = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(4, 6, generator=random), torch.randn(4, 9, generator=random)
    index = torch.randperm(N_DATA, generator=random)[:4]
    contrast = torch.cat([index[:, None], torch.randint(N_DATA, (4, K), generator=random)], 1)
    return student, teacher, index, contrast


class Plain:
    """The formula in single steps, in float64."""

    def __init__(self, crd: CRDLoss) -> None:
        self.crd = copy.deepcopy(crd).double()
        self.banks = [self.crd.memory_s.clone(), self.crd.memory_t.clone()]
        self.z = [None, None]

    def __call__(self, student, teacher, index, contrast):
        s = F.normalize(self.crd.embed_s(student.double()))
        t = F.normalize(self.crd.embed_t(teacher.double()))
        total, noise = 0.0, K / N_DATA
        for side, (f, bank) in enumerate(((s, self.banks[1]), (t, self.banks[0]))):
            scores = torch.exp(torch.einsum("nkd,nd->nk", bank[contrast], f) / self.crd.temperature)
            if self.z[side] is None:
                self.z[side] = scores.mean().item() * N_DATA
            x = scores / self.z[side]
            positive = torch.log(x[:, 0] / (x[:, 0] + noise + 1e-7))
            negative = torch.log(noise / (x[:, 1:] + noise + 1e-7))
            total = total - (positive.sum() + negative.sum()) / len(index)
        for bank, f in zip(self.banks, (s, t)):
            bank[index] = F.normalize(self.crd.momentum * bank[index] + (1 - self.crd.momentum) * f.detach())
        return total


def test_several_steps_against_the_plain_formula():
    crd = module(momentum=0.7)
    plain = Plain(crd)
    for step in range(4):
        student, teacher, index, contrast = batch(step)
        student.requires_grad_()
        exact = student.detach().double().requires_grad_()
        got, want = crd(student, teacher, index, contrast), plain(exact, teacher, index, contrast)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
        got_grads = torch.autograd.grad(got, [student, *crd.parameters()])
        want_grads = torch.autograd.grad(want, [exact, *plain.crd.parameters()])
        for a, b in zip(got_grads, want_grads):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
        for a, b in zip((crd.memory_s, crd.memory_t), plain.banks):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
        assert crd.z_s.item() == pytest.approx(plain.z[0], rel=1e-5)
        assert crd.z_t.item() == pytest.approx(plain.z[1], rel=1e-5)


def test_only_the_rows_of_the_batch_are_written_and_not_in_evaluation():
    crd, (student, teacher, index, contrast) = module(), batch(0)
    before = crd.memory_s.clone()
    crd(student, teacher, index, contrast)
    others = torch.ones(N_DATA, dtype=torch.bool)
    others[index] = False
    assert torch.equal(crd.memory_s[others], before[others]) and not torch.equal(crd.memory_s[index], before[index])
    after = crd.memory_s.clone()
    crd.eval()(student, teacher, index, contrast)
    assert torch.equal(crd.memory_s, after)


def test_a_checkpoint_brings_back_banks_and_normalisers():
    crd = module()
    crd(*batch(0))
    other = module(seed=1)
    other.load_state_dict(crd.state_dict())
    assert torch.equal(other(*batch(1)), crd(*batch(1)))
    assert torch.equal(other.z_s, crd.z_s) and torch.equal(other.memory_t, crd.memory_t)
    fresh = module(seed=2)
    fresh.load_state_dict(module().state_dict())  # of before the first batch
    fresh(*batch(3))
    assert fresh.z_s > 0 and fresh.z_t > 0


def test_negatives_are_drawn_from_the_generator_and_the_first_is_the_sample():
    student, teacher, index, _ = batch(0)
    losses = [module()(student, teacher, index, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    draws = torch.randint(N_DATA, (4, K + 1), generator=torch.Generator().manual_seed(5))
    draws[:, 0] = index
    assert torch.equal(module()(student, teacher, index, draws), losses[0])


def test_no_gradient_reaches_banks_or_normalisers():
    crd, (student, teacher, index, contrast) = module(), batch(0)
    crd(student.requires_grad_(), teacher, index, contrast).backward()
    assert {name for name, p in crd.named_parameters() if p.grad is not None} == {
        "embed_s.weight", "embed_s.bias", "embed_t.weight", "embed_t.bias",
    }  # fmt: skip
    assert not any(buffer.requires_grad for buffer in crd.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_16_bit_features(dtype):
    student, teacher, index, contrast = batch(0)
    want = module()(student, teacher, index, contrast)
    with torch.autocast("cpu", dtype):
        got = module()(student.to(dtype), teacher.to(dtype), index, contrast)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=3e-2, atol=0)


def test_a_bank_in_16_bits(each_backend):
    """As a bfloat16 bank holds the same numbers rounded, so must the loss be that of the rounded bank."""
    if each_backend == "cuda":
        pytest.skip("no CUDA C++ kernel is written for it")
    crd, (_, _, _, contrast) = module(), batch(0)
    feature, bank = F.normalize(torch.randn(4, WIDTH)), F.normalize(crd.memory_t).bfloat16()
    got = crd_nce_loss(feature, bank, contrast, torch.tensor(40.0))
    torch.testing.assert_close(got, crd_nce_loss(feature, bank.float(), contrast, torch.tensor(40.0)))


def test_the_normaliser_is_the_mean_score():
    _, _, _, contrast = batch(0)
    feature, bank = F.normalize(torch.randn(4, WIDTH)), F.normalize(torch.randn(N_DATA, WIDTH))
    scores = torch.exp(torch.einsum("nkd,nd->nk", bank[contrast], feature) / 0.07)
    torch.testing.assert_close(crd_normaliser(feature, bank, contrast), scores.mean() * N_DATA, rtol=1e-5, atol=0)


def test_scores_beyond_the_range_of_float32():
    """exp(1 / 0.002) overflows; the loss of a perfect positive and opposite negatives is known."""
    feature = torch.tensor([[1.0, 0.0]], requires_grad=True)
    bank = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = crd_nce_loss(feature, bank, torch.tensor([[0, 1, 1]]), torch.tensor(1.0), 0.002, eps=0.0)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    swapped = crd_nce_loss(feature, bank, torch.tensor([[1, 0, 0]]), torch.tensor(1.0), 0.002, eps=0.0)
    assert swapped.item() == pytest.approx(3 * 500 + math.log(1.0), rel=1e-5)
    assert torch.autograd.grad(swapped, feature)[0].isfinite().all()


def test_errors():
    crd, (student, teacher, index, contrast) = module(), batch(0)
    with pytest.raises(ValueError, match="teacher: got a tensor that requires grad"):
        crd(student, teacher.clone().requires_grad_(), index, contrast)
    with pytest.raises(ValueError, match=r"student: got shape \(4, 5\)"):
        crd(student[:, 1:], teacher, index, contrast)
    with pytest.raises(TypeError, match="index: got int32"):
        crd(student, teacher, index.int(), contrast)
    with pytest.raises(ValueError, match=r"contrast_index: got shape \(4, 1\)"):
        crd(student, teacher, index, contrast[:, :1])
    with pytest.raises(ValueError, match="temperature: got 0"):
        module(temperature=0)
    with pytest.raises(ValueError, match="bank: got a tensor that requires grad"):
        crd_nce_loss(student, crd.embed_s.weight, contrast, torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="outside the bank|out of bounds|out of range"):
        crd_nce_loss(torch.ones(1, 3), torch.ones(5, 3), torch.tensor([[0, 5]]), torch.tensor(1.0))
