"""Builds the native libraries. torch is never imported here: its headers and libfiles are all that is needed.

    fastkd/_lib/libfastkd_cpu_<variant>.so   CPU ops, torch's stable ABI, one library per CPU feature level
    fastkd/_lib/libfastkd_cuda.so            CUDA ops, where nvcc is found (no GPU needed)
    fastkd/_host.*.so                        pybind11 module for what takes Python objects

Environment variables:
    FASTKD_BUILD=cpu,cuda    parts to build (default both; FASTKD_BUILD=none installs pure Python)
    FASTKD_CPU_VARIANTS      default on x86-64: avx2 and the best of avx512 and amx that this CPU has
    FASTKD_CUDA_ARCHS        default 80,90a,100, as far as nvcc knows them
    FASTKD_REQUIRE_NATIVE=1  fail instead of installing without what could not be built
"""

import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_FLOOR = (2, 10)
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10
VARIANT_FLAGS = {
    "amx": ["-march=sapphirerapids"],
    "avx512": ["-march=x86-64-v4"],
    "avx2": ["-march=x86-64-v3"],
    "generic": [],
}


def find_torch() -> Path | None:
    """torch's folder: importable here, or installed where this package is going (visible under build isolation)."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    for folder in folders:
        version = folder / "version.py"
        if (folder / "include/torch/csrc/stable/library.h").exists() and version.exists():
            if tuple(map(int, torch_version(folder).split(".")[:2])) >= TORCH_FLOOR:
                return folder
    return None


def torch_version(folder: Path) -> str:
    return re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text()).group(1)


def find_cuda() -> Path | None:
    """The CUDA toolkit, found by its headers: nvcc on the PATH may be a wrapper script somewhere else."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if shutil.which("nvcc"):
        candidates.append(str(Path(shutil.which("nvcc")).resolve().parent.parent))
    for folder in filter(None, candidates):
        if (Path(folder) / "include/cuda_runtime.h").exists() and (Path(folder) / "bin/nvcc").exists():
            return Path(folder)
    return None


