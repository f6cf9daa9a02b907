"""PromptKD on tiny random CLIPs: prompts, class vectors, both stages."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd.methods import PromptedCLIP, PromptKD, PromptStudent, PromptTuning
from fastkd.models.class_vectors import ClassVectorBank, FeatureProjector
from fastkd.models.prompts import CLIP_MEAN, CLIP_STD, PromptedEncoder, PromptedText

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
NAMES = ["cat", "dog", "fern"]
# Begin, four words of context, a name of one or two tokens, end (which is where features are read), padding.
IDS = torch.tensor([[1, 5, 6, 7, 8, 20, 2, 0], [1, 5, 6, 7, 8, 21, 22, 2], [1, 5, 6, 7, 8, 23, 2, 0]])


def clip(width: int = 16, joint: int = 12, seed: int = 0) -> nn.Module:
    tower = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config=dict(**tower, vocab_size=30, max_position_embeddings=8, bos_token_id=1, eos_token_id=2),
        vision_config=dict(**tower, image_size=8, patch_size=4),
        projection_dim=joint,
    )
    torch.manual_seed(seed)
    return transformers.CLIPModel(config).eval()


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def prompted(depth: int = 2, **changes) -> PromptedCLIP:
    return PromptedCLIP(clip(**changes), IDS, vision_depth=depth, text_depth=depth)


def student(bank: ClassVectorBank, seed: int = 1) -> PromptStudent:
    torch.manual_seed(seed)
    encoder = PromptedEncoder.of_clip(clip(8, 10, seed), depth=2)
    return PromptStudent(encoder, FeatureProjector(10, bank.text_features.shape[1]), bank, logit_scale=20.0)


def bank(width: int = 12) -> ClassVectorBank:
    random = torch.Generator().manual_seed(3)
    return ClassVectorBank(F.normalize(torch.randn(3, width, generator=random), dim=1), NAMES)


def test_prompted_vision_tower_is_the_sequence_with_tokens_appended():
    """Against the layers called by hand: appended in front of the first norm, replaced in front of later layers."""
    model = clip()
    encoder = PromptedEncoder.of_clip(model, length=2, depth=2)
    tokens = encoder.prompts.tokens
    with encoder.without_prompts():
        x = model.vision_model.embeddings(images())
    x = torch.cat((x, tokens[0].expand(4, -1, -1)), 1)
    with encoder.without_prompts():
        x = model.vision_model.pre_layrnorm(x)
        x = model.vision_model.encoder.layers[0](x, None)
        x = torch.cat((x[:, :-2], tokens[1].expand(4, -1, -1)), 1)
        for layer in model.vision_model.encoder.layers[1:]:
            x = layer(x, None)
    want = model.visual_projection(model.vision_model.post_layernorm(x[:, 0]))
    torch.testing.assert_close(encoder(images()), want)


def test_context_that_is_the_template_changes_nothing():
    """With context at one layer, which begins as the template's words, the text tower is the plain one at first."""
    model = clip()
    want = model.get_text_features(IDS)
    want = getattr(want, "pooler_output", want)
    text = PromptedText(model, IDS, depth=1)
    torch.testing.assert_close(text(), want)
    with torch.no_grad():
        text.prompts.tokens += torch.randn_like(text.prompts.tokens)
    assert (text() - want).abs().max() > 1e-3
    with text.prompts.off():
        torch.testing.assert_close(text(), want)


def test_only_prompts_and_projector_train():
    model = student(bank())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"encoder.prompts.tokens", *(f"projector.{i}.{k}" for i in (0, 1, 3) for k in ("weight", "bias"))}
    tuned = {name for name, p in prompted().named_parameters() if p.requires_grad}
    assert tuned == {"image.prompts.tokens", "text.prompts.tokens"}
    model.train()
    assert not model.encoder.tower.training and model.projector.training


