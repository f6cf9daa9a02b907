"""How a training process is set up: memory that stays with it, sums in a fixed order."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from fastkd.train.host import same_bits


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_stays_with_the_process():
    """Blocks of 64 MB, freed and allocated again: their 16,384 pages are cleared once and not every time."""
    code = """if True:
        import resource, sys, torch
        from fastkd.train.host import keep_memory
        assert sys.argv[1] == "no" or keep_memory()
        for _ in range(20):  # until aligned blocks find room where others were
            torch.ones(1 << 24)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(1 << 24)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    faults = {
        keep: int(subprocess.run([sys.executable, "-c", code, keep], capture_output=True, check=True, text=True).stdout)
        for keep in ("no", "yes")
    }
    assert faults["yes"] < 1000 and faults["yes"] < faults["no"] / 10


def test_same_bits_asks_torch_for_a_fixed_order_and_restores(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with same_bits(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), same_bits(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
