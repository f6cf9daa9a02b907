"""What no golden file pins down: batch-wide means, ties, masked-only predictions, uint8 pixels, loss weights."""

from __future__ import annotations

import plain_dmae
import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS_HERE, device_of, prefer

from fastkd import ops
from fastkd.methods.dmae import DMAE
from fastkd.models.mae import MaskedAutoencoderViT, mae_vit
from fastkd.models.teacher import Teacher
from fastkd.models.vit import VisionTransformer

MEAN, STD = (0.4, 0.5, 0.45), (0.2, 0.25, 0.3)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.cpu().float(), want.cpu().float(), rtol=1e-5, atol=1e-6)


def test_pixel_loss_is_a_mean_over_the_batch_not_over_images(each_backend):
    """One masked patch in image 0, three in image 1: all four count alike."""
    device = device_of(each_backend)
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 1]]).float()
    pred, images = rand(2, 4, 12, seed=1), rand(2, 3, 4, 4, seed=2)
    error = (pred - ops.patchify(images, 2)).square().mean(-1)
    loss = ops.masked_pixel_loss(pred.to(device), images.to(device), mask.to(device), 2)
    close(loss, error[mask.bool()].sum() / 4)
    assert abs(loss.item() - ((error * mask).sum(1) / mask.sum(1)).mean().item()) > 1e-3


@pytest.mark.parametrize("norm_pix", [False, True])
def test_predictions_of_masked_patches_alone(each_backend, norm_pix):
    """[B, M, P] with ids gives the loss and the gradient of [B, L, P] with the mask, in any order of the ids."""
    device = device_of(each_backend)
    images = rand(3, 3, 8, 12, seed=3).to(device)
    masking = ops.random_masking(3, 6, 0.5, noise=rand(3, 6).to(device))
    full = rand(3, 6, 48, seed=4).to(device).requires_grad_()
    ids = masking.ids_masked.flip(1)
    few = full.detach().gather(1, ids[:, :, None].expand(-1, -1, 48)).requires_grad_()
    by_mask = ops.masked_pixel_loss(full, images, masking.mask, 4, norm_pix)
    by_ids = ops.masked_pixel_loss(few, images, ids, 4, norm_pix)
    close(by_ids, by_mask)
    (wide,) = torch.autograd.grad(3 * by_mask, full)
    (narrow,) = torch.autograd.grad(3 * by_ids, few)
    close(wide.gather(1, ids[:, :, None].expand(-1, -1, 48)), narrow)
    assert wide[masking.mask == 0].abs().max() == 0


def test_ties_in_the_noise_go_to_the_lower_patch(each_backend):
    noise = torch.tensor([[0.5, 0.5, 0.1, 0.5], [0.0, 0.0, 0.0, 0.0]]).to(device_of(each_backend))
    masking = ops.random_masking(2, 4, 0.5, noise=noise)
    assert masking.ids_shuffle.tolist() == [[2, 0, 1, 3], [0, 1, 2, 3]]
    assert masking.mask.tolist() == [[0, 1, 0, 1], [0, 0, 1, 1]]


def test_infinite_and_missing_noise_sorts_last(each_backend):
    noise = torch.tensor([[float("nan"), -1.0, float("inf"), 0.0, -float("inf")]]).to(device_of(each_backend))
    masking = ops.random_masking(1, 5, 0.4, noise=noise)
    assert masking.ids_keep.tolist() == [[4, 1, 3]]
    assert sorted(masking.ids_masked[0].tolist()) == [0, 2]


