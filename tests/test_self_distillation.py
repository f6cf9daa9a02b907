"""Self-distillation for further pre-training: exact savings against the plain formula, caches, phases, text."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from fastkd import ops
from fastkd.methods import FurtherPretrainer, TextFurtherPretrainer
from fastkd.methods.self_distillation import ClassTokenClassifier, fine_tuning_groups
from fastkd.methods.self_distillation_text import mask_words
from fastkd.methods.teacher_vectors import class_vectors, precompute_teacher
from fastkd.models import MaskedAutoencoderViT, VisionTransformer, save

SHAPE = dict(img_size=8, patch_size=2, in_chans=3, embed_dim=16, depth=3, num_heads=2)
DECODER = dict(decoder_embed_dim=8, decoder_depth=2, decoder_num_heads=2)


def randomised(model, seed: int):
    """Every parameter random, norms and biases too: what starts as 0 or 1 hides errors."""
    random = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "pos_embed" not in name:
            p.data += 0.2 * torch.randn(p.shape, generator=random)
    return model.double()


def mae(seed: int = 0, **changes) -> MaskedAutoencoderViT:
    torch.manual_seed(seed)
    return randomised(MaskedAutoencoderViT(**{**SHAPE, **DECODER, **changes}), seed)


def pictures(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NOISE = torch.rand(3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True, retain_graph=True)))


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value is None or got[name] is None:
            assert value is got[name] is None, name
        else:
            torch.testing.assert_close(
                got[name], value, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
            )


def plain_losses(student, teacher, images, noise, tokens="cls"):
    """The formula: two encoder passes, each with its own embedding, all tokens in all blocks; raster order."""
    masking = ops.random_masking(*noise.shape, 0.75, noise=noise)
    visible = student(images, masking.ids_keep).tokens
    pred = student.decode(visible, masking.ids_shuffle)
    target = ops.patchify(images, student.patch_size)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    target = target.gather(1, masking.ids_masked[:, :, None].expand(-1, -1, target.shape[2]))
    pick = (lambda x: x[:, 0]) if tokens == "cls" else (lambda x: x)
    difference = pick(student(images).tokens) - pick(teacher(images).tokens).detach()
    return (pred - target).square().mean(), difference.square().sum(-1).mean()


@pytest.mark.parametrize(
    "changes",
    [{}, dict(reg_tokens=2, init_values=0.5), dict(qkv_bias=False, depth=1)],
    ids=["plain", "registers", "one"],
)
def test_encode_is_the_full_forward(changes):
    """The class token alone, and in another order of the patches: value and every gradient."""
    model = randomised(VisionTransformer(**{**SHAPE, **changes}), 3)
    images, up = pictures(), torch.randn(3, 16, dtype=torch.float64)
    want = model(images).tokens
    order = torch.rand(3, 16).argsort(1)
    for ids in (None, order):
        got = model.encode(images, ids=ids)
        torch.testing.assert_close(got, want[:, 0], rtol=1e-11, atol=1e-12)
        assert_same(gradients((got * up).sum(), model), gradients((want[:, 0] * up).sum(), model))
    everything = model.encode(images, "all", order)
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(everything[:, :prefix], want[:, :prefix])
    patches = want[:, prefix:].gather(1, order[:, :, None].expand(-1, -1, 16))
    torch.testing.assert_close(everything[:, prefix:], patches)


def test_encode_reads_one_row_in_the_last_block():
    model, rows = mae(), []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    model.encode(pictures())
    assert rows == [17, 17, 1]


def test_encode_says_what_is_wrong():
    with pytest.raises(ValueError, match="encode: tokens: got 'mean', expected 'cls' or 'all'"):
        mae().encode(pictures(), "mean")
    with pytest.raises(ValueError, match="has no class token"):
        mae(class_token=False).encode(pictures())


@pytest.mark.parametrize("source", ["teacher", "cache"])
@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_step_is_the_plain_formula(tokens, source):
    """One backward over the sum, patches embedded once, the last block's class row, constants: all exact."""
    student, teacher, images = mae(0, reg_tokens=1), mae(1, reg_tokens=1), pictures()
    mae_loss, distill_loss = plain_losses(student, teacher, images, NOISE, tokens)
    want = gradients(mae_loss, student)
    for name, grad in gradients(0.7 * distill_loss, student).items():  # as two backward passes that add up
        want[name] = grad if want[name] is None else want[name] if grad is None else want[name] + grad
    if source == "teacher":
        method = FurtherPretrainer(student, "student", teacher, tokens=tokens, weight=0.7).double()
        index = None
    else:  # in another order than the batch
        cache = precompute_teacher(teacher, [images.flip(0)[:2], images.flip(0)[2:]], tokens)
        method = FurtherPretrainer(student, "student", teacher_cache=cache, tokens=tokens, weight=0.7)
        index = torch.tensor([2, 1, 0])
    embedded, embed = [], student.embed
    student.embed = lambda *args: embedded.append(1) or embed(*args)
    result = method(images, noise=NOISE, index=index)
    assert len(embedded) == 1 and tuple(result) == method.losses
    torch.testing.assert_close(result["mae_loss"], mae_loss, rtol=1e-11, atol=0)
    torch.testing.assert_close(result["distill_loss"], distill_loss, rtol=1e-11, atol=0)
    torch.testing.assert_close(result["loss"], mae_loss + 0.7 * distill_loss, rtol=1e-11, atol=0)
    assert_same(gradients(result["loss"], student), want)


