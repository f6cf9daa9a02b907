"""ScaleKD on tiny timm models of every family: tails, what learns, what stays frozen, compile, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

timm = pytest.importorskip("timm", reason="timm is not installed")
from timm.models import beit, convnext, mlp_mixer, resnet, swin_transformer, vision_transformer  # noqa: E402

from fastkd import ops  # noqa: E402
from fastkd.methods import ScaleKD  # noqa: E402
from fastkd.methods.scalekd import FEATURE_LOSSES, ScaleKDLosses  # noqa: E402
from fastkd.models.stages import as_map, as_tokens, late_stages, tail_of  # noqa: E402
from fastkd.models.taps import Taps  # noqa: E402

SIDE, CLASSES = 64, 5
PLAIN = dict(img_size=SIDE, patch_size=16, embed_dim=24, depth=4, num_heads=2, num_classes=CLASSES)


def swin():
    return swin_transformer.SwinTransformer(
        img_size=SIDE, embed_dim=8, depths=(1, 1, 2, 2), num_heads=(1, 2, 2, 4), window_size=2, num_classes=CLASSES
    )


def vit(**options):
    return vision_transformer.VisionTransformer(**(PLAIN | options))


MODELS = {
    "swin": swin,
    "vit": vit,
    "vit_pooled": lambda: vit(class_token=False, global_pool="avg"),
    "beit": lambda: beit.Beit(**PLAIN, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
    "beit_shared": lambda: beit.Beit(**PLAIN, use_shared_rel_pos_bias=True, init_values=0.1),
    "resnet": lambda: resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), channels=(4, 8, 12, 16), num_classes=CLASSES),
    "convnext": lambda: convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 8, 12, 16), num_classes=CLASSES),
    "mobilenet": lambda: timm.create_model("mobilenetv3_small_050", num_classes=CLASSES),
    "mixer": lambda: mlp_mixer.MlpMixer(
        img_size=SIDE, patch_size=16, num_blocks=4, embed_dim=16, num_classes=CLASSES
    ),
}  # fmt: skip
STUDENTS, TEACHERS = ("resnet", "mixer", "vit"), ("swin", "vit", "beit")
PAIRS = [(s, t) for s in STUDENTS for t in TEACHERS] + [("convnext", "swin"), ("mobilenet", "vit"), ("swin", "beit")]


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]()


def method(student="resnet", teacher="vit", **options) -> ScaleKD:
    pair = make(student), make(teacher, 1)
    torch.manual_seed(2)
    return ScaleKD(*pair, **options).train()


def batch(count=2):
    random = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, SIDE, SIDE, generator=random), torch.arange(count)


@pytest.mark.parametrize("name", ["swin", "vit", "vit_pooled", "beit", "beit_shared"])
def test_a_tail_continues_its_own_model(name):
    model = make(name).eval()
    tail = tail_of(model)
    with torch.no_grad():
        entry, exit = Taps(model, (tail.entry, tail.exit))(batch()[0]).features
        tokens, prefix, _ = as_tokens(entry, model)
        torch.testing.assert_close(tail(tokens, prefix), tail.finish(as_tokens(exit, model)[0]))


def test_tokens_of_a_pooling_vit_are_normalised():
    model = make("vit_pooled").eval()
    assert tail_of(model).finish is not None and isinstance(model.norm, nn.Identity)
    tokens = torch.randn(2, 16, 24) * 7
    torch.testing.assert_close(tail_of(model).finish(tokens), model.fc_norm(tokens))


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_student_and_projectors_learn_and_the_teacher_stays(student, teacher):
    model = method(student, teacher)
    frozen = copy.deepcopy(model.teacher.model.state_dict())
    images, target = batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        result = model(images, target)
        assert set(model.losses) <= set(result) and all(
            torch.isfinite(result[n]) and result[n] > 0 for n in model.losses
        )
        optimizer.zero_grad()
        result["loss"].backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert all(p.grad is None and not p.requires_grad for p in model.teacher.model.parameters())
        optimizer.step()
    assert not model.teacher.model.training
    for name, value in model.teacher.model.state_dict().items():
        assert torch.equal(value, frozen[name]), name


@pytest.mark.parametrize("teacher", ["swin", "vit"])
def test_the_losses_are_those_of_the_formula(teacher):
    """Written out view by view: no batching of views, no prepared target."""
    model = method("resnet", teacher).eval()  # BatchNorm would see other batches
    images, target = batch()
    result = model(images, target)
    losses, tail, big = model.features, tail_of(model.teacher.model), model.teacher.model
    logits, stages = Taps(model.student, late_stages(model.student))(images)
    x3, x4 = (as_map(x, model.student) for x in stages)
    with torch.no_grad():
        taught, (entry, exit) = Taps(big, (tail.entry, tail.exit))(images)
        prefix, goal = as_tokens(entry, big)[1], as_tokens(exit, big)[0]
    want = {}
    for index, view in enumerate(("plain", "alt")):
        g3 = tail(losses.stage3[view](x3), prefix)
        p4 = losses.stage4[view](x4, g3)
        p4 = tail(p4, prefix) if teacher == "vit" else p4
        want[f"{view}_3"], want[f"{view}_4"] = (ops.dual_view_loss(x, goal)[index] for x in (g3, p4))
    soft = -(taught.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    entropy = -(taught.softmax(1) * taught.log_softmax(1)).sum(1).mean()
    want["logit_loss"] = 0.5 * F.cross_entropy(logits, target) + 0.5 * (soft - entropy)
    want["loss"] = sum(want.values())
    for name in model.losses:
        torch.testing.assert_close(result[name], want[name], rtol=1e-4, atol=1e-5)


def test_the_query_of_stage_4_is_not_detached():
    model = method()
    result = model(*batch())
    (gradient,) = torch.autograd.grad(result["plain_4"], model.features.stage3["plain"].proj.weight)
    assert gradient.abs().sum() > 0


def test_without_perception_and_without_the_alternative_view():
    plain = method(perception=False)
    result = plain(*batch())
    assert result["plain_3"] == result["alt_3"] == 0 < result["plain_4"] and not plain.features.stage3
    assert plain.features.stage4["plain"].query is not None
    single = method(alpha=(0.08, 0))
    result = single(*batch())
    assert result["alt_3"] == result["alt_4"] == 0 < result["plain_3"] and list(single.features.stage4) == ["plain"]
    for model, seen in ((plain, plain(*batch())), (single, result)):
        seen["loss"].backward()
        assert all(p.grad is not None for p in model.parameters())


def test_uint8_images_reach_both_sides_with_their_own_statistics():
    model = method()
    model.mean, model.std = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)
    model.eval()
    pixels = torch.randint(0, 256, (2, SIDE, SIDE, 3), dtype=torch.uint8)
    floating = ((pixels / 255 - torch.tensor(model.mean)) / torch.tensor(model.std)).permute(0, 3, 1, 2)
    for name, value in model(pixels, torch.arange(2)).items():
        torch.testing.assert_close(value, model(floating, torch.arange(2))[name], rtol=1e-4, atol=1e-5)


def test_state_holds_student_and_projectors_alone():
    model = method()
    assert {name.split(".")[0] for name in model.state_dict()} == {"student", "features"}
    other = method()
    for parameter in other.parameters():
        nn.init.constant_(parameter, 0.1)
    other.load_state_dict(model.state_dict())
    images, target = batch()
    torch.testing.assert_close(other.eval()(images, target), model.eval()(images, target))
    assert {name.split(".")[0] for name in model.training_state()} == {"features"}


def test_autocast_is_near_float32():
    model = method("vit", "swin").eval()
    exact = model(*batch())
    with torch.autocast("cpu", torch.bfloat16):
        near = model(*batch())
    near["loss"].backward()
    for name in model.losses:
        assert near[name].dtype == torch.float32
        torch.testing.assert_close(near[name], exact[name], rtol=0.05, atol=0.05)


def test_gradient_checkpointing_changes_nothing():
    model = method("vit", "vit")
    images, target = batch()
    gradients = []
    for on in (False, True):
        model.student.set_grad_checkpointing(on)
        model.zero_grad()
        model(images, target)["loss"].backward()
        gradients.append([p.grad.clone() for p in model.student.parameters()])
    for plain, again in zip(*gradients):
        torch.testing.assert_close(again, plain)


def test_the_loss_part_compiles_in_one_graph():
    model = method("resnet", "vit").eval()
    images = batch()[0]
    stages = [
        as_map(x, model.student).detach() for x in Taps(model.student, late_stages(model.student))(images).features
    ]
    _, (entry, exit) = model.teacher(images)
    goal, prefix = as_tokens(exit, model.teacher.model)[0], as_tokens(entry, model.teacher.model)[1]
    torch._dynamo.reset()
    compiled = torch.compile(model.features, backend="aot_eager", fullgraph=True)
    got, want = compiled(*stages, goal, prefix), model.features(*stages, goal, prefix)
    for name in FEATURE_LOSSES:
        torch.testing.assert_close(got[name], want[name])
    sum(got.values()).backward()
    assert all(p.grad is not None for p in model.features.parameters() if p.requires_grad)


def test_other_networks_by_taps_and_a_tail_of_their_own():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.Conv2d(6, 12, 2, 2), nn.Flatten(), nn.Linear(192, CLASSES))
    student = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, 8, 2, 2), nn.Flatten(), nn.Linear(128, CLASSES))

    def tail(tokens):
        return teacher[1](tokens.transpose(1, 2).unflatten(2, (8, 8))).flatten(2).transpose(1, 2)

    taps = {"student": ("0", "1"), "teacher": ("0", "1")}
    model = ScaleKD(student, teacher, taps=taps, teacher_tail=tail, img_size=SIDE)
    result = model(*batch())
    result["loss"].backward()
    assert result["alt_3"] > 0 and all(p.grad is not None for p in model.parameters())
    assert teacher[1].weight.grad is None and not model.features.tail_again


def test_loss_module_alone_takes_any_tail():
    losses = ScaleKDLosses(
        ((6, (4, 4)), (8, (2, 2))), (16, (4, 4)), (16, (2, 2)), lambda x: x[:, ::4], num_heads=(2, 4)
    )
    found = losses(torch.randn(3, 6, 4, 4), torch.randn(3, 8, 2, 2), torch.randn(3, 4, 16))
    assert list(found) == list(FEATURE_LOSSES) and all(value.ndim == 0 for value in found.values())


ERRORS = {
    "three taps": (lambda: method(taps={"student": (0, 1, 2)}), "taps: got 3 places in the student"),
    "tail without places": (lambda: method(teacher_tail=lambda x: x), "taps: got 0 places in the teacher"),
    "places without tail": (lambda: method(taps={"teacher": (0, 1)}), "expected none without teacher_tail"),
    "unknown teacher": (lambda: method("vit", "resnet"), "its last stage is not known here.*teacher_tail"),
    "unknown student": (lambda: ScaleKD(nn.Linear(2, 2), make("vit")), "does not say where its stages end"),
    "too many blocks": (lambda: method(tail_blocks=4), "tail_blocks: got 4, expected 1 to 3"),
    "classes": (
        lambda: ScaleKD(make("resnet"), vit(num_classes=7))(*batch()),
        r"teacher: got logits \(2, 7\), expected \(2, 5\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong, match", ERRORS.values(), ids=ERRORS)
def test_errors_say_what_to_do(wrong, match):
    with pytest.raises(ValueError, match=match):
        wrong()