@pytest.mark.parametrize("name", BACKENDS_HERE)
def test_uint8_pixels_are_divided_by_255_and_normalised(name):
    device = device_of(name)
    pixels = (rand(2, 8, 8, 3, seed=5) * 256).to(torch.uint8)
    normal = (pixels.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    normal, pixels = normal.permute(0, 3, 1, 2).contiguous().to(device), pixels.to(device)
    pred, ids = rand(2, 3, 48, seed=6).to(device), torch.tensor([[0, 3, 1], [2, 1, 3]]).to(device)
    weight, bias, table = rand(8, 3, 4, 4, seed=7).to(device), rand(8).to(device), rand(4, 8, seed=8).to(device)
    plain = F.conv2d(normal, weight, bias, stride=4).flatten(2).transpose(1, 2) + table
    with prefer(name):
        for norm_pix in (False, True):
            folded = ops.masked_pixel_loss(pred, pixels, ids, 4, norm_pix, mean=MEAN, std=STD)
            close(folded, ops.masked_pixel_loss(pred, normal, ids, 4, norm_pix))
        folded = ops.visible_patch_embed(pixels, ids, weight, bias, table, mean=MEAN, std=STD)
        close(folded, plain.gather(1, ids[:, :, None].expand(-1, -1, 8)))


def tiny(**options) -> MaskedAutoencoderViT:
    sizes = dict(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2)
    return MaskedAutoencoderViT(**sizes | dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2) | options)


def distiller(alpha: float = 1.0, blocks=((1,), (2,)), **teacher_options) -> DMAE:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=3)
    student = tiny()
    return DMAE(student, Teacher(vit, blocks[1], **teacher_options), *blocks, alpha=alpha)


def test_alpha_weighs_the_alignment_loss_in_value_and_gradient():
    images, noise = rand(2, 3, 16, 16), rand(2, 16)
    gradients = {}
    for alpha in (0.0, 1.0, 7.0):
        model = distiller(alpha)
        result = model(images, 0.75, noise)
        close(result["loss"], result["pixel_loss"] + alpha * result["align_loss"])
        result["loss"].backward()
        gradients[alpha] = model.student.blocks[0].mlp.fc1.weight.grad
    step = gradients[1.0] - gradients[0.0]
    assert step.abs().max() > 1e-5
    torch.testing.assert_close(gradients[7.0] - gradients[0.0], 7 * step, rtol=1e-3, atol=1e-6)


def test_losses_of_several_pairs_add_up():
    images, noise = rand(2, 3, 16, 16), rand(2, 16)
    both = distiller(blocks=((0, 2), (1, 3)))
    single = []
    for k, (ours, theirs) in enumerate(((0, 1), (2, 3))):
        model = distiller(blocks=((ours,), (theirs,)))
        model.aligned_feature_projection_heads[0].load_state_dict(both.aligned_feature_projection_heads[k].state_dict())
        single.append(model(images, 0.75, noise)["align_loss"])
    close(both(images, 0.75, noise)["align_loss"], sum(single))


