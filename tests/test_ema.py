"""The mean teacher: warm-up, statistics, modes, wrappers, state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastkd.models.ema import EMATeacher


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)
    )


def changed(model: nn.Module, by: float) -> nn.Module:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(by) if tensor.is_floating_point() else tensor.add_(3)
    return model


def test_warmup_copies_first_and_never_exceeds_alpha():
    teacher = EMATeacher(network(), alpha=0.9)
    assert [teacher.share(step) for step in (0, 1, 3, 9, 10_000)] == [0, 0.5, 0.75, 0.9, 0.9]
    assert EMATeacher(network(), alpha=0.9, warmup=False).share(0) == 0.9
    student = network(1)
    teacher.update(student, 0)
    assert all(torch.equal(a, b) for a, b in zip(teacher.model.parameters(), student.parameters()))


@pytest.mark.parametrize("rule", ["keep", "copy", "ema"])
def test_buffers_of_detection_are_averaged_and_others_not(rule):
    student = network()
    teacher = EMATeacher(student, alpha=0.75, warmup=False, buffers=rule, mode="eval")
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    teacher.update(changed(student, 1.0), 7)
    for name, value in teacher.model.state_dict().items():
        is_buffer, step = "running" in name or "num_batches" in name, 0.25
        if is_buffer:
            step = {"keep": 0.0, "copy": 1.0, "ema": 0.25}[rule]
        if name.endswith("num_batches_tracked"):
            assert value == before[name] + (0 if rule == "keep" else 3)
        else:
            torch.testing.assert_close(value, before[name] + step, rtol=1e-6, atol=1e-6)


def test_train_mode_uses_statistics_of_the_batch_without_dropout():
    student = network()
    teacher = EMATeacher(student)
    images = 5 + torch.randn(8, 1, 6, 6)
    teacher.train()  # a module around it may call this
    first, second = teacher(images), teacher(images)
    assert torch.equal(first, second) and not first.requires_grad  # no dropout
    student.eval()
    student[1].train()
    torch.testing.assert_close(first, student(images).detach())
    assert teacher.model[1].running_mean.abs().max() > 0 and teacher.model[1].num_batches_tracked == 2
    still = EMATeacher(network(), mode="eval")
    still(images)
    assert still.model[1].num_batches_tracked == 0
    assert not torch.allclose(still(images), first)


def test_the_student_in_a_wrapper_is_found():
    student = network()
    compiled = torch.compile(student, backend="eager")
    teacher = EMATeacher(compiled, alpha=0.5, warmup=False)
    assert type(teacher.model) is nn.Sequential
    changed(student, 1.0)
    teacher.update(compiled, 0)
    torch.testing.assert_close(teacher.model[0].bias, student[0].bias - 0.5)


def test_state_survives():
    teacher, other = EMATeacher(network(0)), EMATeacher(network(1))
    other.load_state_dict(teacher.state_dict())
    assert torch.equal(other.model[0].weight, teacher.model[0].weight)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"alpha: got 1.0, expected a number in \[0, 1\)"):
        EMATeacher(network(), alpha=1.0)
    with pytest.raises(ValueError, match="buffers: got 'average'"):
        EMATeacher(network(), buffers="average")
    with pytest.raises(ValueError, match="mode: got 'test'"):
        EMATeacher(network(), mode="test")
    with pytest.raises(ValueError, match="another set of parameters"):
        EMATeacher(network()).update(nn.Sequential(nn.Conv2d(1, 4, 3)), 0)
    wide = network()
    wide[4] = nn.Conv2d(4, 3, 1)
    with pytest.raises(ValueError, match=r"parameter 4.weight of shape \(3, 4, 1, 1\)"):
        EMATeacher(network()).update(wide, 0)