def test_phase_one_is_plain_mae():
    student, images = mae(), pictures()
    result = FurtherPretrainer(student)(images, noise=NOISE)
    want, _ = plain_losses(student, mae(1), images, NOISE)
    torch.testing.assert_close(result["mae_loss"], want, rtol=1e-11, atol=0)
    assert result["loss"] is result["mae_loss"] and result["distill_loss"] == 0
    assert_same(gradients(result["loss"], student), gradients(want, student))
    raw = FurtherPretrainer(student, norm_pix_loss=False)(images, noise=NOISE)["mae_loss"]
    assert not torch.isclose(raw, want)


def test_distance_of_a_copy_is_zero_and_grows_with_the_width():
    student, images = mae(), pictures()
    assert FurtherPretrainer(student, "student", student).double()(images, noise=NOISE)["distill_loss"] < 1e-20
    ones = torch.ones(4, 10)
    assert (
        ops.cls_distillation_loss(ones, 3 * ones) == 40 and ops.cls_distillation_loss(ones[None], 3 * ones[None]) == 40
    )


def test_uint8_pictures_are_normalised_for_both():
    student, teacher = (m.float() for m in (mae(0), mae(1)))
    method = FurtherPretrainer(student, "student", teacher)
    raw = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    floats = ((raw / 255 - torch.tensor(student.mean)) / torch.tensor(student.std)).permute(0, 3, 1, 2)
    noise = NOISE.float()
    a, b = method(raw, noise=noise), method(floats, noise=noise)
    for name in method.losses:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_teacher_is_a_frozen_copy_of_the_encoder(tmp_path):
    student, teacher = mae(0).float(), mae(1).float()
    method = FurtherPretrainer(student, "student", teacher)
    assert {n.split(".")[0] for n in method.state_dict()} == {"student"}
    assert {id(p) for p in method.parameters()} == {id(p) for p in student.parameters()}
    assert all(p.requires_grad == ("pos_embed" not in n) for n, p in teacher.named_parameters())
    with torch.no_grad():
        teacher.blocks[0].attn.proj.weight.zero_()
    assert method.teacher.model.blocks[0].attn.proj.weight.abs().sum() > 0
    assert not isinstance(method.teacher.model, MaskedAutoencoderViT)
    from_file = FurtherPretrainer(student, "student", save(mae(1).float(), tmp_path / "phase1.safetensors"))
    images, noise = pictures().float(), NOISE.float()
    assert torch.equal(method(images, noise=noise)["loss"], from_file(images, noise=noise)["loss"])
    assert method.double()(pictures(), noise=NOISE)["distill_loss"].dtype == torch.float64  # the teacher moved along


