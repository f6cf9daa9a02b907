"""What single changes bring on the CPU, each switched off and on in one run: the table of docs/performance.md.

    python benchmarks/changes.py            # about three minutes

Every pair is timed in turn, round after round; a ratio is the median over the rounds, with its quartiles. Changes that
cannot be switched off any more are not here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import ROOT, provenance, quartiles, seconds, write_rows
from tables import markdown, rows_of

from fastkd import ops

PREDICTED = {
    "mlp": ("GELU and its derivative inside the products of the MLP", "two passes over the widest tensor less: 10 %"),
    "linear_pixel_loss": ("prediction and pixel loss share one buffer", "3 transfers of the prediction instead of 6"),
    "linear": ("own products: weights rounded while packed, no casts, no transposed copies", "casts gone: 20 %"),
    "attention": ("attention in place, scores in cache", "no score tensor, no transposes: 2x"),
    "direct ops": ("eager code enters ops without torch's Python layers", "50 to 125 us a call become 15 to 35"),
    "kept memory": ("freed activations stay with the process", "no page faults: 7 % of a step's CPU time"),
}


def backward(run: Callable, inputs: list[torch.Tensor]) -> Callable[[], object]:
    """Forward and backward of run() with respect to inputs, for an upstream gradient of ones."""
    for tensor in inputs:
        tensor.requires_grad_()
    return lambda: torch.autograd.grad(run().sum(), inputs)


def pairs(batch: int, tokens: int, width: int, heads: int) -> dict[str, tuple[Callable, Callable]]:
    """(without, with) for every change that is a function, at the shapes of a decoder."""
    torch.manual_seed(0)
    kind = dict(dtype=torch.bfloat16)
    x = torch.randn(batch, tokens, width, **kind)
    weights = [torch.randn(*shape) / width**0.5 for shape in ((4 * width, width), (width, 4 * width), (768, width))]
    biases = [torch.zeros(len(w)) for w in weights]
    qkv = torch.randn(batch, tokens, 3 * width, **kind)
    images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8)
    ids = torch.rand(batch, 196).argsort(1)[:, : tokens - 1]
    statistics_ = dict(mean=(0.5,) * 3, std=(0.25,) * 3)

    def layers() -> torch.Tensor:
        hidden = ops.gelu(ops.linear(x, weights[0], biases[0]))
        return ops.linear(hidden, weights[1], biases[1])

    def autocast_linear() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.linear(x, weights[0], biases[0])

    def written_out() -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * (width // heads) ** -0.5
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def predict_then_loss() -> torch.Tensor:
        pred = ops.linear(x[:, 1:], weights[2], biases[2])
        return ops.masked_pixel_loss(pred, images, ids, 16, **statistics_)

    def fused_loss() -> torch.Tensor:
        return ops.linear_pixel_loss(x[:, 1:], weights[2], biases[2], images, ids, 16, **statistics_)

    small, parameters = torch.randn(4, 8), [*weights[:2], *biases[:2]]
    return {
        "linear": (
            backward(autocast_linear, [x, weights[0], biases[0]]),
            backward(lambda: ops.linear(x, weights[0], biases[0]), [x, weights[0], biases[0]]),
        ),
        "mlp": (
            backward(layers, [x, *parameters]),
            backward(lambda: ops.mlp(x, weights[0], biases[0], weights[1], biases[1]), [x, *parameters]),
        ),
        "attention": (backward(written_out, [qkv]), backward(lambda: ops.attention(qkv, heads), [qkv])),
        "linear_pixel_loss": (
            backward(predict_then_loss, [x, weights[2], biases[2]]),
            backward(fused_loss, [x, weights[2], biases[2]]),
        ),
        "direct ops": (lambda: torch.ops.fastkd.gelu(small), lambda: ops.gelu(small)),
    }


def row(name: str, without: list[float], with_: list[float], **more) -> dict:
    low, middle, high = quartiles([a / b for a, b in zip(without, with_)])
    return dict(
        benchmark="changes", change=name, ratio=middle, ratio_quartiles=[low, high], rounds=len(with_),
        seconds_without=statistics.median(without), seconds_with=statistics.median(with_), **more,
    )  # fmt: skip


def kept_memory(rounds: int, batch: int) -> dict:
    """A step in processes of their own, which give their memory back or keep it."""
    script = """if True:
        import json, resource, sys, time
        sys.path.insert(0, "benchmarks")
        from fastkd.train.host import keep_memory
        if sys.argv[1] == "with":
            keep_memory()
        import torch
        from baselines import Recipe, released
        from modes import Batch, Mode
        torch.manual_seed(0)
        recipe = Recipe("small", "tiny")
        mode, batch = Mode("exact", "bfloat16", released.DMAE(recipe), "cpu"), Batch.random(recipe, int(sys.argv[2]))
        for _ in range(3):
            mode.step(batch, 0.95)
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        for _ in range(3):
            mode.step(batch, 0.95)
        seconds = (time.perf_counter() - start) / 3
        print(json.dumps([seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / 3]))
    """
    found: dict[str, list[list[float]]] = {"without": [], "with": []}
    for _ in range(rounds):
        for name, runs in found.items():
            command = [sys.executable, "-c", script, name, str(batch)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    faults = {f"page_faults_{name}": statistics.median(run[1] for run in runs) for name, runs in found.items()}
    return row("kept memory", *([run[0] for run in runs] for runs in found.values()), **faults)


def table() -> str | None:
    """Markdown of the committed rows."""
    rows = {r["change"]: r for r in rows_of("changes_cpu")}
    if not rows:
        return None
    lines = []
    for name, (change, predicted) in PREDICTED.items():
        if name in rows:
            found = rows[name]
            low, high = found["ratio_quartiles"]
            measured = f"{found['ratio']:.2f}x ({low:.2f} - {high:.2f})"
            if "page_faults_with" in found:
                measured += (
                    f", {found['page_faults_without']:.0f} page faults a step become {found['page_faults_with']:.0f}"
                )
            lines.append([change, predicted, measured])
    any_row = next(iter(rows.values()))
    note = (
        f"<sub>Forward and backward at the decoder's shape, batch {any_row['batch']}; {any_row['device']}, "
        f"{any_row['threads']} threads, {any_row['rounds']} rounds, torch {any_row['torch']}, commit "
        f"{any_row['commit']}, {any_row['date']}</sub>"
    )
    return f"{markdown(['change', 'predicted', 'measured, time without / with'], lines, 3)}\n\n{note}"


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=4, help="pairs of processes for kept memory; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    args = parser.parse_args(argv)
    rows = []
    for name, both in pairs(args.batch, 197, 512, 16).items():
        repeat = 200 if name == "direct ops" else 1
        times: list[list[float]] = [[], []]
        for number in range(args.rounds + 2):
            for run, mine in zip(both, times):
                mine.append(seconds(run, "cpu", repeat))
            if number < 2:  # warm-up
                times = [[], []]
        rows.append(row(name, *times))
    if args.processes:
        rows.append(kept_memory(args.processes, args.batch))
    rows = [r | dict(batch=args.batch) | provenance("cpu") for r in rows]
    for r in rows:
        print(f"{r['change']}: {r['ratio']:.2f}x", r["ratio_quartiles"])
    write_rows(args.out / "changes_cpu.jsonl", rows)
    return rows


if __name__ == "__main__":
    main()
