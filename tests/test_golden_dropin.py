"""Other golden files can be dropped in: random configurations pass, a wrong number fails, an empty folder is fine."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import plain_dmae
import pytest
import test_golden_dmae as op_tests
import test_golden_models as models
import torch
from conftest import BACKENDS_HERE
from golden_files import Golden
from process import run_pytest

FASTEST = "cpp" if "cpp" in BACKENDS_HERE else "reference"


@pytest.mark.parametrize("seed", [4, 5, 6, 7])
def test_golden_of_a_random_configuration(seed, tmp_path):
    """The exact savings against the plain formula: odd grids, several pairs, L2, normalised pixels, 1 to 4 channels."""
    plain_dmae.make(tmp_path, seed)
    teacher, forward, grads = (
        Golden(tmp_path / f"dmae_{part}_made{seed}.npz")
        for part in ("teacher_forward", "student_forward", "student_grads")
    )
    for dtype in (torch.float32, torch.float64):
        models.test_golden_teacher_forward(teacher, FASTEST, dtype)
        for shared in (False, True):
            models.test_golden_student_forward(forward, FASTEST, dtype, shared)
            models.test_golden_student_grads(grads, FASTEST, dtype, shared)


def test_golden_without_the_teachers_parameters(tmp_path):
    plain_dmae.make(tmp_path, 4)
    (tmp_path / "dmae_teacher_forward_made4.npz").unlink()
    models.test_golden_student_forward(
        Golden(tmp_path / "dmae_student_forward_made4.npz"), FASTEST, torch.float64, True
    )
    models.test_golden_student_grads(Golden(tmp_path / "dmae_student_grads_made4.npz"), FASTEST, torch.float64, True)


@pytest.mark.parametrize("name", BACKENDS_HERE)
def test_golden_ops_with_other_keys(name, tmp_path):
    """Unequal masks, one channel, oblong patches, no bias, missing branches: sizes and flags come from the file."""
    plain_dmae.make_ops(tmp_path, 3)
    files = {
        part: Golden(tmp_path / f"dmae_{part}_made3.npz") for part in ("pixel_loss", "random_masking", "distill_loss")
    }
    for dtype in (torch.float32, torch.float64) if name in ("reference", "cpp") else (torch.float32,):
        op_tests.test_golden_pixel_loss(files["pixel_loss"], name, dtype)
        op_tests.test_golden_random_masking(files["random_masking"], name, dtype)
        op_tests.test_golden_distill_loss(files["distill_loss"], name, dtype)
    op_tests.test_golden_patchify(Golden(tmp_path / "dmae_patchify_made3.npz"))


def test_a_wrong_number_in_a_file_fails(tmp_path):
    plain_dmae.make(tmp_path, 5)
    path = tmp_path / "dmae_student_grads_made5.npz"
    arrays = dict(np.load(path))
    largest = np.abs(arrays["grad/mask_token"]).argmax()
    arrays["grad/mask_token"].flat[largest] *= 1 + 1e-5
    np.savez(path, **arrays)
    with pytest.raises(AssertionError, match="grad/mask_token"):
        models.test_golden_student_grads(Golden(path), FASTEST, torch.float64, True)


def golden_run(folder: Path, *options: str):
    return run_pytest(*options, "test_golden_dmae.py", "test_golden_models.py", FASTKD_GOLDEN_DIR=folder)


def test_every_matching_file_is_collected_and_no_other(tmp_path):
    source = Path(__file__).parent / "golden"
    for name in ("dmae_pixel_loss", "dmae_student_grads"):
        shutil.copy(source / f"{name}_dev.npz", tmp_path / f"{name}_other_odd.npz")
    shutil.copy(source / "dmae_pixel_loss_dev.npz", tmp_path / "unknown_op_dev.npz")
    found = golden_run(tmp_path, "--collect-only")
    assert found.returncode == 0, found.stdout + found.stderr
    ids = [line for line in found.stdout.splitlines() if "::" in line]
    for stem in ("dmae_pixel_loss_other_odd", "dmae_student_grads_other_odd"):
        assert any(f"golden-{stem}" in line for line in ids), found.stdout
    assert not any("unknown_op" in line or "_dev" in line for line in ids)


def test_an_empty_folder_does_not_fail(tmp_path):
    result = golden_run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
