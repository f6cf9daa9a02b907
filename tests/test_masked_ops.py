"""visible_patch_embed and decoder_assemble beyond their OpSpecs: plain formulas, autocast, constants, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import backends_of, device_of

from fastkd.ops import SPECS, backend, decoder_assemble, random_masking, visible_patch_embed

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
each_embed_backend = pytest.mark.parametrize("name", backends_of(SPECS["visible_patch_embed"]))
each_assemble_backend = pytest.mark.parametrize("name", backends_of(SPECS["decoder_assemble"]))
wide_backends = pytest.mark.parametrize(
    "name", [n for n in backends_of(SPECS["visible_patch_embed"]) if n in ("reference", "cpp")]
)


def embed_arguments(device="cpu", **changes) -> dict:
    """2 images of 8 x 12 pixels, patches of 4 x 4 (L = 6), n = 3, D = 16, one prefix row."""
    random = torch.Generator().manual_seed(1)
    given = dict(
        images=torch.randn(2, 3, 8, 12, generator=random),
        ids_keep=torch.tensor([[4, 0, 3], [1, 5, 2]]),
        weight=torch.randn(16, 3, 4, 4, generator=random) / 7,
        bias=torch.randn(16, generator=random),
        pos_embed=torch.randn(6, 16, generator=random),
        prefix=torch.randn(1, 16, generator=random),
    )
    given = {name: tensor.to(device) for name, tensor in given.items()}
    return given | changes


def assemble_arguments(device="cpu", **changes) -> dict:
    """2 images, L = 6, n = 2 visible, 5 patches to decode, D = 16, one prefix row."""
    random = torch.Generator().manual_seed(2)
    given = dict(
        tokens=torch.randn(2, 3, 16, generator=random),
        fill=torch.randn(1, 16, generator=random),
        pos_embed=torch.randn(7, 16, generator=random),
        ids=torch.tensor([[4, 0, 3, 1, 2], [1, 5, 2, 0, 4]]),
    )
    given = {name: tensor.to(device) for name, tensor in given.items()}
    return given | changes


def gradients(output, *tensors):
    upstream = torch.linspace(-1, 2, output.numel(), device=output.device).view_as(output).to(output.dtype)
    return torch.autograd.grad(output, tensors, upstream)


@wide_backends
def test_uint8_embedding_is_the_convolution_of_the_normalised_image(name):
    pixels = torch.randint(0, 256, (3, 10, 21, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 0], [1, 5], [4, 2]])
    weight, bias, table, prefix = (torch.randn(*s).double() for s in ((9, 3, 5, 7), (9,), (6, 9), (2, 9)))
    for tensor in (weight, bias, prefix):
        tensor.requires_grad_()
    normal = (pixels.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    maps = F.conv2d(normal.permute(0, 3, 1, 2), weight, bias, stride=(5, 7)).flatten(2).mT + table
    plain = torch.cat((prefix.expand(3, -1, -1), maps.gather(1, ids[:, :, None].expand(-1, -1, 9))), 1)
    mean, std = torch.tensor(MEAN).double().tolist(), torch.tensor(STD).double().tolist()
    with backend(name):
        ours = visible_patch_embed(pixels, ids, weight, bias, table, prefix, mean=mean, std=std)
        pairs = zip((ours, *gradients(ours, weight, bias, prefix)), (plain, *gradients(plain, weight, bias, prefix)))
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@each_embed_backend
@pytest.mark.parametrize("layout", ["channels_last", "cropped", "every_second", "uint8_planes"])
def test_embedding_of_strided_images(name, layout):
    given = embed_arguments(device_of(name))
    images = given["images"]
    if layout == "channels_last":
        view = images.contiguous(memory_format=torch.channels_last)
    elif layout == "cropped":
        view = F.pad(images, (3, 2, 1, 4), value=float("nan"))[:, :, 1:9, 3:15]
    elif layout == "every_second":
        view = images.repeat_interleave(2, 3)[..., ::2]
    else:  # uint8 [B, H, W, C] whose memory is planar
        images = (images.clamp(-1, 1) * 127 + 128).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        view = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    given["weight"].requires_grad_()
    with backend(name):
        results = [visible_patch_embed(**given | dict(images=i)) for i in (images, view)]
        weights = [gradients(result, given["weight"])[0] for result in results]
    assert view.stride() != images.stride()
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*weights)


@each_embed_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embedding_under_autocast(name, dtype):
    """Weights are cast, gradients come back in float32; positions, images and results are those of an explicit cast."""
    device = device_of(name)
    given = embed_arguments(device)
    trained = [given[n].requires_grad_() for n in ("weight", "bias", "prefix")]
    with backend(name):
        with torch.autocast(device, dtype):
            ours = visible_patch_embed(**given)
        got = gradients(ours, *trained)
        plain = visible_patch_embed(**given | {n: given[n].to(dtype) for n in ("weight", "bias", "prefix")})
        want = gradients(plain, *trained)
    assert ours.dtype == dtype and torch.equal(ours, plain)
    for g, w in zip(got, want):
        assert g.dtype == torch.float32 and torch.equal(g, w)


@wide_backends
def test_double_precision_is_left_alone_by_autocast(name):
    given = {n: t.double() if t.is_floating_point() else t for n, t in embed_arguments().items()}
    with backend(name):
        plain = visible_patch_embed(**given)
        with torch.autocast("cpu", torch.bfloat16):
            ours = visible_patch_embed(**given)
    assert ours.dtype == torch.float64 and torch.equal(ours, plain)


def test_matrix_products_ignore_an_autocast_around_backward():
    given = embed_arguments()
    given["weight"].requires_grad_()
    output = visible_patch_embed(**given)
    (plain,) = torch.autograd.grad(output.sum(), given["weight"], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (ours,) = torch.autograd.grad(output.sum(), given["weight"])
    assert torch.equal(ours, plain)


@each_embed_backend
def test_positions_are_added_in_float32(name):
    """bfloat16 has 8 bits: 1 + 2^-8 would round to 1 before the bias of -1 is added."""
    given = embed_arguments(device_of(name))
    zero, table = torch.zeros_like(given["weight"]).bfloat16(), torch.full_like(given["pos_embed"], 1 + 2**-8)
    minus = torch.full_like(given["bias"], -1).bfloat16()
    with backend(name):
        result = visible_patch_embed(**given | dict(weight=zero, bias=minus, pos_embed=table, prefix=None))
    assert result.dtype == torch.bfloat16 and (result == 2**-8).all()


@each_embed_backend
def test_no_position_table_adds_nothing(name):
    given = embed_arguments(device_of(name))
    with backend(name):
        without = visible_patch_embed(**given | dict(pos_embed=None))
        zero = visible_patch_embed(**given | dict(pos_embed=torch.zeros_like(given["pos_embed"])))
    assert torch.equal(without, zero)


@each_assemble_backend
def test_assembly_is_the_published_decoder_input_in_another_order(name):
    """Append mask tokens, un-shuffle with ids_restore, put the class token back in front, add positions."""
    device = device_of(name)
    masking = random_masking(3, 10, 0.7, generator=torch.Generator().manual_seed(4))
    ids_shuffle, restore = masking.ids_shuffle.to(device), masking.ids_restore.to(device)
    random = torch.Generator().manual_seed(5)
    tokens, fill, table = (torch.randn(s, generator=random).to(device) for s in ((3, 4, 8), (1, 8), (11, 8)))
    tokens.requires_grad_(), fill.requires_grad_()
    patches = torch.cat((tokens[:, 1:], fill.expand(3, 7, 8)), 1)
    patches = patches.gather(1, restore[:, :, None].expand(-1, -1, 8))
    published = torch.cat((tokens[:, :1], patches), 1) + table
    with backend(name):
        ours = decoder_assemble(tokens, fill, table, ids_shuffle)
        order = torch.cat((torch.zeros_like(restore[:, :1]), restore + 1), 1)
        ours = ours.gather(1, order[:, :, None].expand(-1, -1, 8))
        got = gradients(ours, tokens, fill)
    assert torch.equal(ours, published)
    for g, w in zip(got, gradients(published, tokens, fill)):
        torch.testing.assert_close(g, w)


@each_assemble_backend
def test_a_row_per_patch_equals_one_row_when_they_are_alike(name):
    given = assemble_arguments(device_of(name))
    one = given["fill"].requires_grad_()
    rows = one.detach().repeat(6, 1).requires_grad_()
    with backend(name):
        plain, ours = decoder_assemble(**given), decoder_assemble(**given | dict(fill=rows))
        (want,), (got,) = gradients(plain, one), gradients(ours, rows)
    assert torch.equal(ours, plain)
    torch.testing.assert_close(got.sum(0, keepdim=True), want)
    assert got[5].abs().max() == 0 and got[3].abs().max() > 0  # patch 5 is visible or not decoded in every image


@each_assemble_backend
def test_a_float32_fill_row_loses_nothing_under_bfloat16_tokens(name):
    """1 + 2^-9 is 1 in bfloat16: only a sum in float32 leaves 2^-9 after the position of -1 is added."""
    given = assemble_arguments(device_of(name))
    fill = torch.full_like(given["fill"], 1 + 2**-9, requires_grad=True)
    table = torch.full_like(given["pos_embed"], -1)
    with backend(name):
        ours = decoder_assemble(given["tokens"].bfloat16(), fill, table, given["ids"])
        (got,) = gradients(ours, fill)
    assert ours.dtype == torch.bfloat16 and (ours[:, 3:] == 2**-9).all()
    upstream = torch.linspace(-1, 2, ours.numel(), device=ours.device).view_as(ours).bfloat16()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[0], upstream[:, 3:].float().sum((0, 1)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("per_patch", [False, True])
def test_sums_have_the_same_bits_for_any_number_of_threads(per_patch, several_threads):
    if "cpp" not in backends_of(SPECS["decoder_assemble"]):
        pytest.skip("no native CPU library")
    random = torch.Generator().manual_seed(6)
    ids = torch.rand(70, 20, generator=random).argsort(1)
    fill = torch.randn(20 if per_patch else 1, 33, generator=random, requires_grad=True)
    tokens = torch.randn(70, 6, 33, generator=random)
    pixels = torch.randint(0, 256, (70, 10, 8, 3), dtype=torch.uint8, generator=random)
    bias = torch.randn(33, generator=random, requires_grad=True)
    weight = torch.randn(33, 3, 2, 2, generator=random)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with backend("cpp"):
            (sums,) = gradients(decoder_assemble(tokens, fill, None, ids), fill)
            found.append((sums, *gradients(visible_patch_embed(pixels, ids[:, :5], weight, bias, None), bias)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_patch_ids_outside_the_image_are_refused_on_the_cpu(several_threads):
    if "cpp" not in backends_of(SPECS["decoder_assemble"]):
        pytest.skip("no native CPU library")
    for bad in (-1, 6):
        ids = torch.full((2, 5), bad)
        with backend("cpp"):
            with pytest.raises(RuntimeError, match=rf"patch id {bad} outside \[0, 6\)"):
                visible_patch_embed(**embed_arguments(ids_keep=ids))
            with pytest.raises(RuntimeError, match=rf"patch id {bad} outside \[0, 6\)"):
                decoder_assemble(**assemble_arguments(ids=ids))


WRONG_EMBED = {
    "images": (dict(images=torch.zeros(2, 3, 8, 13)), ValueError, "8 x 13 pixels, expected multiples of the patch"),
    "ids dtype": (dict(ids_keep=torch.zeros(2, 3)), TypeError, "ids_keep: got float32, expected int64"),
    "ids batch": (dict(ids_keep=torch.zeros(3, 3).long()), ValueError, r"ids_keep: got .*\(3, 3\), expected \(2, 3\)"),
    "no ids": (dict(ids_keep=torch.zeros(2, 0).long()), ValueError, "expected at least one patch; lower mask_ratio"),
    "channels": (dict(weight=torch.zeros(16, 1, 4, 4)), ValueError, r"weight: got shape .*, expected \(16, 3, 4, 4\)"),
    "weight dtype": (dict(weight=torch.zeros(16, 3, 4, 4).int()), TypeError, "weight: got int32, expected float32"),
    "bias": (dict(bias=torch.zeros(8)), ValueError, r"bias: got shape \(8,\), expected \(16,\)"),
    "positions": (dict(pos_embed=torch.zeros(7, 16)), ValueError, r"pos_embed: got .*\(7, 16\), expected \(6, 16\)"),
    "prefix": (dict(prefix=torch.zeros(1, 1, 16)), ValueError, "prefix: got shape .*, expected 2 dimensions"),
    "mean": (dict(mean=[0.5]), ValueError, r"mean: got 1 values, expected one per channel \(3\)"),
    "std": (dict(std=[1.0, 0.0, 1.0]), ValueError, "std: got .*, expected positive numbers"),
    "device": (dict(prefix=torch.zeros(1, 16, device="meta")), ValueError, "prefix: got device meta, expected cpu"),
    "not a tensor": (dict(bias=[0.0] * 16), TypeError, "bias: got list, expected a torch.Tensor"),
    "image gradient": (dict(images=torch.zeros(2, 3, 8, 12, requires_grad=True)), ValueError, "images: .* grad"),
    "position gradient": (
        dict(pos_embed=torch.zeros(6, 16, requires_grad=True)), ValueError,
        r"pos_embed: .*requires grad.* add pos_embed\[ids_keep\] to the result",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_EMBED)
def test_embedding_refuses(case):
    changes, error, message = WRONG_EMBED[case]
    with pytest.raises(error, match=f"visible_patch_embed: .*{message}"):
        visible_patch_embed(**embed_arguments(**changes))


WRONG_ASSEMBLY = {
    "tokens": (dict(tokens=torch.zeros(2, 16)), ValueError, "tokens: got shape .*, expected 3 dimensions"),
    "prefix": (dict(num_prefix=4), ValueError, "num_prefix: got 4, expected 0 to 3"),
    "ids dtype": (dict(ids=torch.zeros(2, 5).int()), TypeError, "ids: got int32, expected int64"),
    "ids batch": (dict(ids=torch.zeros(1, 5).long()), ValueError, r"ids: got shape \(1, 5\), expected \(2, 5\)"),
    "few ids": (dict(ids=torch.zeros(2, 1).long()), ValueError, "ids: got 1 patches an image, expected the 2 visible"),
    "fill width": (dict(fill=torch.zeros(1, 8)), ValueError, r"fill: got shape \(1, 8\), expected \(1, 16\)"),
    "fill rows": (dict(fill=torch.zeros(5, 16)), ValueError, "fill: got 5 rows, expected 1 or L = 6"),
    "fill rows alone": (
        dict(fill=torch.zeros(4, 16), pos_embed=None), ValueError, "fill: got 4 rows, expected 1 or L, at least 5",
    ),
    "positions": (dict(pos_embed=torch.zeros(5, 16)), ValueError, r"pos_embed: got 5 rows, expected 1 \+ L, L at"),
    "position width": (dict(pos_embed=torch.zeros(7, 8)), ValueError, r"pos_embed: got .*\(7, 8\), expected \(7, 16\)"),
    "position gradient": (dict(pos_embed=torch.zeros(7, 16, requires_grad=True)), ValueError, "pos_embed: .* grad"),
    "device": (dict(fill=torch.zeros(1, 16, device="meta")), ValueError, "fill: got device meta, expected cpu"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_ASSEMBLY)
def test_assembly_refuses(case):
    changes, error, message = WRONG_ASSEMBLY[case]
    with pytest.raises(error, match=f"decoder_assemble: .*{message}"):
        decoder_assemble(**assemble_arguments(**changes))
