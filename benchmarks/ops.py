"""Times every op on its realistic cases: forward and backward, per backend, against eager and compiled PyTorch.

    python benchmarks/ops.py                              # all ops, float32 and bfloat16
    python benchmarks/ops.py --ops attention --dtypes bfloat16

Cases, reference, byte and FLOP counts come from each op's OpSpec. Accuracy is checked first (error against float64 at
most twice that of PyTorch in the same dtype); a backend that fails is reported and not timed. GB/s are the fewest
bytes that the op must move over the measured time, so that a kernel that moves more shows less; the roof is a large
copy in the same run. On a GPU the L2 cache is flushed before each call, and `graph` is the time in a CUDA graph.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peers
import torch
from common import DTYPES, ROOT, CopyRoof, MatmulRoof, paired_ratio, provenance, quartiles, seconds, write_rows

sys.path.insert(0, str(ROOT / "tests"))

from op_checks import check_accuracy  # noqa: E402

from fastkd.ops import SPECS, OpSpec, backend  # noqa: E402
from fastkd.train.host import keep_memory  # noqa: E402


def contender(spec: OpSpec, function: Callable, kwargs: dict) -> Callable[[], object]:
    """Runs function(**kwargs) forward and, where it has gradients, backward."""
    kwargs = dict(kwargs)
    wanted = [n for n in spec.differentiable if isinstance(kwargs.get(n), torch.Tensor)]
    for name in wanted:
        kwargs[name] = kwargs[name].detach().requires_grad_()
    if not wanted:
        return lambda: function(**kwargs)
    inputs = [kwargs[n] for n in wanted]
    with torch.no_grad():
        result = function(**kwargs)
    upstream = [torch.ones_like(o) for o in (result if isinstance(result, tuple) else (result,))]

    def run():
        result = function(**kwargs)
        return torch.autograd.grad(result if isinstance(result, tuple) else (result,), inputs, upstream)

    return run


def forced(name: str, run: Callable) -> Callable:
    def inside():
        with backend(name):
            return run()

    return inside


def backends_of(spec: OpSpec, device: str, dtype: torch.dtype) -> dict[str, str | None]:
    """Native and Triton backends, each with the reason why it cannot run here (None where it can)."""
    wanted = ("triton", "cuda") if device == "cuda" else ("cpp",)
    return {
        name: next(filter(None, (kernel.why_not(name, device, dtype) for kernel in spec.kernels)), None)
        for name in wanted
    }


def contenders(spec: OpSpec, kwargs: dict, dtype: torch.dtype, device: str, compiled: bool, say) -> dict[str, Callable]:
    found = {"eager": contender(spec, spec.reference, kwargs)}
    others = peers.of(spec.name, device) | published(spec.name)
    for name, function in others.items():
        try:
            found[name] = contender(spec, function, kwargs)
            if not agree(found[name](), found["eager"](), dtype):
                raise AssertionError("does not compute the same; not timed")
        except Exception as error:  # another library, another set of shapes
            found.pop(name, None)
            say(f"{spec.name} {dtype} {name}: {type(error).__name__}: {str(error)[:200]}")
    if compiled:
        found["compiled"] = contender(spec, torch.compile(spec.reference, dynamic=False), kwargs)
    for name, reason in backends_of(spec, device, dtype).items():
        if reason is None:
            try:
                check_accuracy(spec, kwargs, dtype, name)
            except AssertionError as error:
                reason = f"WRONG, not timed: {error}"
        if reason is not None:
            say(f"{spec.name} {dtype} {name}: {reason}")
            continue
        found[name] = forced(name, contender(spec, spec.function, kwargs))
    return found


def agree(one: object, other: object, dtype: torch.dtype) -> bool:
    """Whether two contenders give the same results, as far as their different roundings allow."""
    pairs = zip(*(list(x) if isinstance(x, (tuple, list)) else [x] for x in (one, other)))
    allowed = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    return all(
        float((a.double() - b.double()).abs().max()) <= allowed * float(b.double().abs().max().clamp_min(1e-30))
        for a, b in pairs
        if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel()
    )


def published(op: str) -> dict[str, Callable]:
    """The same loss as its authors compute it, where ``baselines/published/<op>.py`` has it."""
    if importlib.util.find_spec(f"baselines.published.{op}") is None:
        return {}
    return {"published": importlib.import_module(f"baselines.published.{op}").published}


def graph_seconds(run: Callable) -> float | None:
    """Seconds of one replay of run() in a CUDA graph, L2 flushed; None where it cannot be captured."""
    from triton.testing import do_bench

    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return do_bench(graph.replay, warmup=5, rep=40, return_mode="median") / 1e3
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def measure(found: dict[str, Callable], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds per round and contender, in turn."""
    if device == "cuda":
        from triton.testing import do_bench

        def once(run: Callable) -> float:
            return do_bench(run, warmup=5, rep=20, return_mode="median") / 1e3

    else:
        for run in found.values():
            run()
        # A sample lasts at least 5 ms, so that a short op is not timed by the scheduler's whims.
        repeat = {run: max(1, min(500, round(5e-3 / seconds(run, device)))) for run in found.values()}

        def once(run: Callable) -> float:
            return seconds(run, device, repeat[run])

    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, run in found.items():
            times[name].append(once(run))
    return times


