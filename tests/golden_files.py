"""Golden files: where they lie, their hyperparameters, and the rule by which results are compared with them.

A file is ``<prefix>_<anything>.npz`` in the folder named by FASTKD_GOLDEN_DIR (default: ``golden`` beside this file).
Shapes and hyperparameters come from the file itself: its keys, or its ``meta`` JSON (flat or nested). Files with other
prefixes are ignored.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(os.environ.get("FASTKD_GOLDEN_DIR") or Path(__file__).parent / "golden")
NESTED = ("hyperparameters", "config")
GRADIENT_PREFIXES = ("grad_", "grad/")


class Golden:
    """One golden file: `golden["key"]` is an array, `golden.option("name")` a hyperparameter."""

    def __init__(self, path: Path) -> None:
        self.path, self.stem = path, path.stem
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(self.arrays.pop("meta", "{}")))
        self.options = dict(meta)
        for name in NESTED:
            self.options.update(meta.get(name) or {})

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def option(self, *names: str, default=None):
        """The first of these hyperparameters that the file has, as a key or in its meta."""
        for name in names:
            if name in self:
                return self[name].item() if self[name].ndim == 0 else self[name].tolist()
            if self.options.get(name) is not None:
                return self.options[name]
        return default

    def tensor(self, key: str, dtype: torch.dtype | None = None, device: str = "cpu") -> torch.Tensor:
        """The array as a tensor; `dtype` applies to floating arrays only."""
        value = torch.from_numpy(np.array(self[key]))
        return value.to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype)

    def suffixes(self, start: str) -> list[str]:
        """What follows `start` in the names of the keys: the cases of a file ("" where it has one only)."""
        return sorted(key[len(start) :] for key in self.arrays if key == start or key.startswith(start + "_"))

    def group(self, folder: str, dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Tensors of the keys ``folder/<name>`` by name."""
        return {k[len(folder) + 1 :]: self.tensor(k, dtype, device) for k in self.arrays if k.startswith(f"{folder}/")}

    def partner(self, own_prefix: str, other_prefix: str) -> Golden | None:
        """The file of the same split with another prefix."""
        path = self.path.with_name(other_prefix + self.stem[len(own_prefix) :] + self.path.suffix)
        return Golden(path) if path.exists() else None

    @functools.cached_property
    def largest_gradient(self) -> float:
        values = [np.abs(v).max() for k, v in self.arrays.items() if k.startswith(GRADIENT_PREFIXES) and v.size]
        return float(max(values, default=0.0))

    def check(self, key: str, got: torch.Tensor, dtype: torch.dtype, rounded_input: bool = False) -> None:
        """Asserts that `got`, computed in `dtype`, is the array of this key.

        Error relative to the largest value of the tensor; 1e-7 in float64 where the file stores float32 (or where
        an input is a stored result, rounded to float32), 2e-9 where it stores float64, 2e-4 in float32. Integers
        and masks must be equal.
        """
        want = self.tensor(key)
        got = torch.as_tensor(got).detach().cpu()
        assert got.shape == want.shape, f"{self.stem} {key}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        if want.numel() == 0:
            return
        if not want.is_floating_point() or key == "mask":
            assert torch.equal(got.to(want.dtype), want), f"{self.stem} {key}: not equal"
            return
        error = (got.double() - want.double()).abs().max().item()
        if dtype == torch.float64:
            relative, floor = (1e-7 if want.dtype == torch.float32 or rounded_input else 2e-9), 1e-9
        else:
            relative = 2e-4
            floor = 1e-5 * self.largest_gradient if key.startswith(GRADIENT_PREFIXES) else 1e-9
        allowed = max(relative * want.double().abs().max().item(), floor)
        assert error <= allowed, f"{self.stem} {key} in {dtype}: max error {error:.3g} > allowed {allowed:.3g}"


def find(prefix: str) -> list[Golden]:
    """All files of a prefix, in the order of their names."""
    paths = sorted(FOLDER.glob("*.npz"))
    return [Golden(path) for path in paths if path.stem == prefix or path.stem.startswith(f"{prefix}_")]
