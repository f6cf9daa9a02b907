"""Bugs planted in the classic feature losses and in the moving average, see `mutants`."""

from __future__ import annotations

from .kinds import FEATURES, Mutant, accuracy

WEIGHTS = "fastkd/ops/weights"


def features(what: str, backend: str) -> tuple[str, ...]:
    return ("test_golden_features.py", "-k", f"{what} and {backend}")


def beyond(what: str) -> tuple[str, ...]:
    return ("test_feature_losses.py", "-k", what)


FEATURE_LOSSES = [
    Mutant("attention transfer: no way back through the norm", f"{FEATURES}/at_loss.py",
           "tangent = g - u * (u * g).sum(1, keepdim=True)", "tangent = g", features("feature_losses", "reference")),
    Mutant("attention transfer: only height is pooled", f"{FEATURES}/at_loss.py",
           "size = tuple(map(min, student.shape[2:], teacher.shape[2:]))\n    student, teacher",
           "size = (min(student.shape[2], teacher.shape[2]), *teacher.shape[3:])\n    student, teacher",
           beyond("pools_the_larger and reference")),
    Mutant("triton attention transfer: mean over rows of the tile", f"{FEATURES}/at_loss_triton.py",
           "tl.sum(total, axis=0) / channels", "tl.sum(total, axis=0) / ROWS", accuracy("at_loss", "triton")),
    Mutant("C++ attention transfer: half the slope", "csrc/at_loss.cpp", ": 2 / count) * inverse_u",
           ": 1 / count) * inverse_u", features("feature_losses", "cpp")),
    Mutant("RKD: the mean distance is a constant", f"{FEATURES}/rkd_loss.py",
           "(h - (h * lengths[0]).sum() / (mean_s * pairs))", "h", features("rkd", "reference")),
    Mutant("RKD: the far side of the angle has no gradient", f"{FEATURES}/rkd_loss.py",
           "grad[j] -= (h * weight_s).sum(1) / 2", "pass", features("rkd", "reference")),
    Mutant("RKD: distances from a Gram matrix", f"{FEATURES}/rkd_loss.py",
           'torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()',
           "(x.square().sum(1)[:, None] + x.square().sum(1) - 2 * x @ x.T).clamp_min(0)",
           beyond("far_from_the_origin and reference")),
    Mutant("triton RKD: equal rows have a direction", f"{FEATURES}/rkd_loss_triton.py",
           "tl.where(square <= eps, 0.0, 1.0 / tl.sqrt(", "tl.where(square < 0.0, 0.0, 1.0 / tl.sqrt(",
           beyond("equal_rows and triton")),
    Mutant("C++ RKD: the angle's gradient by the edge is once, not twice", "csrc/rkd_loss.cpp",
           "(by_edge[k] + A(0.5) * by_far[k])", "A(0.5) * (by_edge[k] + by_far[k])", features("rkd", "cpp")),
    Mutant("CRD: the positive is one more negative", f"{FEATURES}/crd_nce_loss.py", "slope[0] -= 1", "pass",
           features("crd", "reference")),
    Mutant("CRD: the student's side writes the teacher's bank", f"{FEATURES}/crd_loss.py",
           "self._remember(self.memory_s, index, s)", "self._remember(self.memory_t, index, s)",
           features("crd", "reference")),
    Mutant("CRD: the normalisers follow every batch", f"{FEATURES}/crd_loss.py", "if not self._normalised:",
           "if self.training:", ("test_crd.py", "-k", "several_steps")),
    Mutant("triton CRD: all rows are negatives", f"{FEATURES}/crd_nce_loss_triton.py",
           "sign = tl.where(k == 0, -1.0, 1.0)", "sign = tl.where(k < 0, -1.0, 1.0)", features("crd", "triton")),
    Mutant("SP: half the gradient of the Gram matrix", f"{FEATURES}/gram.py", "(grad + grad.T) @", "grad @",
           features("feature_losses", "reference")),
    Mutant("PKT: rows are not probabilities", f"{FEATURES}/pkt_loss.py", "similar / similar.sum(1, keepdim=True)",
           "similar / similar.sum()", features("feature_losses", "reference")),
    Mutant("hint: tokens are normalised along their sequence", f"{FEATURES}/hint_loss.py",
           "return 1 if feature.ndim in (4, 5) else -1", "return 1", beyond("normalises_channels")),
    Mutant("moving average: alpha counts the current weights", f"{WEIGHTS}/ema_update.py",
           "torch.full((), 1 - alpha,", "torch.full((), alpha,", ("test_ema_update.py", "-k", "golden and reference")),
    Mutant("triton moving average: the end of a tensor is left out", f"{WEIGHTS}/ema_update_triton.py",
           "inside = i < count", "inside = i < count - 1", ("test_ema_update.py", "-k", "unlike and triton")),
    Mutant("C++ moving average: weight 1 is not exact", "csrc/ema_update.cpp", "if (weight < A(0.5)) {",
           "if (weight < A(2)) {", ("test_fuzz.py", "-k", "law and ema_update and cpp")),
]  # fmt: skip
