"""class_vector_kd beyond its OpSpec: the norm floor, both forms of the teacher, upstream gradients, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of

from fastkd.nn import ClassVectorKDLoss
from fastkd.ops import class_vector_kd


@pytest.fixture
def features(each_backend):
    """Student and teacher features [4, 12], class vectors [7, 12]; random, fixed."""
    random = torch.Generator().manual_seed(3)
    student, teacher, text = (torch.randn(n, 12, generator=random).to(device_of(each_backend)) for n in (4, 4, 7))
    return student.requires_grad_(), F.normalize(text, dim=1), teacher


def plain(student, text, teacher, scale, teacher_scale, temperature):
    s, t = scale * F.normalize(student, dim=1) @ text.t(), teacher_scale * F.normalize(teacher, dim=1) @ text.t()
    log_q, log_p = (s / temperature).log_softmax(1), (t / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def test_is_torchs_divergence_of_cosines(features):
    student, text, teacher = features
    options = dict(logit_scale=30.0, teacher_logit_scale=10.0, temperature=2.0)
    theirs = plain(student, text, teacher, 30.0, 10.0, 2.0)
    ours = class_vector_kd(student, text, teacher_feature=teacher, reduction="batchmean", **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    want = torch.autograd.grad(-4.0 * theirs, student)[0]
    torch.testing.assert_close(torch.autograd.grad(-4.0 * ours, student)[0], want, rtol=1e-4, atol=1e-6)
    elements = class_vector_kd(student, text, teacher_feature=teacher, weight=7.0, **options)
    torch.testing.assert_close(elements, theirs, rtol=1e-5, atol=1e-6)  # weight / C of the batch mean


def test_stored_logits_equal_features(features):
    student, text, teacher = features
    logits = 50.0 * F.normalize(teacher, dim=1) @ text.t()
    stored = class_vector_kd(student, text, teacher_logits=logits)
    torch.testing.assert_close(
        stored, class_vector_kd(student, text, teacher_feature=teacher, teacher_logit_scale=50.0), rtol=1e-5, atol=1e-6
    )


def test_below_the_norm_floor_the_divisor_is_constant(features):
    student, text, teacher = features
    with torch.no_grad():
        student[1] = torch.linspace(-1e-13, 1e-13, 12)
        student[2] = 0
    got = class_vector_kd(student, text, teacher_feature=teacher, reduction="batchmean")
    want = plain(student, text, teacher, 100.0, 100.0, 1.0)  # F.normalize has the same floor
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got, want = (torch.autograd.grad(loss, student)[0] for loss in (got, want))
    torch.testing.assert_close(got[1:3], want[1:3], rtol=1e-3, atol=0)
    torch.testing.assert_close(got[::3], want[::3], rtol=1e-3, atol=1e-5)


def test_logits_of_a_hundred_stay_finite_in_bfloat16(features):
    student, text, teacher = (t.detach().bfloat16() for t in features)
    student[0] = text[3]
    teacher[0] = -text[3]
    student.requires_grad_()
    loss = class_vector_kd(student, text, teacher_feature=teacher)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_module_passes_its_options_on(features):
    student, text, teacher = features
    module = ClassVectorKDLoss(logit_scale=10.0, temperature=2.0, weight=3.0)
    want = class_vector_kd(student, text, teacher_feature=teacher, logit_scale=10.0, temperature=2.0, weight=3.0)
    assert torch.equal(module(student, text, teacher), want)
    assert "weight=3.0" in repr(module) and not list(module.parameters())


A, W = torch.ones(3, 4), torch.ones(5, 4)
ERRORS = {
    "no teacher": (dict(), ValueError, "got neither of it and teacher_logits"),
    "two teachers": (dict(teacher_feature=A, teacher_logits=torch.ones(3, 5)), ValueError, "got both"),
    "width": (dict(text_features=torch.ones(5, 6), teacher_feature=A), ValueError, "text_features: got shape"),
    "teacher width": (dict(teacher_feature=torch.ones(3, 6)), ValueError, "teacher_feature: got shape"),
    "classes": (dict(teacher_logits=torch.ones(3, 6)), ValueError, "teacher_logits: got shape"),
    "trained teacher": (dict(teacher_feature=torch.ones(3, 4, requires_grad=True)), ValueError, "pass it detached"),
    "trained vectors": (dict(text_features=torch.ones(5, 4, requires_grad=True), teacher_feature=A), ValueError,
                        "stored once"),
    "temperature": (dict(teacher_feature=A, temperature=0.0), ValueError, "temperature: got 0.0"),
    "scale": (dict(teacher_feature=A, logit_scale=-1.0), ValueError, "logit_scale: got -1.0"),
    "reduction": (dict(teacher_feature=A, reduction="mean"), ValueError, "reduction: got 'mean'"),
    "empty": (dict(student_feature=A[:0], teacher_feature=A[:0]), ValueError, "at least one of each"),
}  # fmt: skip


@pytest.mark.parametrize("kwargs, error, match", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(kwargs, error, match):
    with pytest.raises(error, match=match):
        class_vector_kd(**{"student_feature": A, "text_features": W, **kwargs})
