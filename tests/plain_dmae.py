"""DMAE written down plainly, as the spec says it and with no saving at all, to make golden files of other sizes.

    python tests/plain_dmae.py FOLDER [SEED ...]

All patches are embedded, the teacher runs all its blocks, the decoder un-shuffles and predicts every patch. Everything
is float64; files have the form of those in ``tests/golden``.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def positions(dim: int, rows: int, columns: int) -> Tensor:
    table = torch.zeros(1 + rows * columns, dim, dtype=torch.float64)
    for k in range(rows * columns):
        for i in range(dim // 4):
            w = 10000.0 ** (-i / (dim / 4))
            x, y = torch.tensor(k % columns * w).double(), torch.tensor(k // columns * w).double()
            table[1 + k, i :: dim // 4] = torch.stack([x.sin(), x.cos(), y.sin(), y.cos()])
    return table[None]


def linear(p: dict, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].t() + p[f"{name}.bias"]


def norm(p: dict, name: str, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def block(p: dict, name: str, x: Tensor, heads: int) -> Tensor:
    batch, tokens, dim = x.shape
    qkv = linear(p, f"{name}.attn.qkv", norm(p, f"{name}.norm1", x)).view(batch, tokens, 3, heads, dim // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(-1, -2) / (dim // heads) ** 0.5).softmax(-1) @ v
    x = x + linear(p, f"{name}.attn.proj", attention.transpose(1, 2).reshape(batch, tokens, dim))
    return x + linear(p, f"{name}.mlp.fc2", F.gelu(linear(p, f"{name}.mlp.fc1", norm(p, f"{name}.norm2", x))))


def encode(p: dict, images: Tensor, ids_keep: Tensor, heads: int, depth: int) -> tuple[list[Tensor], Tensor]:
    """(raw outputs of all blocks, tokens after the final norm)."""
    weight = p["patch_embed.proj.weight"]
    x = F.conv2d(images, weight, p["patch_embed.proj.bias"], stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    x = (x + p["pos_embed"][:, 1:]).gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2]))
    x = torch.cat([(p["cls_token"] + p["pos_embed"][:, :1]).expand(len(x), -1, -1), x], 1)
    outputs = []
    for index in range(depth):
        outputs.append(x := block(p, f"blocks.{index}", x, heads))
    return outputs, norm(p, "norm", x)


def decode(p: dict, tokens: Tensor, ids_restore: Tensor, heads: int, depth: int) -> Tensor:
    y = linear(p, "decoder_embed", tokens)
    masked = p["mask_token"].expand(len(y), ids_restore.shape[1] + 1 - y.shape[1], -1)
    patches = torch.cat([y[:, 1:], masked], 1).gather(1, ids_restore[:, :, None].expand(-1, -1, y.shape[2]))
    y = torch.cat([y[:, :1], patches], 1) + p["decoder_pos_embed"]
    for index in range(depth):
        y = block(p, f"decoder_blocks.{index}", y, heads)
    return linear(p, "decoder_pred", norm(p, "decoder_norm", y))[:, 1:]


def pixel_loss(pred: Tensor, images: Tensor, mask: Tensor, patch: tuple[int, int], normpix: bool) -> Tensor:
    target = images.unfold(2, patch[0], patch[0]).unfold(3, patch[1], patch[1])  # [B, C, rows, columns, ph, pw]
    target = target.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    if normpix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + EPS).sqrt()
    return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()


def align_loss(student: Tensor, teacher: Tensor, criterion: str) -> Tensor:
    d = F.normalize(teacher, dim=-1, eps=1e-12) - F.normalize(student, dim=-1, eps=1e-12)
    return d.abs().mean() if criterion == "L1" else d.square().mean()


def parameters(
    pick: torch.Generator, dim: int, depth: int, channels: int, patch: tuple, grid: tuple, ratio: int
) -> dict:
    """Random parameters of an encoder, all of them away from their usual start (biases and norms too)."""
    shapes = {"cls_token": (1, 1, dim), "patch_embed.proj.weight": (dim, channels, *patch)}
    shapes["patch_embed.proj.bias"] = (dim,)
    for index in range(depth):
        shapes |= block_shapes(f"blocks.{index}", dim, ratio)
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    return {"pos_embed": positions(dim, *grid).float().double()} | draw(pick, shapes)


def block_shapes(name: str, dim: int, ratio: int) -> dict:
    layers = {
        "attn.qkv": (3 * dim, dim),
        "attn.proj": (dim, dim),
        "mlp.fc1": (ratio * dim, dim),
        "mlp.fc2": (dim, ratio * dim),
    }
    shapes = {f"{name}.norm{i}.{kind}": (dim,) for i in (1, 2) for kind in ("weight", "bias")}
    for layer, shape in layers.items():
        shapes |= {f"{name}.{layer}.weight": shape, f"{name}.{layer}.bias": shape[:1]}
    return shapes


def draw(pick: torch.Generator, shapes: dict) -> dict:
    def one(name: str, shape: tuple) -> Tensor:
        x = torch.randn(shape, generator=pick) * (0.2 if len(shape) < 2 else shape[-1] ** -0.5)
        return (x + 1 if "norm" in name and name.endswith("weight") else x).double()

    return {name: one(name, shape) for name, shape in shapes.items()}


def writer(folder: Path, split: str, meta: str):
    """write(name, tensors): floating tensors are stored float32, scalars float64."""

    def write(name: str, arrays: dict) -> None:
        stored = {k: v.detach().numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in arrays.items()}
        stored = {k: v.astype(np.float32) if v.ndim and v.dtype == np.float64 else v for k, v in stored.items()}
        np.savez(folder / f"dmae_{name}_{split}.npz", meta=meta, **stored)

    return write


def make_ops(folder: Path, seed: int, split: str = "made") -> None:
    """Writes files of the ops with other keys than usual: unequal masks, one channel, no bias, missing branches."""
    pick = torch.Generator().manual_seed(seed)
    draw_one = lambda *shape: torch.randn(shape, generator=pick).double()  # noqa: E731
    write = writer(folder, f"{split}{seed}", json.dumps({"hyperparameters": {"mask_ratio": 0.6}}))

    images, pred = draw_one(2, 1, 6, 20), draw_one(2, 8, 15).requires_grad_()  # 2 x 4 patches of 3 x 5
    mask = (torch.rand(2, 8, generator=pick) < torch.tensor([[0.3], [0.8]])).double()
    mask[:, 0] = 1
    loss = pixel_loss(pred, images, mask, (3, 5), True)
    (grad,) = torch.autograd.grad(loss, pred)
    arrays = {"imgs": images, "pred": pred, "mask": mask, "patch_size": [3, 5]}
    write("pixel_loss", arrays | {"loss_normpix": loss, "grad_pred_normpix": grad})

    noise = torch.rand(2, 7, generator=pick)
    shuffle = noise.argsort(1)
    keep = int(7 * (1 - 0.6))
    restore = shuffle.argsort(1)
    found = {"ids_keep": shuffle[:, :keep], "ids_restore": restore, "mask": (restore >= keep).double()}
    write("random_masking", {"noise": noise} | found)

    teacher, student = draw_one(2, 3, 10), draw_one(2, 3, 6).requires_grad_()
    weights = {"proj_weight": draw_one(10, 6), "mlp_fc1_weight": draw_one(4, 6), "mlp_fc2_weight": draw_one(10, 4)}
    weights = {k: v.requires_grad_() for k, v in weights.items()}
    hidden = F.gelu(student @ weights["mlp_fc1_weight"].t())
    branches = {
        "L2": align_loss(student @ weights["proj_weight"].t(), teacher, "L2"),
        "mlp_L2": align_loss(hidden @ weights["mlp_fc2_weight"].t(), teacher, "L2"),
    }
    arrays = {"feature_teacher": teacher, "feature_student": student} | weights
    for case, loss in branches.items():
        used = [k for k in weights if k.startswith("mlp") == case.startswith("mlp")]
        grads = torch.autograd.grad(loss, [student, *(weights[k] for k in used)])
        arrays |= {f"loss_{case}": loss, f"grad_feature_student_{case}": grads[0]}
        arrays |= {f"grad_{k}" + ("" if k.startswith("mlp") else f"_{case}"): g for k, g in zip(used, grads[1:])}
    write("distill_loss", arrays)

    cut = draw_one(2, 3, 4, 2, 5, 1)  # [B, rows, columns, ph, pw, C]
    joined = cut.permute(0, 5, 1, 3, 2, 4).reshape(2, 1, 6, 20)
    write("patchify", {"imgs_0": joined, "patches_0": cut.flatten(3).flatten(1, 2), "patch_size_0": [2, 5]})


def make(folder: Path, seed: int, split: str = "made") -> dict:
    """Writes the teacher_forward, student_forward and student_grads files of one random configuration."""
    choose, pick = random.Random(seed), torch.Generator().manual_seed(seed)
    grid, patch = choose.choice([(4, 4), (3, 5), (2, 7)]), choose.choice([(4, 4), (2, 3), (5, 5)])
    channels, batch, ratio = choose.choice([1, 3, 4]), choose.choice([1, 2, 3]), choose.choice([0.5, 0.75, 0.9])
    hs, ht, hd = (choose.choice([1, 2, 3]) for _ in range(3))
    ds, dt, dd = 12 * hs, choose.choice([8, 16]) * ht, 8 * hd
    depth_s, depth_t, depth_d = choose.choice([2, 3]), choose.choice([2, 4]), choose.choice([1, 2, 3])
    pairs = choose.choice([1, 2])
    al_s = sorted(choose.sample(range(depth_s), pairs))
    al_t = sorted(choose.sample(range(depth_t), pairs))
    normpix, criterion, mlp = choose.random() < 0.5, choose.choice(["L1", "L2"]), choose.choice([2, 4])
    rows, columns = grid[0] * patch[0], grid[1] * patch[1]
    config = dict(
        N=batch, img=[rows, columns], p=list(patch), ratio=ratio, ds=ds, hs=hs, depth_s=depth_s, al_s=al_s, dd=dd,
        hd=hd, depth_d=depth_d, dt=dt, ht=ht, depth_t=depth_t, al_t=al_t, normpix=normpix, crit=criterion,
    )  # fmt: skip
    meta = json.dumps({"source": "tests/plain_dmae.py", "config": config, "layernorm_eps": EPS})
    patches = grid[0] * grid[1]
    images = torch.randn(batch, channels, rows, columns, generator=pick).double()
    noise = torch.rand(batch, patches, generator=pick)
    shuffle = noise.argsort(1)
    keep = int(patches * (1 - ratio))
    restore = shuffle.argsort(1)
    common = {"imgs": images, "ids_keep": shuffle[:, :keep], "ids_restore": restore, "mask": (restore >= keep).double()}

    teacher = parameters(pick, dt, depth_t, channels, patch, grid, mlp)
    with torch.no_grad():
        outputs, _ = encode(teacher, images, common["ids_keep"], ht, depth_t)
    targets = {f"teacher_feature_block{b}": outputs[b] for b in al_t}

    student = parameters(pick, ds, depth_s, channels, patch, grid, mlp)
    pixels = channels * patch[0] * patch[1]
    shapes = {"mask_token": (1, 1, dd), "decoder_embed.weight": (dd, ds), "decoder_embed.bias": (dd,)}
    for index in range(depth_d):
        shapes |= block_shapes(f"decoder_blocks.{index}", dd, mlp)
    shapes |= {"decoder_norm.weight": (dd,), "decoder_norm.bias": (dd,)}
    shapes |= {"decoder_pred.weight": (pixels, dd), "decoder_pred.bias": (pixels,)}
    for k in range(pairs):
        shapes |= {f"aligned_feature_projection_heads.{k}.weight": (dt, ds)}
        shapes |= {f"aligned_feature_projection_heads.{k}.bias": (dt,)}
    student |= {"decoder_pos_embed": positions(dd, *grid).float().double()} | draw(pick, shapes)
    trained = {k: v.requires_grad_() for k, v in student.items() if not k.endswith("pos_embed")}
    features, latent = encode(student, images, common["ids_keep"], hs, depth_s)
    pred = decode(student, latent, restore, hd, depth_d)
    raw, normed = (pixel_loss(pred, images, common["mask"], patch, flag) for flag in (False, True))
    mine, other = (normed, raw) if normpix else (raw, normed)
    found = {"pred": pred, "student_latent_norm": latent, "loss_pixel": mine, "loss_pixel_other_normpix": other}
    total = mine
    for k, (ours, theirs) in enumerate(zip(al_s, al_t)):
        projected = linear(student, f"aligned_feature_projection_heads.{k}", features[ours])
        found[f"loss_align_block{ours}"] = align_loss(projected, outputs[theirs], criterion)
        found[f"student_feature_block{ours}"] = features[ours]
        total = total + found[f"loss_align_block{ours}"]
    found["loss_total"] = total
    total.backward()

    write = writer(folder, f"{split}{seed}", meta)
    write("teacher_forward", common | {"noise": noise} | targets | {f"param/{k}": v for k, v in teacher.items()})
    write("student_forward", common | targets | found | {f"param/{k}": v for k, v in student.items()})
    write("student_grads", {"loss_total": total} | {f"grad/{k}": v.grad for k, v in trained.items()})
    return config


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for number in map(int, sys.argv[2:] or ["0"]):
        print(number, make(target, number))