def bench_case(spec: OpSpec, case: str, dtype_name: str, args: argparse.Namespace, copy: CopyRoof, say) -> list[dict]:
    dtype, device = DTYPES[dtype_name], args.device
    table = spec.cases if args.small else spec.bench
    kwargs = spec.build(table[case], dtype, device)
    found = contenders(spec, kwargs, dtype, device, not args.no_compile, say)
    times = measure(found, device, args.rounds)
    copy.sample()
    moved, work = spec.bytes_moved(kwargs), spec.flops(kwargs)
    rows = []
    for name, mine in times.items():
        low, middle, high = quartiles(mine)
        row = dict(
            benchmark="ops", op=spec.name, case=case, dtype=dtype_name, backend=name, seconds=middle,
            seconds_quartiles=[low, high], rounds=args.rounds, bytes_moved=moved, flops=work,
            gigabytes_per_second=moved / middle / 1e9, tflops=work / middle / 1e12,
        )  # fmt: skip
        for peer in ("eager", "compiled", "published", *peers.NAMES):
            row[f"speedup_vs_{peer}"] = paired_ratio(times[peer], mine) if peer in times else None
        if device == "cuda":
            row["graph_seconds"] = graph_seconds(found[name])
        rows.append(row)
    return rows


def show(rows: list[dict]):
    from rich.table import Table

    first = rows[0]
    table = Table(
        title=f"forward + backward, {first['device']}, copy roof {first['copy_roof_gigabytes_per_second']:.0f} GB/s"
    )
    names = ["op", "case", "dtype", "backend", "ms", "GB/s", "% copy roof", "TFLOP/s", "x eager", "x compiled"]
    for name in names:
        table.add_column(name, justify="left" if name in names[:4] else "right", no_wrap=True)
    for row in rows:
        compiled = row["speedup_vs_compiled"]
        table.add_row(
            row["op"], row["case"], row["dtype"], row["backend"], f"{1e3 * row['seconds']:.3g}",
            f"{row['gigabytes_per_second']:.3g}", f"{100 * row['copy_roof_fraction']:.0f}", f"{row['tflops']:.3g}",
            f"{row['speedup_vs_eager']:.2f}", f"{compiled:.2f}" if compiled else "-",
        )  # fmt: skip
    return table


def main(argv: list[str] | None = None) -> list[dict]:
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", help="names, default all")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of the reference")
    parser.add_argument("--small", action="store_true", help="the tests' small cases instead of the realistic ones")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no new case is begun")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    args = parser.parse_args(argv)
    unknown = set(args.ops.split(",") if args.ops else ()) - set(SPECS)
    if unknown:
        parser.error(f"--ops: got {', '.join(sorted(unknown))}, expected some of {', '.join(SPECS)}")
    console, started = Console(width=None if sys.stdout.isatty() else 150), time.perf_counter()
    keep_memory()  # for every contender, or page faults of fresh memory would be timed
    copy, rows, known = CopyRoof(args.device), [], provenance(args.device)
    roofs = {dtype: MatmulRoof(DTYPES[dtype], args.device).best for dtype in args.dtypes.split(",")}

    def finished() -> list[dict]:
        for row in rows:
            row["copy_roof_gigabytes_per_second"] = copy.best / 1e9
            row["copy_roof_fraction"] = row["gigabytes_per_second"] * 1e9 / copy.best
            row["matmul_roof_tflops"] = roofs[row["dtype"]] / 1e12
        return [row | known for row in rows]

    for name, spec in SPECS.items():
        if args.ops and name not in args.ops.split(","):
            continue
        cases = list(spec.cases)[:1] if args.small else list(spec.bench)
        for case in cases:
            for dtype in args.dtypes.split(","):
                if time.perf_counter() - started > args.budget:
                    console.print(f"{name} {case} {dtype}: left out, the budget of {args.budget:.0f} s is used up")
                    continue
                rows += bench_case(spec, case, dtype, args, copy, console.print)
                write_rows(args.out / f"ops_{args.device}.jsonl", finished())
    if rows:
        console.print(show(finished()))
    console.print(f"{time.perf_counter() - started:.0f} s; rows: {args.out}/ops_{args.device}.jsonl")
    return finished()


if __name__ == "__main__":
    main()
