"""ema_update_ beyond its OpSpec: golden file, lists of unlike tensors, memory orders, alpha as a tensor, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import device_of, dtypes_of
from golden_files import Golden, find

from fastkd.ops import SPECS, ema_update_

pytestmark = pytest.mark.usefixtures("each_backend")


def tensors(shapes, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def expected(averaged, current, alpha):
    return [(alpha * a.double() + (1 - alpha) * c.double()).to(a.dtype) for a, c in zip(averaged, current)]


@pytest.mark.parametrize("file", [pytest.param(f, id=f"golden-{f.stem}") for f in find("mic_ema")])
def test_golden_ema(file: Golden, each_backend):
    for dtype in {torch.float64, torch.float32} & set(dtypes_of(each_backend)):
        for index, step in enumerate(file["iters"].tolist()):
            averaged = file.tensor(f"ema_before_{index}", dtype, device_of(each_backend))
            current = file.tensor(f"student_{index}", dtype, device_of(each_backend))
            ema_update_([averaged], [current], min(1 - 1 / (step + 1), file.option("alpha")))  # alpha 0 copies
            file.check(f"ema_after_{index}", averaged, dtype)


def test_unlike_tensors_in_one_call(each_backend):
    """Scalars, empty ones, unaligned views, channels_last and transposed weights, 16-bit ones beside float32 ones."""
    device = device_of(each_backend)
    shapes = [(), (0, 3), (7,), (5, 3), (2, 3, 4, 5), (20_000,), (4, 6), (33,)]
    averaged, current = ([t.to(device) for t in tensors(shapes, seed)] for seed in (0, 1))
    averaged[2] = torch.arange(9.0, device=device)[2:]
    averaged[3] = averaged[3].T.contiguous().T
    averaged[4] = averaged[4].to(memory_format=torch.channels_last)
    current[6] = current[6].T.contiguous().T
    averaged[7], current[7] = averaged[7].bfloat16(), current[7].half()
    beside = torch.full((8,), 3.0, device=device)
    averaged.append(beside[::2])
    current.append(torch.ones(4, device=device))
    want = expected(averaged, current, 0.75)
    places = [t.data_ptr() for t in averaged]
    ema_update_(averaged, current, 0.75)
    for got, value in zip(averaged, want):
        tolerance = dict(rtol=1e-2, atol=1e-2) if got.dtype == torch.bfloat16 else dict(rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got, value, **tolerance)
    assert [t.data_ptr() for t in averaged] == places and (beside[1::2] == 3).all()


def test_of_a_model_over_several_steps(each_backend):
    """As a mean teacher uses it: parameters that require grad, other values at the same addresses every step."""
    student = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 5))
    student = student.to(device_of(each_backend))
    teacher = copy.deepcopy(student)
    want = [p.detach().double() for p in teacher.parameters()]
    for step in range(4):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        alpha = min(1 - 1 / (step + 1), 0.7)
        ema_update_(list(teacher.parameters()), list(student.parameters()), alpha)
        want = [alpha * a + (1 - alpha) * p.detach().double() for a, p in zip(want, student.parameters())]
    for got, value in zip(teacher.parameters(), want):
        assert got.requires_grad and got.grad_fn is None
        torch.testing.assert_close(got.detach().double(), value, rtol=1e-5, atol=1e-6)


def test_alpha_as_a_tensor(each_backend):
    device = device_of(each_backend)
    averaged, current = ([t.to(device) for t in tensors([(40,), (3, 3)], seed)] for seed in (0, 1))
    want = expected(averaged, current, 0.9)
    ema_update_(averaged, current, torch.tensor(0.9, dtype=torch.float64, device=device))
    for got, value in zip(averaged, want):
        torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-6)


def test_autograd_sees_the_change(each_backend):
    weight, current = torch.ones(3, device=device_of(each_backend)), torch.zeros(3, device=device_of(each_backend))
    x = torch.ones(3, device=weight.device, requires_grad=True)
    product = (x * weight).sum()
    ema_update_([weight], [current], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_float32_averages_of_bfloat16_weights_move_by_less_than_a_rounding_of_theirs():
    averaged, current = torch.ones(100), torch.full((100,), 1.0078125, dtype=torch.bfloat16)  # the next one
    for _ in range(10):
        ema_update_([averaged], [current], 0.999)
    want = 1 + (1 - 0.999**10) * 0.0078125
    torch.testing.assert_close(averaged, torch.full((100,), want), rtol=3e-7, atol=0)


def test_an_empty_list_is_fine():
    assert ema_update_([], [], 0.9) is None


ERRORS = {
    "lengths": ([torch.ones(2)], [], 0.9, ValueError, "current: got 0 tensors, expected 1"),
    "shape": ([torch.ones(2)], [torch.ones(2, 1)], 0.9, ValueError, r"current\[0\]: got shape \(2, 1\)"),
    "counter": ([torch.ones(2).long()], [torch.ones(2).long()], 0.9, TypeError, r"averaged\[0\]: got int64"),
    "number": ([torch.ones(2)], [3.0], 0.9, TypeError, r"current\[0\]: got float"),
    "float64": ([torch.ones(2)], [torch.ones(2).double()], 0.9, TypeError, "float64 on both sides"),
    "alpha": ([torch.ones(2)], [torch.ones(2)], 1.5, ValueError, "alpha: got 1.5"),
    "alpha shape": ([torch.ones(2)], [torch.ones(2)], torch.ones(2), ValueError, "alpha: got shape"),
}


@pytest.mark.parametrize("averaged, current, alpha, error, match", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(averaged, current, alpha, error, match):
    with pytest.raises(error, match=match):
        ema_update_(averaged, current, alpha)
    assert SPECS["ema_update_"].name in str(pytest.raises(error, ema_update_, averaged, current, alpha).value)