def test_the_teacher_sees_pixels_with_its_own_statistics():
    """uint8 images, and floating ones that are normalised for the student, mean the same to the teacher."""
    model = distiller(mean=MEAN, std=STD)
    pixels = (rand(2, 16, 16, 3, seed=9) * 256).to(torch.uint8)
    ids = torch.arange(16).expand(2, -1)
    student = model.student
    for_student = (pixels.float() / 255 - torch.tensor(student.mean)) / torch.tensor(student.std)
    for_teacher = ((pixels.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    want = model.teacher(for_teacher, ids)[0]
    close(model._teacher_features(pixels, ids)[0], want)
    torch.testing.assert_close(
        model._teacher_features(for_student.permute(0, 3, 1, 2), ids)[0], want, rtol=1e-4, atol=1e-4
    )


def test_the_teacher_never_learns():
    model = distiller()
    names = {name for name, _ in model.named_parameters()} | set(model.state_dict())
    assert not any("teacher" in name for name in names)
    model.train()
    assert not model.teacher.training
    before = {k: v.clone() for k, v in model.teacher.vit.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    model(rand(2, 3, 16, 16), 0.75)["loss"].backward()
    optimiser.step()
    assert all(torch.equal(before[k], v) for k, v in model.teacher.vit.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.vit.parameters())


@pytest.mark.parametrize(
    "prefix", [dict(class_token=False), dict(), dict(reg_tokens=2)], ids=["none", "cls", "registers"]
)
@pytest.mark.parametrize("share", [False, True], ids=["separate", "shared"])
def test_decoder_savings_equal_the_plain_decoder(prefix, share):
    """Un-shuffled, all tokens in all blocks, all patches predicted: the same predictions and gradients."""
    torch.manual_seed(1)
    model = tiny(**prefix).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    count = model.num_prefix_tokens
    masking = ops.random_masking(2, 16, 0.75, noise=rand(2, 16))
    tokens = torch.randn(2, count + 4, 16, dtype=torch.float64)
    upstream = torch.randn(2, 12, 48, dtype=torch.float64)

    def plain(x: torch.Tensor) -> torch.Tensor:
        parameters = dict(model.named_parameters())
        x = plain_dmae.linear(parameters, "decoder_embed", x)
        patches = torch.cat([x[:, count:], model.mask_token.expand(2, 12, -1)], 1)
        patches = patches.gather(1, masking.ids_restore[:, :, None].expand(-1, -1, 16))
        x = torch.cat([x[:, :count], patches], 1) + model.decoder_pos_embed
        for index in range(len(model.decoder_blocks)):
            x = plain_dmae.block(parameters, f"decoder_blocks.{index}", x, 2)
        pred = plain_dmae.linear(parameters, "decoder_pred", plain_dmae.norm(parameters, "decoder_norm", x))[:, count:]
        return pred.gather(1, masking.ids_masked[:, :, None].expand(-1, -1, 48))

    results = []
    for decode in (plain, lambda x: model.decode(x, masking.ids_shuffle, share_first_block=share)):
        leaf = tokens.clone().requires_grad_()
        pred = decode(leaf)
        wanted = [
            leaf,
            *(p for n, p in model.named_parameters() if n.startswith(("decoder_", "mask_")) and p.requires_grad),
        ]
        results.append([pred, *torch.autograd.grad(pred, wanted, upstream)])
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_cross_decoder_equals_its_plain_formula():
    """Queries of masked tokens on keys and values of visible ones: predictions and every gradient."""
    torch.manual_seed(2)
    model = tiny(decoder="cross").double()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    masking = ops.random_masking(2, 16, 0.75, noise=rand(2, 16))
    tokens, upstream = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((5, 16), (12, 48)))
    parameters = dict(model.named_parameters())

    def linear(name: str, x: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return F.linear(x, parameters[f"{name}.weight"][start:stop], parameters[f"{name}.bias"][start:stop])

    def plain(x: torch.Tensor) -> torch.Tensor:
        positions = model.decoder_pos_embed[0]
        x = linear("decoder_embed", x)
        visible = torch.cat([x[:, :1] + positions[:1], x[:, 1:] + positions[1 + masking.ids_keep]], 1)
        x = model.mask_token + positions[1 + masking.ids_masked]
        for index in range(len(model.decoder_blocks)):
            name = f"decoder_blocks.{index}"
            h, context = (plain_dmae.norm(parameters, f"{name}.norm1", y) for y in (x, visible))
            qkv = (linear(f"{name}.attn.qkv", h, 0, 16), *linear(f"{name}.attn.qkv", context, 16).chunk(2, -1))
            heads = F.scaled_dot_product_attention(*(y.unflatten(-1, (2, 8)).transpose(1, 2) for y in qkv))
            x = x + linear(f"{name}.attn.proj", heads.transpose(1, 2).flatten(2))
            h = F.gelu(linear(f"{name}.mlp.fc1", plain_dmae.norm(parameters, f"{name}.norm2", x)))
            x = x + linear(f"{name}.mlp.fc2", h)
        return linear("decoder_pred", plain_dmae.norm(parameters, "decoder_norm", x))

    results = []
    for decode in (plain, lambda x: model.decode(x, masking.ids_shuffle)):
        leaf = tokens.clone().requires_grad_()
        wanted = [leaf, *(p for n, p in parameters.items() if n.startswith(("decoder_", "mask_")) and p.requires_grad)]
        pred = decode(leaf)
        results.append([pred, *torch.autograd.grad(pred, wanted, upstream)])
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_published_constants_are_the_defaults():
    model = mae_vit("tiny", img_size=32, depth=1, decoder_depth=1)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert norms and all(m.eps == 1e-6 for m in norms)
    assert (model.decoder_embed_dim, model.decoder_num_heads) == (512, 16) and model.norm_pix_loss is False
    assert model.blocks[0].mlp.fc1.out_features == 4 * 192
    published = MaskedAutoencoderViT.__init__.__kwdefaults__
    assert published["decoder_depth"] == 8
