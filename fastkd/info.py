"""``python -m fastkd.info``: what is installed, what was built, and which backend each op takes here and why."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import torch

from fastkd import __version__, _native
from fastkd.ops._dispatch import BACKENDS, Kernel, device_record, forced_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONAL = ("triton", "timm", "transformers", "onnx", "scikit-learn", "matplotlib", "torchvision")


def collect() -> dict:
    """Everything that the report shows, as plain values."""
    return dict(
        versions=_versions(),
        cpu=dict(model=_cpu_model(), cores=os.cpu_count(), features=sorted(_native.cpu_features())),
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        native=_libraries(),
        forced_backend=forced_backend(),
        ops=[_op(kernel) for kernel in Kernel.all.values()],
        missing=_missing(),
    )


def main(as_json: bool = False) -> int:
    """Prints the report."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        _show(facts)
    return 0


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = dict(fastkd=__version__, python=platform.python_version(), torch=torch.__version__)
    for name in OPTIONAL:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _libraries() -> dict:
    info = _native.build_info()
    loaded = _native.library_path("cpu") if _native.why_not_loaded("cpu") is None else None
    return dict(
        built=info.get("libraries", {}),
        not_built=info.get("not_built", {}),
        date=info.get("date"),
        torch_headers=info.get("torch_headers"),
        cpu_loaded=loaded.name if loaded else None,
        cpu_problem=_native.why_not_loaded("cpu"),
        cuda_problem=_native.why_not_loaded("cuda"),
    )


def _op(kernel: Kernel) -> dict:
    """For each device the backend per dtype, and the other backends with the reason why they are not taken."""
    devices = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        chosen = {str(dtype).removeprefix("torch."): _pick(kernel, device, dtype) for dtype in DTYPES}
        devices[device] = dict(backend=chosen, why_not=_why_not(kernel, device, set(chosen.values())))
    return dict(name=kernel.name, devices=devices, gpu_record=device_record().get(kernel.name))


def _pick(kernel: Kernel, device: str, dtype: torch.dtype) -> str:
    try:
        return kernel.pick(device, dtype)
    except RuntimeError:  # a forced backend that cannot run; why_not says so
        return "none"


def _why_not(kernel: Kernel, device: str, chosen: set[str]) -> dict[str, str]:
    reasons = {}
    for backend in BACKENDS:
        if backend not in chosen:
            reason = kernel.why_not(backend, device, torch.float32)
            reasons[backend] = reason or f"it could run; {' then '.join(kernel.order(device))} is the order here"
    return reasons


def _missing() -> list[str]:
    """What would make this installation better, each with the next command."""
    found = []
    for kind in ("cpu", "cuda"):
        problem = _native.why_not_loaded(kind)
        if problem and (kind == "cpu" or torch.cuda.is_available()):
            found.append(problem)
    extras = dict(timm="models", transformers="models", onnx="models")
    absent = [name for name in extras if _versions()[name] is None]
    if absent:
        what = "not installed (reading and writing their models)"
        found.append(f"{', '.join(absent)} {what}: pip install 'fastkd[models]'")
    if torch.cuda.is_available() and _versions()["triton"] is None:
        found.append("triton is not installed (GPU kernels): pip install triton")
    return found


def _show(facts: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)

    def line(title: str, text: str) -> None:
        console.print(f"[bold]{title:<10}[/]", end="")
        console.print(text, markup=False)

    line("versions", "  ".join(f"{name} {version or '(absent)'}" for name, version in facts["versions"].items()))
    cpu, native = facts["cpu"], facts["native"]
    line("CPU", f"{cpu['model']}, {cpu['cores']} cores: {' '.join(cpu['features']) or 'features unknown'}")
    line("GPU", ", ".join(facts["gpus"]) or "none that torch sees")
    built = "built {date} for torch headers {torch_headers}" if native["date"] else "no build record"
    line("native", f"{built.format(**native)}; CPU library in use: {native['cpu_loaded'] or 'none'}")
    for name, flags in native["built"].items():
        line("", f"{name}: {flags}")
    for name, reason in native["not_built"].items():
        line("", f"{name}: not built: {reason}")
    if facts["forced_backend"]:
        line("forced", f"FASTKD_BACKEND={facts['forced_backend']}: every op takes this backend")
    for device in facts["ops"][0]["devices"]:
        table = Table(box=None, pad_edge=False)
        for column in (f"op on {device}", "backend", "measured on a GPU"):
            table.add_column(column, no_wrap=True)
        for op in facts["ops"]:
            backends = _by_dtype(op["devices"][device]["backend"])
            table.add_row(op["name"], backends, _measured(op["gpu_record"]))
        console.print()
        console.print(table)
        console.print("\n[bold]why not the others[/]")
        for (backend, reason), names in _grouped(facts["ops"], device).items():
            which = "all ops" if len(names) == len(facts["ops"]) else ", ".join(names)
            console.print(f"  {backend}: {reason} ({which})", markup=False)
    if facts["missing"]:
        console.print("\n[bold]to do[/]")
        for text in facts["missing"]:
            console.print(f"  {text}", markup=False)


def _measured(record: dict | None) -> str:
    if record is None:
        return "never ran on a GPU"
    checked = ", ".join(f"{backend} {count} right" for backend, count in record["checked"].items())
    return f"{record['device']}: {checked}; fastest {record.get('fastest', 'not timed')}"


def _by_dtype(chosen: dict[str, str]) -> str:
    """``cpp`` where all dtypes take it, else ``triton; reference for float64``."""
    groups: dict[str, list[str]] = {}
    for dtype, backend in chosen.items():
        groups.setdefault(backend, []).append(dtype)
    first, *others = groups.items()
    return "; ".join([first[0], *(f"{backend} for {', '.join(dtypes)}" for backend, dtypes in others)])


def _grouped(ops: list[dict], device: str) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for op in ops:
        for backend, reason in op["devices"][device]["why_not"].items():
            groups.setdefault((backend, reason), []).append(op["name"])
    return groups


if __name__ == "__main__":
    sys.exit(main("--json" in sys.argv[1:]))