def test_stage_one_lowers_cross_entropy_and_stays_near_the_plain_model():
    torch.manual_seed(0)
    pictures, target = images(9), torch.arange(9) % 3
    ends = {}
    for weights in ((0.0, 0.0, 0.0), (25.0, 10.0, 1.0)):
        names = ("text_weight", "image_weight", "logit_weight")
        method = PromptTuning(prompted(depth=3), **dict(zip(names, weights)))
        start = method(pictures, target)
        assert set(start) == set(method.losses)
        want = F.cross_entropy(method.student(pictures), target)
        torch.testing.assert_close(start["ce_loss"], want)
        optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.05)
        for _ in range(25):
            optimizer.zero_grad()
            method(pictures, target)["loss"].backward()
            optimizer.step()
        ends[weights] = method(pictures, target)
        assert ends[weights]["ce_loss"] < start["ce_loss"]
    free, held = ends.values()
    assert held["text_loss"] < free["text_loss"] and held["image_loss"] < free["image_loss"]


def test_regularising_terms_are_those_of_the_formula():
    method = PromptTuning(prompted(), text_weight=3.0, image_weight=2.0, logit_weight=0.5)
    found, model, pictures = method(images(), torch.tensor([0, 1, 2, 0])), method.student, images()
    image, text = F.normalize(model.image(pictures), dim=1), F.normalize(model.text(), dim=1)
    with model.image.without_prompts(), model.text.prompts.off():
        plain, plain_text = F.normalize(model.image(pictures), dim=1), F.normalize(model.text(), dim=1)
    scale = model.logit_scale
    log_q, log_p = (scale * image @ text.t()).log_softmax(1), (scale * plain @ plain_text.t()).log_softmax(1)
    want = dict(
        text_loss=(text - plain_text).abs().mean(), image_loss=(image - plain).abs().mean(),
        logit_loss=F.kl_div(log_q, log_p, log_target=True, reduction="mean"),
    )  # fmt: skip
    for name, value in want.items():
        torch.testing.assert_close(found[name], value)
    parts = found["ce_loss"] + 3 * found["text_loss"] + 2 * found["image_loss"] + 0.5 * found["logit_loss"]
    torch.testing.assert_close(found["loss"], parts)


def test_stored_class_vectors_give_the_loss_of_recomputed_ones():
    tuned = prompted().eval()
    stored = tuned.bank(NAMES)
    model = student(stored)
    method = PromptKD(model, tuned.image, weight=7.0, temperature=2.0, teacher_logit_scale=30.0)
    loss = method(images())["loss"]
    text = F.normalize(tuned.text(), dim=1).detach()
    teacher = 30 * F.normalize(tuned.image(images()), dim=1) @ text.t()
    projected = F.normalize(model.project(images()), dim=1)
    log_q, log_p = (20 * projected @ text.t() / 2).log_softmax(1), (teacher / 2).log_softmax(1)
    torch.testing.assert_close(
        loss, 7 * 4 * F.kl_div(log_q, log_p, log_target=True, reduction="mean"), rtol=1e-4, atol=0
    )
    loss.backward()
    assert model.encoder.prompts.tokens.grad.abs().max() > 0
    assert all(p.grad is None for p in tuned.parameters())


def test_the_teacher_is_in_no_state():
    method = PromptKD(student(bank()), prompted().image)
    assert all(name.startswith("student.") for name in method.state_dict())
    assert not method.training_state()
    copied = copy.deepcopy(method.student)
    with torch.no_grad():
        copied.encoder.prompts.tokens.add_(1.0)
    copied.eval(), method.student.eval()
    assert not torch.equal(copied(images()), method.student(images()))  # its hooks read its own prompts


def test_uint8_images_meet_each_model_with_its_own_statistics():
    model = student(bank())
    seen = {}

    class Teacher(nn.Module):
        mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

        def forward(self, x):
            seen["teacher"] = x
            return torch.ones(len(x), 12)

    model.encoder.tower.register_forward_pre_hook(lambda module, args: seen.update(student=args[0]))
    pixels = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8)
    PromptKD(model, Teacher())(pixels)
    white = pixels.permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(seen["teacher"], (white - 0.5) / 0.25)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(seen["student"], (white - mean) / std)


