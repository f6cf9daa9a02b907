"""What setup.py builds, what it says where it cannot, and what the libraries may depend on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastkd
from fastkd import _native

ROOT = Path(__file__).parents[1]
LIBRARIES = sorted(_native.FOLDER.glob("*.so"))


def undefined(library: Path) -> list[str]:
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in listing.stdout.splitlines() if line.split()[-2] == "U"]


@pytest.mark.skipif(not shutil.which("nm"), reason="nm (binutils) is not installed")
@pytest.mark.skipif(not LIBRARIES, reason="no native library is built")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_libraries_use_the_stable_abi_only(library):
    """No Python symbols, and of torch only the C symbols of its stable ABI: one binary for many versions."""
    names = undefined(library)
    assert not [n for n in names if re.match(r"_?Py[A-Z_]", n)]
    unversioned = [n for n in names if "@" not in n]  # versioned ones are those of libc and libstdc++
    assert unversioned and all(n.startswith(("aoti_torch_", "torch_", "cuda", "__cuda")) for n in unversioned), names
    assert not [n for n in names if "c10" in n or "2at" in n]


@pytest.mark.skipif(not LIBRARIES, reason="no native library is built")
def test_build_record_matches_the_libraries():
    info = _native.build_info()
    assert {f"libfastkd_{kind}" for kind in info["libraries"]} <= {path.stem for path in LIBRARIES}
    for flags in info["libraries"].values():
        assert flags.split()[0] and " -" in flags
    assert not set(info["not_built"]) & {kind.split("_")[0] for kind in info["libraries"]}
    assert re.match(r"\d+\.\d+", info["torch_headers"]) and info["machine"] and info["date"]


def test_the_best_variant_that_the_cpu_has_is_taken(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTKD_CPU_LIBRARY", raising=False)
    monkeypatch.setattr(_native, "FOLDER", tmp_path)
    everything = frozenset(feature for needed in _native.CPU_VARIANTS.values() for feature in needed)
    features = {"amx": everything, "avx512": everything - {"amx_tile"}, "avx2": everything - {"amx_tile", "avx512f"}}
    for built in (["avx2"], ["avx2", "avx512"], ["avx2", "avx512", "amx"]):
        (tmp_path / f"libfastkd_cpu_{built[-1]}.so").touch()
        for best, has in features.items():
            monkeypatch.setattr(_native, "cpu_features", lambda has=has: has)
            order = ["amx", "avx512", "avx2"]
            wanted = next(v for v in order[order.index(best) :] if v in built)
            assert _native.library_path("cpu").name == f"libfastkd_cpu_{wanted}.so"
    monkeypatch.setattr(_native, "cpu_features", frozenset)
    assert _native.library_path("cpu") is None


@pytest.fixture
def sources(tmp_path):
    """A copy of what an installation is made from, without built files."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "fastkd"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("_lib", "*.so", "__pycache__", "assets")
        )
    return folder


def build(sources: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, dict]:
    """Runs setup.py build_ext; returns the process and what it recorded."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("building needs setuptools >= 77: pip install -U setuptools")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("FASTKD_", "CXX", "CUDA_"))}
    command = [sys.executable, "setup.py", "-q", "build_ext", *(arguments or ["--build-lib", "out"])]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True, env={**plain, **environment})
    record = sources / ("fastkd" if "--inplace" in arguments else "out/fastkd") / "_lib/build.json"
    return done, json.loads(record.read_text()) if record.exists() else {}


def test_without_a_compiler_the_package_is_pure_python(sources, tmp_path):
    (tmp_path / "empty").mkdir()
    done, record = build(sources, PATH=str(tmp_path / "empty"), FASTKD_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found; install g++" in record["not_built"]["cpu"]
    assert "the native cpu library is NOT built: no C++ compiler" in done.stderr
    assert record["libraries"] == {} and not list(sources.rglob("*.so"))


def test_require_native_fails_instead(sources, tmp_path):
    (tmp_path / "empty").mkdir()
    done, _ = build(sources, PATH=str(tmp_path / "empty"), FASTKD_REQUIRE_NATIVE="1")
    assert done.returncode != 0 and "FASTKD_REQUIRE_NATIVE=1 and cpu cannot be built: no C++ compiler" in done.stderr


def test_parts_can_be_left_out_in_place(sources):
    done, record = build(sources, "--inplace", FASTKD_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert set(record["not_built"]) == {"cpu", "cuda"} and "left it out" in record["not_built"]["cpu"]


def test_a_failing_compiler_is_reported_and_installation_goes_on(sources):
    done, record = build(sources, CXX="/bin/false", FASTKD_BUILD="cpu", FASTKD_CPU_VARIANTS="avx2")
    assert done.returncode == 0, done.stderr
    assert "the compiler failed on avx2" in record["not_built"]["cpu"] and "/bin/false" in done.stderr


def test_setup_never_imports_torch(sources):
    code = """
import runpy, sys
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == fastkd.__version__, "pyproject.toml and fastkd/__init__.py disagree"


@pytest.mark.skipif(not os.environ.get("CI"), reason="CI has a compiler; another machine may go without")
def test_ci_has_the_native_library():
    assert _native.why_not_loaded("cpu") is None


def test_environment_variables_are_documented():
    """The one table of CONTRIBUTING.md names every variable that is read anywhere."""
    sources = [*ROOT.glob("*.py"), *(f for d in ("fastkd", "tests", "benchmarks") for f in (ROOT / d).rglob("*.py"))]
    used = {name for f in sources for name in re.findall(r"environ[^\n]{0,12}?[\"'](FASTKD_\w+)", f.read_text())}
    assert len(used) > 5
    table = (ROOT / "CONTRIBUTING.md").read_text()
    assert not {name for name in used if f"| `{name}` |" not in table}


def test_ci_runs_the_command_of_the_readme():
    command = "pip install '.[test]' && pytest -n auto --dist loadfile"
    assert command in (ROOT / "README.md").read_text(), f"the README must say: {command}"
    script = (ROOT / ".ci/run").read_text()
    for part in command.split(" && "):
        assert part in script, f".ci/run must run: {part}"
