"""MaskAlign as a whole: exact savings against the plain formula, teachers of other packages, what is trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain_dmae import encode, linear, norm
from torch import nn

from fastkd.methods import DMAE, MaskAlign
from fastkd.models import MaskedAutoencoderViT, VisionTransformer
from fastkd.models.intact import CLIP_MEAN, CLIP_STD, IntactTeacher
from fastkd.train.optimizer import param_groups

SHAPE = dict(img_size=(12, 16), patch_size=4, in_chans=3, num_heads=2)  # 3 x 4 patches
OUR_STATISTICS = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
THEIR_STATISTICS = dict(mean=(0.5, 0.5, 0.3), std=(0.25, 0.5, 0.5))


def scrambled(model: nn.Module) -> nn.Module:
    """Every parameter away from its start, so that biases and norms count."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=random)
    return model


def vit(width: int, depth: int = 3, seed: int = 0, **options) -> VisionTransformer:
    torch.manual_seed(seed)
    return scrambled(VisionTransformer(embed_dim=width, depth=depth, **{**SHAPE, **options}))


def pictures(batch: int = 2) -> torch.Tensor:
    random = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (batch, 12, 16, 3), dtype=torch.uint8, generator=random)


def normalized(images: torch.Tensor, mean, std) -> torch.Tensor:
    images = images.double() / 255
    return ((images - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)


def scores(parameters: dict, x: torch.Tensor, heads: int) -> torch.Tensor:
    """All attention of the last block, whose input is x: [B, heads, T, T]."""
    name = f"blocks.{sum(key.endswith('norm1.weight') for key in parameters) - 1}"
    qkv = linear(parameters, f"{name}.attn.qkv", norm(parameters, f"{name}.norm1", x))
    q, k, _ = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


def plain_maskalign(method: MaskAlign, teacher: VisionTransformer, images: torch.Tensor, noise: torch.Tensor):
    """The formula with no saving at all: every layer is stacked, mixed, projected, whitened; explicit attention."""
    heads = SHAPE["num_heads"]
    theirs = {name: value.double() for name, value in teacher.state_dict().items()}
    ours = dict(method.student.named_parameters())
    count = method.student.num_patches
    everything = torch.arange(count).expand(len(images), -1)
    with torch.no_grad():
        hidden, _ = encode(theirs, normalized(images, **THEIR_STATISTICS), everything, heads, teacher.depth)
        importance = scores(theirs, hidden[-2], heads).mean(1)[:, 0, 1:]
    order = noise.argsort(1)
    if method.mask == "attention":
        order = (importance / -torch.log1p(-noise)).argsort(1, descending=True)
    keep = order[:, : int(count * (1 - method.mask_ratio))]
    states, _ = encode(ours, normalized(images, **OUR_STATISTICS), keep, heads, method.student.depth)
    mixed = torch.einsum("ab,bntd->antd", method.align.align_weights, torch.stack(states))
    losses = []
    for index, state in enumerate(hidden):
        target = F.layer_norm(state, state.shape[-1:], eps=1e-5)
        rows = target[:, 1:].gather(1, keep[:, :, None].expand(-1, -1, target.shape[2]))
        if str(index) in method.align.heads:
            head = dict(method.align.heads[str(index)].named_parameters(prefix="head"))
            predicted = linear(head, "head", mixed[index])
            losses.append(2 * F.smooth_l1_loss(predicted, torch.cat([target[:, :1], rows], 1)))
    weights = torch.tensor(method.align.weights, dtype=torch.float64)
    return (weights * torch.stack(losses)).sum(), keep


@pytest.mark.parametrize("layer_weights", ["top2", "out", "mid0"])
@pytest.mark.parametrize("mask", ["attention", "random"])
def test_equals_the_plain_formula_with_its_gradients(mask, layer_weights):
    teacher = vit(16, seed=1, **THEIR_STATISTICS).double()
    student = vit(8, seed=2, **OUR_STATISTICS)
    method = MaskAlign(student, teacher, mask=mask, layer_weights=layer_weights).double()
    method.teacher.tower.model.load_state_dict(teacher.state_dict(), strict=False)  # load_vit rounds to float32
    images, noise = pictures(), torch.rand(2, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    result = method(images, noise=noise)
    want, keep = plain_maskalign(method, teacher, images, noise)
    assert torch.equal(result["mask"], torch.ones(2, 12).scatter(1, keep, 0))
    # The student embeds pixels with statistics folded into float32 numbers.
    torch.testing.assert_close(result["loss"], want, rtol=1e-6, atol=0)
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    got, expected = (torch.autograd.grad(value, list(trained.values())) for value in (result["loss"], want))
    largest = max(grad.abs().max() for grad in expected)
    for name, mine, theirs in zip(trained, got, expected):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-7 * largest, name
    for name, parameter in student.named_parameters():  # everything that is trained has a gradient in the formula
        assert parameter.requires_grad == (name != "pos_embed" and not name.startswith("norm.")), name


def test_the_teacher_ends_where_nothing_more_is_needed():
    def last_block(**options) -> int:
        return MaskAlign(vit(8), vit(16), **options).teacher.tower.model.depth

    assert last_block(mask="random", layer_weights="mid0") == 1
    assert last_block(mask="attention", layer_weights="mid0") == 3
    assert last_block(mask="random", layer_weights="top2") == 3


def test_importance_alone_does_not_run_the_rest_of_the_last_block():
    method = MaskAlign(vit(8), vit(16), mask="attention", layer_weights="mid1")
    last = method.teacher.tower.model.blocks[-1]
    last.mlp.fc1.weight.data.fill_(float("nan"))
    assert method(pictures())["loss"].isfinite()


def test_floating_images_carry_the_students_statistics():
    method = MaskAlign(vit(8, **OUR_STATISTICS), vit(16, seed=1, **THEIR_STATISTICS), layer_weights="top2")
    images, noise = pictures(), torch.rand(2, 12, generator=torch.Generator().manual_seed(3))
    want = method(images, noise=noise)["loss"]
    got = method(normalized(images, **OUR_STATISTICS).float(), noise=noise)["loss"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def test_keys_fix_the_masks():
    method = MaskAlign(vit(8), vit(16), layer_weights="top2")
    keys = torch.tensor([5, 5])
    same = pictures()[:1].repeat(2, 1, 1, 1)
    for mask in ("attention", "random"):
        method.mask = mask
        first, second = method(same, keys=keys)["mask"]
        assert torch.equal(first, second) and first.sum() == 9
        different = method(same, keys=torch.tensor([5, 6]))["mask"]
        assert torch.equal(different[0], first) and not torch.equal(different[1], first)


def test_what_is_trained_and_saved():
    method = MaskAlign(vit(8), vit(16), layer_weights="top2")
    assert {name.split(".")[0] for name in method.state_dict()} == {"student", "align"}
    decayed, plain = ({id(p) for p in group["params"]} for group in param_groups(method, 0.05))
    assert id(method.align.align_weights) in plain and id(method.align.heads["2"].weight) in decayed
    assert id(method.student.cls_token) in decayed and id(method.student.norm.weight) not in decayed | plain
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(5):
        result = method(pictures(), noise=torch.full((2, 12), 0.5))
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses.append(result["loss"].item())
    assert losses[-1] < losses[0]
    assert method.double().teacher.tower.model.blocks[0].attn.qkv.weight.dtype == torch.float64
    assert not method.train().teacher.training and not method.teacher.tower.model.training


def test_an_encoder_is_taken_from_a_masked_autoencoder():
    torch.manual_seed(0)
    mae = MaskedAutoencoderViT(embed_dim=8, depth=3, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, **SHAPE)
    method = MaskAlign(mae, vit(16), layer_weights="top2")
    assert type(method.student) is VisionTransformer
    for name, parameter in method.student.named_parameters():
        assert parameter.data_ptr() == mae.get_parameter(name).data_ptr()
    assert DMAE(mae, None).student is mae  # and the autoencoder is whole


def test_registers_and_missing_class_tokens_meet_nothing():
    noise = torch.rand(2, 12, generator=torch.Generator().manual_seed(3))
    with_registers = MaskAlign(vit(8, reg_tokens=2), vit(16, reg_tokens=3), mask="random", layer_weights="top2")
    seen = []
    with_registers.align.heads["2"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    assert with_registers(pictures(), noise=noise)["loss"].isfinite()
    no_class = MaskAlign(vit(8), vit(16, class_token=False), mask="random", layer_weights="top2")
    no_class.align.heads["2"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    assert no_class(pictures(), noise=noise)["loss"].isfinite()
    assert seen == [1 + 3, 3]  # int(12 * 0.3) patches


def test_stochastic_depth_keeps_the_expectation_and_ends_with_training():
    student = vit(8, depth=2)
    student.set_drop_path(0.5)
    assert [block.drop_path for block in student.blocks] == [0, 0.5]
    torch.manual_seed(0)
    block, branch = student.blocks[1], torch.ones(4000, 1, 1)
    dropped = block._drop(branch)
    assert torch.equal(block.eval()._drop(branch), branch)
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and abs(dropped.mean() - 1) < 0.06
    with pytest.raises(ValueError, match="rate: got 1"):
        student.set_drop_path(1)


def test_clip_of_transformers_as_teacher():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    clip = scrambled(transformers.CLIPVisionModel(config)).eval()
    teacher = IntactTeacher(clip, (3, 4))  # from 4 x 4 patches
    assert teacher.img_size == (24, 32) and teacher.num_layers == 3 and teacher.mean == CLIP_MEAN
    images = pictures()
    view = teacher(images, (1, 2), True)
    pixels = normalized(images, CLIP_MEAN, CLIP_STD).float()
    pixels = F.interpolate(pixels, (24, 32), mode="bicubic", align_corners=False)
    with torch.no_grad():
        want = clip(pixels, interpolate_pos_encoding=True, output_hidden_states=True, output_attentions=True)
    for index in (1, 2):
        torch.testing.assert_close(view.features[index], want.hidden_states[index + 1])
    torch.testing.assert_close(view.importance, want.attentions[-1].mean(1)[:, 0, 1:])
    method = MaskAlign(vit(8), clip, layer_weights="top2")
    assert method(images)["loss"].isfinite() and not any(p.requires_grad for p in clip.parameters())


@pytest.mark.parametrize("pre_norm", [False, True])
def test_timm_teachers_with_and_without_a_norm_before_the_blocks(pre_norm):
    timm = pytest.importorskip("timm")
    images = pictures()
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=(12, 16), patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=0, pre_norm=pre_norm
    )
    model = scrambled(model).eval()
    teacher = IntactTeacher(model)
    view = teacher(images, (0, 2), True)
    caught = {}
    attention = model.blocks[2].attn
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda module, inputs, output: caught.update(scores=output))
    for index in (0, 2):
        hook = lambda module, inputs, output, index=index: caught.update({index: output})  # noqa: E731
        model.blocks[index].register_forward_hook(hook)
    with torch.no_grad():
        model(normalized(images, teacher.mean, teacher.std).float())
    for index in (0, 2):
        torch.testing.assert_close(view.features[index], caught[index], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(view.importance, caught["scores"].mean(1)[:, 0, 1:], rtol=1e-4, atol=1e-6)


def test_another_patch_size_than_the_teachers():
    """The picture is resized so that both have the same grid."""
    method = MaskAlign(vit(8), vit(16, img_size=(10, 10), patch_size=2), layer_weights="top2")
    assert method.teacher.img_size == (6, 8) and method(pictures())["loss"].isfinite()


def test_compiles_whole_and_runs_under_autocast():
    method = MaskAlign(vit(8), vit(16), layer_weights="top2")
    images, noise = pictures(), torch.rand(2, 12, generator=torch.Generator().manual_seed(3))
    want = method(images, noise=noise)["loss"]
    torch._dynamo.reset()
    compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
    got = compiled(images, noise=noise)["loss"]
    torch.testing.assert_close(got, want)
    got.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        low = method(images, noise=noise)["loss"]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, want, rtol=0.05, atol=0)


ERRORS = {
    "student": (lambda: MaskAlign(nn.Linear(2, 2), vit(16)), TypeError, "student: got Linear"),
    "mask": (lambda: MaskAlign(vit(8), vit(16), mask="block"), ValueError, "mask: got 'block'"),
    "norm": (lambda: MaskAlign(vit(8), vit(16), target_norm="batch"), ValueError, "target_norm: got 'batch'"),
    "ratio": (lambda: MaskAlign(vit(8), vit(16), 0.99), ValueError, "no patch would be visible"),
    "too many layers": (lambda: MaskAlign(vit(8), vit(16)), ValueError, "'top5', expected top1 to top3"),
    "depth": (lambda: MaskAlign(vit(8, depth=2), vit(16)), ValueError, "use fusion='sum'"),
    "class token": (lambda: MaskAlign(vit(8), vit(16, class_token=False)), ValueError, "without CLS token"),
    "grid": (
        lambda: MaskAlign(vit(8), IntactTeacher(vit(16, img_size=16))), ValueError, r"IntactTeacher\(source, stud",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call, error, match", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()