def default_variants() -> str:
    """What serves this CPU best and, for other machines that share the installation, what nearly every x86-64 has."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "generic"
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    best = "amx" if {"amx_bf16", "avx512_fp16"} <= flags else "avx512" if {"avx512vl", "avx512bw"} <= flags else None
    return f"avx2,{best}" if best else "avx2"


def run(command: list) -> None:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")


class NativeBuild(build_ext):
    """Builds _host the usual way, then the torch libraries beside it."""

    def run(self) -> None:
        self.jobs = ThreadPoolExecutor(os.cpu_count() or 1)
        self.compiler_path = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        self.torch = find_torch()
        inplace = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "fastkd" if inplace else Path(self.build_lib) / "fastkd"
        self.folder = package / "_lib"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.info = {"libraries": {}, "not_built": {}}
        earlier = self.earlier_libraries()
        parts = {"cpu": self.build_cpu, "cuda": self.build_cuda}
        wanted = os.environ.get("FASTKD_BUILD", "cpu,cuda").split(",")
        for part, build in parts.items():
            if part not in wanted and any(library.startswith(part) for library in earlier):
                continue
            reason = None if part in wanted else f"FASTKD_BUILD={','.join(wanted)} left it out"
            reason = reason or self.missing() or build()
            if reason:
                self.info["not_built"][part] = reason
                earlier = {library: flags for library, flags in earlier.items() if not library.startswith(part)}
                print(f"fastkd: the native {part} library is NOT built: {reason}", file=sys.stderr)
                if os.environ.get("FASTKD_REQUIRE_NATIVE") == "1" and part in wanted:
                    raise SystemExit(f"fastkd: FASTKD_REQUIRE_NATIVE=1 and {part} cannot be built: {reason}")
        if self.info["libraries"]:
            for extension in self.extensions:
                extension.include_dirs = [str(self.torch / "include")]
            super().run()
        else:
            self.extensions = []
        self.info["libraries"] = {**earlier, **self.info["libraries"]}
        self.info.update(
            date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            machine=platform.machine(),
            torch_headers=torch_version(self.torch) if self.torch else None,
        )
        (self.folder / "build.json").write_text(json.dumps(self.info, indent=1))

    def earlier_libraries(self) -> dict[str, str]:
        """Libraries of an earlier build into the same folder: what this run leaves out stays, and stays on record."""
        record = self.folder / "build.json"
        earlier = json.loads(record.read_text())["libraries"] if record.exists() else {}
        return {name: flags for name, flags in earlier.items() if (self.folder / f"libfastkd_{name}.so").exists()}

    def missing(self) -> str | None:
        if sys.platform != "linux":
            return f"native code is built on Linux only (this is {sys.platform})"
        if not self.compiler_path:
            return "no C++ compiler found; install g++ (Debian/Ubuntu: apt-get install g++) and reinstall"
        if not self.torch:
            return f"no headers of torch >= {TORCH_FLOOR[0]}.{TORCH_FLOOR[1]} found; pip install torch and reinstall"
        return None

    def flags(self) -> list[str]:
        return [
            "-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno",
            "-fno-trapping-math", "-Wall", "-Wno-unknown-pragmas", TARGET,
            f"-I{self.torch / 'include'}", f"-I{ROOT / 'csrc'}",
        ]  # fmt: skip

    def build_cpu(self) -> str | None:
        variants = os.environ.get("FASTKD_CPU_VARIANTS", default_variants()).split(",")
        link = ["-shared", f"-L{self.torch / 'lib'}", "-ltorch_cpu"]

        def build(variant: str) -> tuple[str, str | None]:
            command = [
                self.compiler_path, *self.flags(), *VARIANT_FLAGS[variant], f'-DFASTKD_VARIANT="{variant}"',
                ROOT / "csrc/ops.cpp", "-o", self.folder / f"libfastkd_cpu_{variant}.so", *link,
            ]  # fmt: skip
            try:
                run(command)
            except RuntimeError as error:
                return variant, str(error)
            return variant, None

        results = dict(self.jobs.map(build, variants))
        for variant, error in results.items():
            if error is None:
                flags = self.flags()[:-3] + VARIANT_FLAGS[variant]
                self.info["libraries"][f"cpu_{variant}"] = f"{Path(self.compiler_path).name} {' '.join(flags)}"
        failed = {v: e for v, e in results.items() if e}
        for variant, error in failed.items():
            print(f"fastkd: CPU variant {variant} does not compile:\n{error[-3000:]}", file=sys.stderr)
        return f"the compiler failed on {', '.join(failed)}: see the build log (pip install -v)" if failed else None

    def build_cuda(self) -> str | None:
        cuda = find_cuda()
        if cuda is None:
            return "no CUDA toolkit found; set CUDA_HOME to a folder with include/cuda_runtime.h and bin/nvcc"
        sources = sorted((ROOT / "csrc").glob("*.cu"))
        archs = self.cuda_archs(cuda)
        if not archs:
            return f"{cuda}/bin/nvcc knows none of the wanted GPU architectures; set FASTKD_CUDA_ARCHS"
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        gencode += [f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"]  # PTX, for GPUs that come later
        with tempfile.TemporaryDirectory() as scratch:
            scratch = Path(scratch)
            compile_cu = [cuda / "bin/nvcc", "-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-c",
                          "--threads", "0", f"-I{ROOT / 'csrc'}", *gencode]  # fmt: skip
            glue = [self.compiler_path, *self.flags(), "-DFASTKD_CUDA", "-DUSE_CUDA", f"-I{cuda / 'include'}", "-c",
                    ROOT / "csrc/ops.cpp", "-o", scratch / "ops.o"]  # fmt: skip
            commands = [[*compile_cu, source, "-o", scratch / f"{source.stem}.o"] for source in sources]
            # torch's CUDA library may not exist here (CPU-only torch): link against an empty stand-in of its name.
            (scratch / "empty.c").write_text("")
            stand_in = ["-shared", "-Wl,-soname,libtorch_cuda.so", "-o", scratch / "libtorch_cuda.so"]
            commands += [glue, [self.compiler_path, scratch / "empty.c", *stand_in]]
            try:
                list(self.jobs.map(run, commands))
                objects = [scratch / f"{source.stem}.o" for source in sources] + [scratch / "ops.o"]
                run([
                    cuda / "bin/nvcc", "-shared", "--cudart", "static", *gencode, *objects,
                    "-o", self.folder / "libfastkd_cuda.so", f"-L{self.torch / 'lib'}", "-ltorch_cpu",
                    f"-L{scratch}", "-Xlinker", "--no-as-needed", "-ltorch_cuda",
                ])  # fmt: skip
            except RuntimeError as error:
                print(f"fastkd: the CUDA library does not build:\n{str(error)[-3000:]}", file=sys.stderr)
                return "nvcc or the linker failed: see the build log (pip install -v)"
        self.info["libraries"]["cuda"] = f"nvcc {' '.join(gencode)}"
        return None

    def cuda_archs(self, cuda: Path) -> list[str]:
        known = subprocess.run([cuda / "bin/nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout
        wanted = os.environ.get("FASTKD_CUDA_ARCHS", "80,90a,100").split(",")
        return [a for a in wanted if f"sm_{a.rstrip('af')}" in known.split()]


setup(
    ext_modules=[Extension("fastkd._host", ["csrc/host.cpp"], extra_compile_args=["-O2", "-std=c++17"])],
    cmdclass={"build_ext": NativeBuild},
    # setuptools hands this to pip as a build requirement, so a bare machine gets headers to compile against.
    setup_requires=[] if find_torch() else [f"torch>={TORCH_FLOOR[0]}.{TORCH_FLOOR[1]}"],
)
