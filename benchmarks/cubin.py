"""Compiles every Triton kernel for sm_80, sm_90 and sm_100 without a GPU and shows registers and spills.

    python benchmarks/cubin.py [--arch 80 90 100] [--dtype bfloat16 float32] [--out FILE]

Nothing is listed by hand: each op runs forward and backward on CPU tensors of its benchmark shapes while a stand-in for
the GPU driver turns every launch into a compilation with exactly the specialisation that the launch would get. Kernels
that no benchmark shape reaches are taken from the op's test cases. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from common import DTYPES, provenance, write_rows

from fastkd.ops import SPECS, OpSpec, backend
from fastkd.ops._dispatch import Kernel
from fastkd.ops.blocks import linear

ARCHS = (80, 90, 100)


class _Driver:
    """What `JITFunction.run` asks of a driver before it compiles; one "device" per architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list]:
    """Inside, Triton launches on CPU tensors compile for `arch` and do not run; yields (name, compiled kernel)s."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled = []
    run, why_not, by_vendor = JITFunction.run, Kernel.why_not, linear.by_vendor

    def compile_instead(self, *args, grid, warmup, **kwargs):
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_instead
    Kernel.why_not = lambda self, name, device, dtype: None if name == "triton" else why_not(self, name, device, dtype)
    linear.by_vendor = lambda x: True  # as on CUDA
    driver.set_active(_Driver(arch))
    try:
        with backend("triton"):
            yield compiled
    finally:
        JITFunction.run, Kernel.why_not, linear.by_vendor = run, why_not, by_vendor
        driver._active = None


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of local memory a thread: spills and indexed arrays."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return dict(registers=int(found["REG"]), local_bytes=int(found["STACK"]) + int(found["LOCAL"]))


def run_both_ways(spec: OpSpec, case: dict, dtype: torch.dtype) -> None:
    """Calls an op and differentiates it; the numbers mean nothing here."""
    kwargs = spec.build(case, dtype, "cpu")
    wanted = [kwargs[name] for name in spec.differentiable if isinstance(kwargs.get(name), torch.Tensor)]
    for tensor in wanted:
        tensor.requires_grad_()
    result = spec.function(**kwargs)
    outputs = list(result) if isinstance(result, tuple) else [result]
    if wanted:
        torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])


def triton_specs() -> list[OpSpec]:
    return [spec for spec in SPECS.values() if all(kernel._triton for kernel in spec.kernels)]


def kernel_names(spec: OpSpec) -> set[str]:
    """Every launched kernel of an op's Triton modules, by the naming rule ``_<what>_kernel``."""
    modules = {kernel._triton.split(":")[0] for kernel in spec.kernels}
    names = (name for module in modules for name in vars(importlib.import_module(module)))
    return {name for name in names if re.fullmatch(r"_\w+_kernel", name)}


def measure(spec: OpSpec, arch: int, dtype: torch.dtype) -> list[dict]:
    """One row per kernel and distinct specialisation of an op."""
    rows, seen = [], set()
    for name, case in {**spec.bench, **{f"test {n}": c for n, c in spec.cases.items()}}.items():
        missing = kernel_names(spec) - {row["kernel"] for row in rows}
        if name.startswith("test ") and not missing:
            break
        with compile_only(arch) as compiled:
            run_both_ways(spec, case, dtype)
        for kernel, binary in compiled:
            if binary.hash in seen or (name.startswith("test ") and kernel not in missing):
                continue
            seen.add(binary.hash)
            used = {"shared": "shared", "warps": "num_warps", "stages": "num_stages"}
            options = {column: getattr(binary.metadata, name) for column, name in used.items()}
            row = dict(op=spec.name, kernel=kernel, case=name, dtype=str(dtype).removeprefix("torch."), arch=arch)
            rows.append({**row, **resources(binary.asm["cubin"]), **options})
    return rows


def table(rows: list[dict]) -> str:
    columns = ["op", "kernel", "case", "dtype", "arch", "registers", "local_bytes", "shared", "warps", "stages"]
    cells = [columns] + [[str(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, help="write the rows to this JSONL file too")
    args = parser.parse_args()
    rows = []
    for spec in triton_specs():
        for dtype in args.dtype:
            for arch in args.arch:
                rows += measure(spec, arch, DTYPES[dtype])
    print(table(rows))
    if args.out:
        common = dict(benchmark="cubin", **provenance("cpu"))
        write_rows(args.out, [{**common, **row} for row in rows])


if __name__ == "__main__":
    sys.exit(main())