def test_wrong_arguments_are_named():
    student, teacher, cache = mae(0), mae(1), torch.zeros(5, 16)
    for options, said in (
        (dict(phase="two"), "phase: got 'two'"),
        (dict(phase="student"), "teacher and teacher_cache: got none"),
        (dict(phase="student", teacher=teacher, teacher_cache=cache), "got both"),
        (dict(phase="teacher", teacher=teacher), "got one in phase 'teacher'"),
        (dict(phase="student", teacher_cache=cache, random_augmentation=True), "constants with random_augmentation"),
        (dict(phase="student", teacher_cache=cache.clone().requires_grad_()), "requires grad"),
        (dict(phase="student", teacher_cache=cache, tokens="all"), r"expected \(N, 17, 16\)"),
        (dict(phase="student", teacher=mae(embed_dim=24)), "teacher: got embed_dim 24, expected the student's 16"),
        (dict(phase="student", teacher=mae(mean=(0.0,) * 3)), "got mean"),
        (dict(tokens="patches"), "tokens: got 'patches'"),
    ):
        with pytest.raises(ValueError, match=said):
            FurtherPretrainer(student, **options)
    with pytest.raises(TypeError, match="MaskedAutoencoderViT"):
        FurtherPretrainer(VisionTransformer(**SHAPE))
    with pytest.raises(ValueError, match="index: got None"):
        FurtherPretrainer(student, "student", teacher_cache=cache.double())(pictures(), noise=NOISE)
    with pytest.raises(ValueError, match="masks no patch"):
        FurtherPretrainer(student, mask_ratio=0.0)(pictures())
    vectors = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="cls_distillation_loss: teacher: .*no projector"):
        ops.cls_distillation_loss(vectors, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="must not train the teacher"):
        ops.cls_distillation_loss(vectors, vectors.clone().requires_grad_())


def test_constants_need_a_loader_that_repeats_itself():
    teacher, images = mae(1), pictures(40)
    data = TensorDataset(images, torch.arange(40))
    want = teacher(images).tokens[:, 0].detach()
    teacher.train()
    torch.testing.assert_close(precompute_teacher(teacher, DataLoader(data, 16)), want)
    assert teacher.training
    with pytest.raises(ValueError, match="another first batch at the second reading"):
        precompute_teacher(teacher, DataLoader(data, 16, shuffle=True))
    with pytest.raises(ValueError, match="got an iterator"):
        precompute_teacher(teacher, iter([images]))
    with pytest.raises(ValueError, match="got no batch"):
        precompute_teacher(teacher, [])


def test_compiled_and_autocast():
    student, teacher = (mae(seed, depth=1, decoder_depth=1).float() for seed in (0, 1))
    method, images, noise = FurtherPretrainer(student, "student", teacher), pictures().float(), NOISE.float()
    want = method(images, noise=noise)
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    got = compiled(images, noise=noise)
    torch.testing.assert_close(got["loss"], want["loss"])
    assert_same(
        {n: g.double() for n, g in gradients(got["loss"], student).items()},
        {n: g.double() for n, g in gradients(want["loss"], student).items()},
    )
    with torch.autocast("cpu", torch.bfloat16):
        rough = method(images, noise=noise)
    assert rough["loss"].dtype == torch.float32
    torch.testing.assert_close(rough["loss"], want["loss"], rtol=0.05, atol=0)


