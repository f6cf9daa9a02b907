"""The projector beyond its golden file: learned queries, unequal grids, norms, autocast, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastkd.nn import CrossAttentionProjector


def make(**options):
    torch.manual_seed(0)
    return CrossAttentionProjector(6, 8, **({"query_hw": (2, 3), "pos_hw": (4, 5), "num_heads": 2} | options))


def features(batch=3):
    return torch.randn(batch, 6, 4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_the_learned_query_is_a_query_given_to_every_image():
    model, x = make(), features()
    given = model.query[None].expand(3, -1, -1)
    shared, apart = model(x), model(x, given)
    assert shared.shape == (3, 6, 8)
    torch.testing.assert_close(shared, apart)
    weight = torch.randn_like(shared)
    ours, theirs = (
        torch.autograd.grad((out * weight).sum(), [x, model.query, model.q.weight], retain_graph=True)
        for out in (shared, apart)
    )
    for mine, want in zip(ours, theirs):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)


def test_written_out(norm="layer"):
    """The formula of the docstring on unequal grids, attention maps and all."""
    model, x = make(norm=norm), features()
    hidden = F.conv2d(x, model.stem[0].weight, model.stem[0].bias, padding=1).permute(0, 2, 3, 1)
    hidden = F.layer_norm(hidden, (6,), model.stem[1].weight, model.stem[1].bias, 1e-5).permute(0, 3, 1, 2).relu()
    keys = (hidden + model.pos_embed).flatten(2).transpose(1, 2)
    queries = model.q(model.query_stem[0](model.query).relu()).expand(3, -1, -1)
    k, v = model.kv(keys).chunk(2, -1)
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        weights = (queries[..., part] @ k[..., part].transpose(1, 2) * (4**-0.5 * 5)).softmax(-1)
        heads.append(weights @ v[..., part])
    y = model.norm(model.proj(torch.cat(heads, -1)))
    torch.testing.assert_close(model(x), y + model.ffn[2](model.ffn[0](y).relu()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_every_parameter_and_the_features_learn(norm):
    model, x = make(norm=norm), features()
    model(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert x.grad.abs().sum() > 0


def test_autocast_bfloat16_is_near_float32():
    model, x = make(), features()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    torch.testing.assert_close(out.float(), model(x), rtol=0, atol=0.1)


def test_compiles_in_one_graph():
    model, x = make(norm="layer"), features()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


ERRORS = {
    "heads": (lambda: make(num_heads=3), "num_heads: got 3, expected a divisor of teacher_dim = 8"),
    "norm": (lambda: make(norm="group"), "norm: got 'group'"),
    "grid": (lambda: make(query_hw=0), "query_hw: got 0"),
    "features": (lambda: make()(torch.ones(2, 6, 5, 4)), r"x: got shape \(2, 6, 5, 4\), expected \(2, 6, 4, 5\)"),
    "channels": (lambda: make()(torch.ones(2, 5, 4, 5)), "x: got shape"),
    "query": (lambda: make()(torch.ones(2, 6, 4, 5), torch.ones(2, 5, 8)), r"query: got shape \(2, 5, 8\)"),
    "no query": (lambda: make(learned_query=False)(torch.ones(2, 6, 4, 5)), "query: got none"),
}


@pytest.mark.parametrize("wrong, match", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(wrong, match):
    with pytest.raises(ValueError, match=f"CrossAttentionProjector: {match}"):
        wrong()
