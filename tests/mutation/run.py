"""Plants known bugs one at a time in a copy of the package; the tests must notice every one.

    python tests/mutation/run.py [--list | --quick] [words in the name ...]

Prints a line per bug and exits with 1 if one survives. C++ bugs are compiled for this machine's CPU variant only.
--quick plants the few that the test suite does.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
for heavy in ("hypothesis", "triton", "torch._dynamo"):
    with contextlib.suppress(ImportError):
        importlib.import_module(heavy)

sys.path.insert(0, str(Path(__file__).parents[1]))

from native import compile_cpu_library  # noqa: E402
from process import PACKAGE_ROOT, TESTS  # noqa: E402

from mutation.mutants import HARMLESS, MUTANTS, QUICK, Mutant  # noqa: E402

SOURCES = TESTS.parent  # csrc/ is there; the package may be installed elsewhere


def run_in_child(root: Path, arguments: tuple[str, ...], log: Path, environment: dict[str, str]) -> NoReturn:
    """Runs pytest with the package in `root`, and ends the process."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    for name in list(sys.modules):
        if name.split(".")[0] in ("fastkd", "native", "process"):
            del sys.modules[name]
    os.environ.update(environment)
    sys.path.insert(0, str(root))
    os.chdir(TESTS)
    code = pytest.main(["-o", "addopts=", "-q", "-x", "-p", "no:cacheprovider", *arguments])
    sys.stdout.flush()
    os._exit(int(code))


class Workspace:
    """A copy of the package (with its libraries) and of the native sources, in which one bug is planted at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignore = shutil.ignore_patterns("__pycache__", "assets")
        shutil.copytree(PACKAGE_ROOT / "fastkd", folder / "fastkd", ignore=ignore)
        shutil.copytree(SOURCES / "csrc", folder / "csrc", ignore=ignore)

    def test(self, mutant: Mutant, **environment: str) -> str:
        """``passed``, ``failed``, or what else pytest said."""
        log = self.folder / "pytest.log"
        sys.stdout.flush()
        child = os.fork()  # torch is imported already: a run takes a second or two
        if child == 0:
            run_in_child(self.folder, mutant.tests, log, environment)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return {0: "passed", 1: "failed"}.get(code, f"error: pytest exited with {code}\n{log.read_text()[-3000:]}")

    def judge(self, mutant: Mutant) -> str:
        """``killed``, ``survived``, or an error."""
        path = self.folder / mutant.file
        original = path.read_text()
        if original.count(mutant.old) != 1:
            return f"error: {mutant.old!r} occurs {original.count(mutant.old)} times in {mutant.file}"
        path.write_text(original.replace(mutant.old, mutant.new))
        try:
            environment = {}
            if mutant.file.endswith((".cu", ".cuh")):
                environment["FASTKD_CUDA_SOURCES"] = str(self.folder / "csrc")  # compiled by the test
            elif mutant.file.startswith("csrc/"):
                library = self.folder / "planted.so"
                compile_cpu_library(self.folder, library)
                environment["FASTKD_CPU_LIBRARY"] = str(library)
            result = self.test(mutant, **environment)
        except AssertionError as error:
            return f"error: does not compile\n{error}"
        finally:
            path.write_text(original)
        return {"passed": "survived", "failed": "killed"}.get(result, result)


def select(words: list[str]) -> list[Mutant]:
    from fastkd import _native

    variant = Path(_native.library_path("cpu") or "none").stem
    here = [m for m in MUTANTS if variant.endswith(m.cpu)]
    return [m for m in here if all(w.lower() in f"{m.name} {m.file}".lower() for w in words)]


def main(arguments: list[str]) -> int:
    if "--quick" in arguments:
        chosen = [m for m in MUTANTS if m.name in QUICK]
    else:
        chosen = select([a for a in arguments if not a.startswith("--")])
    if "--list" in arguments:
        print(*(f"{m.name} ({m.file})" for m in chosen), sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        if workspace.judge(HARMLESS) != "survived":
            print("a change that is no bug does not survive")
            return 1
        for tests in dict.fromkeys(m.tests for m in chosen):
            clean = workspace.test(Mutant("", "", "", "", tests))
            if clean != "passed":
                print(f"without a bug: {' '.join(tests)}: {clean}")
                return 1
        found = {}
        for mutant in chosen:
            start = time.time()
            found[mutant.name] = workspace.judge(mutant)
            print(f"{found[mutant.name]:9} {time.time() - start:5.1f} s  {mutant.name} ({mutant.file})", flush=True)
    killed = list(found.values()).count("killed")
    print(f"{killed} of {len(found)} planted bugs found")
    return 0 if killed == len(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