def test_it_learns_without_labels():
    """The student comes to agree with a teacher that tells three pictures apart."""
    stored, level = bank(), torch.arange(24) % 3
    pictures = 3 * images(3, seed=9)[level] + 0.3 * images(24)
    feature = stored.text_features[level] + 0.05 * torch.randn(24, 12, generator=torch.Generator().manual_seed(0))
    method = PromptKD(student(stored), None, weight=3.0, teacher_logit_scale=20.0)
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        method(pictures, teacher_feature=feature)["loss"].backward()
        optimizer.step()
    method.eval()
    assert (method.student(pictures).argmax(1) == level).float().mean() > 0.8
    few = stored.subset(["dog", "cat"])
    assert method.student(pictures, few).shape == (24, 2)


def test_runs_under_autocast_and_checkpointing():
    model = student(bank())
    method = PromptKD(model, prompted().image, teacher_logit_scale=5.0)
    want = method(images())["loss"]
    gradient = torch.autograd.grad(want, model.encoder.prompts.tokens)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(images())["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=0.2, atol=0)
    assert torch.autograd.grad(loss, model.encoder.prompts.tokens)[0].isfinite().all()
    loss = torch.utils.checkpoint.checkpoint(lambda x: method(x)["loss"], images(), use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, model.encoder.prompts.tokens)[0], gradient)


class Tower(nn.Module):
    """Two blocks over patches, the way timm's transformers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = (
            nn.Conv2d(3, 8, 4, 4),
            nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in "12"),
        )

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def test_any_tower_compiles_without_a_graph_break():
    torch.manual_seed(0)
    tower = Tower()
    model = PromptStudent(PromptedEncoder(tower, list(tower.blocks), 8), FeatureProjector(8, 12), bank())
    method, feature = PromptKD(model, None), torch.randn(4, 12)
    torch._dynamo.reset()
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    want = method(images(), teacher_feature=feature)["loss"]
    torch.testing.assert_close(compiled(images(), teacher_feature=feature)["loss"], want)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_bank_survives_a_file(tmp_path, suffix):
    path = tmp_path / f"bank.{suffix}"
    bank().save(path)
    read = ClassVectorBank.load(path)
    assert read.class_names == tuple(NAMES) and torch.equal(read.text_features, bank().text_features)
    base, novel = read.halves()
    assert base.class_names == ("cat", "dog") and novel.class_names == ("fern",)
    logits = read.logits(3 * read.text_features, scale=10.0)
    torch.testing.assert_close(logits.diagonal(), torch.full((3,), 10.0))


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="norm is 1 away from 1.*normalize"):
        ClassVectorBank(2 * bank().text_features, NAMES)
    with pytest.raises(ValueError, match="more than once: cat"):
        ClassVectorBank(bank().text_features, ["cat", "cat", "dog"])
    with pytest.raises(ValueError, match="expected .C, D. and C names"):
        ClassVectorBank(bank().text_features, NAMES[:2])
    with pytest.raises(ValueError, match="no class 'cow'"):
        bank().subset(["cow"])
    with pytest.raises(ValueError, match="ends in .safetensors or .npz"):
        bank().save("bank.bin")
    with pytest.raises(ValueError, match="expected 2 or more in training"):
        FeatureProjector(4, 4)(torch.ones(1, 4))
    assert FeatureProjector(4, 4).eval()(torch.ones(1, 4)).shape == (1, 4)
    with pytest.raises(ValueError, match="5 tokens of context"):
        PromptedText(clip(), IDS, length=5)
    with pytest.raises(ValueError, match="depth: got 4, expected 0 to 3, the layers of the vision tower"):
        PromptedEncoder.of_clip(clip(), depth=4)
    with pytest.raises(ValueError, match="teacher_feature: got None"):
        PromptKD(student(bank()), None)(images())
