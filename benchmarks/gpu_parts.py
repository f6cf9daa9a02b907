"""The parts of gpu_suite.py, each run in a process of its own: python benchmarks/gpu_parts.py PART --out DIR ..."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from common import DTYPES, ROOT, CopyRoof, MatmulRoof, provenance

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tests"))


class Part:
    """What every part has: where results go, the device, and how long it may take."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.device, self.dry_run, self.op = args.out, args.device, args.dry_run, args.op
        self.end = time.monotonic() + args.limit
        self.name = args.part

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def add(self, **row) -> None:
        """Writes a row at once: a part may be stopped at any time."""
        with open(self.out / f"{self.name}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def child(self, *command: str, limit: float | None = None, **environment: str) -> subprocess.CompletedProcess:
        """Runs a command, its output into this part's log too."""
        command = [str(c) for c in command]
        print("$", " ".join(command), flush=True)
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | environment, timeout=limit or self.left or 1,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
            output = output.decode(errors="replace") if isinstance(output, bytes) else output
            done = subprocess.CompletedProcess(command, 124, output)
        print(done.stdout, flush=True)
        return done

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return self.child(sys.executable, *arguments, **environment)


def build(part: Part) -> None:
    environment = {"FASTKD_REQUIRE_NATIVE": "1", "FASTKD_BUILD": "cpu,cuda" if part.device == "cuda" else "cpu"}
    if part.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        environment["FASTKD_CUDA_ARCHS"] = f"{major}{minor}" + ("a" if major >= 9 else "")
    if part.dry_run:
        print(f"dry run: nothing is built ({environment})")
        return
    done = part.python("setup.py", "-q", "build_ext", "--inplace", **environment)
    part.add(benchmark="gpu_build", exit=done.returncode, **environment)
    if done.returncode:
        raise SystemExit("the native libraries do not build")
    print("built:", ", ".join(p.name for p in sorted((ROOT / "fastkd/_lib").glob("*.so"))))


# Tests with cases of their own for a GPU: captured steps, kernels of the blocks, crops, 8-bit products, golden data.
ON_DEVICE = ("test_step.py", "test_blocks.py", "test_resized_crop.py", "test_teacher_precision.py", "test_masks.py",
             "test_linear_pixel_loss.py", "test_pack.py", "test_golden_[dm]*.py")  # fmt: skip


def device_backends(device: str) -> tuple[str, ...]:
    return ("reference", "triton", "cuda") if device == "cuda" else ("reference", "cpp")


def check(part: Part) -> None:
    """Every op in a process of its own, several at a time; tests that a GPU adds to beside them."""
    from fastkd.ops import SPECS

    common = ["--out", part.out, "--device", part.device] + (["--dry-run"] if part.dry_run else [])

    def one(name: str) -> int:
        script = [HERE / "gpu_parts.py", "check_op", "--op", name, *common, "--limit", f"{part.left:.0f}"]
        return part.python(*script).returncode

    def tests(path: Path) -> int:
        done = part.python("-m", "pytest", "-q", "-p", "no:cacheprovider", path)
        lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED") or " passed" in line]
        part.add(op=path.stem, check="pytest", passed=done.returncode == 0, message="; ".join(lines[-4:]))
        return done.returncode

    files = [path for pattern in ON_DEVICE for path in sorted((ROOT / "tests").glob(pattern))]
    files = files[: 1 if part.dry_run else None]
    names = list(SPECS)[: 2 if part.dry_run else None]
    with ThreadPoolExecutor(min(6, os.cpu_count() or 1)) as pool:
        codes = [pool.submit(tests, path) for path in files] + [pool.submit(one, name) for name in names]
        codes = [future.result() for future in codes]
    for name in names:
        path = part.out / f"check_{name}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            part.add(**json.loads(line))
        path.unlink(missing_ok=True)
    rows = [json.loads(line) for line in (part.out / "check.jsonl").read_text().splitlines()]
    passed, total = sum(r.get("passed", False) for r in rows), sum("passed" in r for r in rows)
    print(f"{passed} of {total} checks passed, {sum(map(bool, codes))} processes failed")
    if passed < total or any(codes):
        raise SystemExit(1)


def check_op(part: Part) -> None:
    from op_checks import check_accuracy, evaluate

    from fastkd.ops import SPECS, backend

    spec, part.name = SPECS[part.op], f"check_{part.op}"
    dtypes = [DTYPES[n] for n in (("float32",) if part.dry_run else DTYPES)]
    row = dict(benchmark="gpu_check", op=spec.name, device=provenance(part.device)["device"])
    for name in device_backends(part.device):
        reason = next(filter(None, (k.why_not(name, part.device, torch.float32) for k in spec.kernels)), None)
        if reason:
            part.add(**row, backend=name, skipped=reason)
            continue
        for case in list(spec.cases)[: 1 if part.dry_run else None]:
            for dtype in dtypes:
                kwargs = spec.build(spec.cases[case], dtype, part.device)
                known = row | dict(backend=name, case=case, dtype=str(dtype).removeprefix("torch."))
                message = ""
                try:
                    check_accuracy(spec, kwargs, dtype, name)
                    with backend(name):
                        first, again = (evaluate(spec, spec.function, kwargs) for _ in range(2))
                    pairs = zip(
                        [*first.outputs, *first.gradients.values()], [*again.outputs, *again.gradients.values()]
                    )
                    # torch's own index_add on a GPU, used by references, adds in any order.
                    if name != "reference" and not all(torch.equal(a, b) for a, b in pairs):
                        message = "two runs on the same inputs differ"
                except Exception as error:  # a row per failure, whatever it is; a broken device fails the rest too
                    message = f"{type(error).__name__}: {error}"
                part.add(**known, check="accuracy and reruns", passed=not message, message=message[:500])
        print(f"{spec.name} {name} done", flush=True)


def sanitize(part: Part) -> None:
    tool_path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if part.device != "cuda" or not Path(tool_path).exists():
        part.add(tool="compute-sanitizer", summary=f"not run: device {part.device}, tool {tool_path}")
        print("not run: it needs a GPU and compute-sanitizer")
        return

    def one(tool: str) -> bool:
        script = [
            sys.executable,
            HERE / "gpu_parts.py",
            "sanitize_run",
            "--out",
            part.out,
            "--limit",
            f"{part.left:.0f}",
        ]
        options = ["--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
        done = part.child(tool_path, *options, *script, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout)
        launched = re.findall(r"^sanitized (.*)$", done.stdout, re.MULTILINE)
        part.add(
            benchmark="gpu_sanitize", tool=tool, exit=done.returncode, summary=found[-1] if found else "no summary",
            kernels=launched, complete="all cases ran" in done.stdout,
        )  # fmt: skip
        return done.returncode == 0

    with ThreadPoolExecutor(2) as pool:
        clean = dict(zip(("memcheck", "racecheck"), pool.map(one, ("memcheck", "racecheck"))))
    print(", ".join(f"{tool}: {'clean' if ok else 'NOT clean or not finished'}" for tool, ok in clean.items()))
    if not all(clean.values()):
        raise SystemExit(1)


def sanitize_run(part: Part) -> None:
    """Runs under compute-sanitizer: the smallest cases of every kernel, forward and backward."""
    from op_checks import evaluate

    from fastkd.ops import SPECS, backend

    def size(spec, case: str) -> int:
        kwargs = spec.build(spec.cases[case], torch.float32, "cpu")
        return sum(v.numel() for v in kwargs.values() if isinstance(v, torch.Tensor))

    for spec in SPECS.values():
        cases = sorted(spec.cases, key=lambda case, s=spec: size(s, case))
        for name in ("triton", "cuda"):
            if any(k.why_not(name, "cuda", torch.float32) for k in spec.kernels):
                continue
            for case in (cases[0], cases[len(cases) // 2]):
                for dtype in (torch.float32, torch.bfloat16):
                    with backend(name):
                        evaluate(spec, spec.function, spec.build(spec.cases[case], dtype, "cuda"))
                    torch.cuda.synchronize()
                print(f"sanitized {spec.name} {name} {case}", flush=True)
                if part.left < 5:
                    print("stopped at the time limit")
                    return
    print("all cases ran")


def roofs(part: Part) -> None:
    known = provenance(part.device)
    copy = CopyRoof(part.device)
    for _ in range(3):
        copy.sample()
    part.add(benchmark="roof", roof="copy", gigabytes_per_second=copy.best / 1e9, **known)
    print(f"copy {copy.best / 1e9:.0f} GB/s", end="")
    for name in ("float32",) if part.dry_run else DTYPES:
        roof = MatmulRoof(DTYPES[name], part.device)
        for _ in range(0 if part.dry_run else 3):
            roof.sample()
        part.add(benchmark="roof", roof="matmul", dtype=name, tflops=roof.best / 1e12, shape=roof.shape, **known)
        print(f", matmul {name} {roof.best / 1e12:.4g} TFLOP/s", end="")
    print()


def ops(part: Part) -> None:
    small = (
        ["--small", "--no-compile", "--rounds", "1", "--ops", "random_masking"] if part.dry_run else ["--rounds", "3"]
    )
    dtypes = ["--dtypes", "float32" if part.dry_run else "bfloat16"]
    budget = ["--budget", f"{0.85 * part.left:.0f}"]
    done = part.python(HERE / "ops.py", "--device", part.device, "--out", part.out, *dtypes, *budget, *small)
    raise SystemExit(done.returncode)


def step(part: Part) -> None:
    """First all ratios without `compiled`, then ratio by ratio with it, as far as the time goes."""
    script = [HERE / "dmae_throughput.py", "--device", part.device, "--out", part.out]
    if part.dry_run:
        script += "--teacher micro --student micro --image 32 --patch 8 --decoder 2x64x2 --batch 4".split()
        script += "--dtypes float32 --rounds 2 --repeat 1 --ratios 0.75".split()
    modes = "released,eager,exact_eager,exact,decode_25,cross"
    plain = part.python(*script, "--modes", modes, "--budget", f"{0.5 * part.left:.0f}")
    code = plain.returncode
    for mode in () if part.dry_run else ("max-autotune-no-cudagraphs", "max-autotune"):
        if part.left < 60:
            break
        more = ["--modes", "released,eager,compiled,exact", "--compile-mode", mode, "--tag", f"_{mode}"]
        more += ["--ratios", "0.95,0.75,0.98,0.9", "--budget", f"{0.6 * part.left:.0f}"]
        code = part.python(*script, *more).returncode or code
    print("step: done" if code == 0 else f"step: exit {code}")
    raise SystemExit(code)


def profile(part: Part) -> None:
    script = [HERE / "step_profile.py", "--device", part.device, "--out", part.out]
    if part.dry_run:
        script += "--tiny --batch 2 --dtype float32".split()
    codes = []
    for ratio in ("0.75",) if part.dry_run else ("0.95", "0.75"):
        counters = ["--ncu", "--limit", f"{0.6 * part.left:.0f}"] if ratio == "0.95" and part.device == "cuda" else []
        codes.append(part.python(*script, "--ratio", ratio, *counters).returncode)
    raise SystemExit(max(codes))


def data(part: Part) -> None:
    """Loaders alone, then the step that they feed."""
    common = ["--device", part.device, "--out", part.out, "--workers", str(max(1, (os.cpu_count() or 1) - 2))]
    alone, fed = ["--batch", "128"], []
    if part.dry_run:
        alone = "--pictures 8 --batch 4 --batches 1 --rounds 1".split()
        fed = "--pictures 8 --batch 2 --steps 1 --rounds 1 --ratios 0.95 --teacher micro --student micro".split()
    codes = [part.python(HERE / "loaders.py", *common, *alone), part.python(HERE / "fed_step.py", *common, *fed)]
    raise SystemExit(max(done.returncode for done in codes))


def teacher(part: Part) -> None:
    rounds = "1" if part.dry_run else "7"
    script = [HERE / "teacher_precision.py", "--speed", "--device", part.device, "--out", part.out, "--rounds", rounds]
    raise SystemExit(part.python(*script).returncode)


PARTS = (build, check, check_op, sanitize, sanitize_run, roofs, ops, step, profile, data, teacher)
FUNCTIONS = {f.__name__: f for f in PARTS}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=FUNCTIONS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=float, default=600)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--op")
    arguments = parser.parse_args()
    FUNCTIONS[arguments.part](Part(arguments))