def test_fine_tuning_a_head():
    model = ClassTokenClassifier(mae(0), 5, dropout=0.0).double()
    want = model.head(model.encoder(pictures()).tokens[:, 0])
    torch.testing.assert_close(model(pictures()), want)
    decayed, plain = fine_tuning_groups(model, 0.01)
    names = {id(p): n for n, p in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    plain = {names[id(p)] for p in plain["params"]}
    assert "encoder.cls_token" in plain and all(n.endswith(("bias", "cls_token")) for n in plain)
    decayed = {names[id(p)] for p in decayed["params"]}
    assert "encoder.norm.weight" in decayed and "head.weight" in decayed
    assert plain | decayed == {n for n, p in model.named_parameters() if p.requires_grad}


# Text

CLS, SEP, PAD, MASK, WORDS = 1, 2, 0, 3, 50


@pytest.fixture(scope="module")
def berts():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return [randomised(transformers.AutoModelForMaskedLM.from_config(config), seed) for seed in (0, 1)]


@pytest.fixture
def texts():
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(4, WORDS, (4, 10), generator=random)
    lengths = torch.tensor([10, 7, 4, 2])  # the last one: [CLS] [SEP], nothing to mask
    mask = (torch.arange(10) < lengths[:, None]).long()
    ids[:, 0] = CLS
    ids[torch.arange(4), lengths - 1] = SEP
    return dict(input_ids=torch.where(mask.bool(), ids, PAD), attention_mask=mask)


def text_method(model, *args, **options) -> TextFurtherPretrainer:
    return TextFurtherPretrainer(model, MASK, (PAD, CLS, SEP, MASK), *args, **options)


def test_words_are_masked_as_bert_does():
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(4, WORDS, (400, 50), generator=random)
    maskable = torch.rand(400, 50, generator=random) < 0.5
    noise = torch.rand(3, 400, 50, generator=random)
    masked, chosen = mask_words(ids, maskable, noise, MASK, WORDS)
    assert not chosen[~maskable].any() and torch.equal(masked[~chosen], ids[~chosen])
    assert chosen[maskable].float().mean() == pytest.approx(0.15, abs=0.012)
    now, before = masked[chosen], ids[chosen]
    assert (now == MASK).float().mean() == pytest.approx(0.8 + 0.1 / WORDS, abs=0.03)
    kept = (now == before).float().mean().item()
    assert kept == pytest.approx(0.1 + 0.1 / WORDS, abs=0.025)
    others = now[(now != MASK) & (now != before)]
    assert others.min() < 4 and others.max() == WORDS - 1  # any word, special ones too


@pytest.mark.parametrize("source", ["teacher", "cache"])
def test_text_step_is_the_plain_formula(berts, texts, source):
    student, teacher = berts
    noise = torch.rand(3, 4, 10, generator=torch.Generator().manual_seed(2))
    noise[0, :2] /= 3  # some words are chosen
    maskable = texts["attention_mask"].bool() & (texts["input_ids"] > MASK)
    masked, chosen = mask_words(texts["input_ids"], maskable, noise, MASK, WORDS)
    assert chosen.any() and not chosen[3].any()
    logits = student(masked, texts["attention_mask"]).logits
    mlm_loss = F.cross_entropy(logits[chosen], texts["input_ids"][chosen])
    h_s, h_t = (m.bert(**texts).last_hidden_state[:, 0] for m in (student, teacher))
    distill_loss = (h_s - h_t.detach()).square().sum(1).mean()
    if source == "teacher":
        method = text_method(student, "student", teacher, weight=0.5)
        index = None
    else:
        first, rest = ({n: v.flip(0)[part] for n, v in texts.items()} for part in (slice(3), slice(3, 4)))
        method = text_method(student, "student", teacher_cache=precompute_teacher(teacher, [first, rest]), weight=0.5)
        index = torch.tensor([3, 2, 1, 0])
    result = method(**texts, noise=noise, index=index)
    assert tuple(result) == method.losses
    torch.testing.assert_close(result["mlm_loss"], mlm_loss)
    torch.testing.assert_close(result["distill_loss"], distill_loss)
    want = gradients(mlm_loss + 0.5 * distill_loss, student)
    assert_same(gradients(result["loss"], student), want)
    assert not any(name.startswith("teacher") for name in method.state_dict())
    phase_one = text_method(student)(**texts, noise=noise)
    assert torch.equal(phase_one["loss"], phase_one["mlm_loss"]) and phase_one["distill_loss"] == 0


def test_text_without_a_chosen_word(berts, texts):
    result = text_method(berts[0])(**texts, noise=torch.ones(3, 4, 10))
    assert result["loss"] == 0
    assert all(g is None or (g == 0).all() for g in gradients(result["loss"], berts[0]).values())


def test_text_errors_and_frozen_copy(berts, texts):
    student, teacher = berts
    with pytest.raises(ValueError, match="teacher and teacher_cache: got none"):
        text_method(student, "student")
    with pytest.raises(ValueError, match=r"teacher_cache: got shape \(4, 8\), expected \(N, 16\)"):
        text_method(student, "student", teacher_cache=torch.zeros(4, 8))
    narrow = copy.deepcopy(teacher)
    narrow.config.hidden_size = 8
    with pytest.raises(ValueError, match="teacher: got width 8, expected the student's 16"):
        text_method(student, "student", narrow)
    method = text_method(student, "student", teacher)
    method.train()
    assert not method.teacher.model.training and all(p.requires_grad for p in teacher.parameters())
    assert torch.equal(class_vectors(teacher, **texts), class_vectors(method.teacher.model, **texts))
