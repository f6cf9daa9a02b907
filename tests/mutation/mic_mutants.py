"""Bugs planted in masked image consistency, see `mutants`."""

from __future__ import annotations

from .kinds import FEATURES, MASKED, Mutant, accuracy

LOSS = "masked_consistency_loss"


def golden(what: str, backend: str) -> tuple[str, ...]:
    return ("test_golden_mic.py", "-k", f"{what} and {backend}")


def own(what: str) -> tuple[str, ...]:
    return ("test_mic_ops.py", "-k", what)


MIC = [
    Mutant("block mask: the ratio itself is kept", f"{MASKED}/block_mask.py", "return noise > mask_ratio",
           "return noise >= mask_ratio", own("equal_to_the_ratio")),
    Mutant("block mask: the grid is rounded down", f"{MASKED}/block_mask.py",
           "round(height / block_size), round(width / block_size)", "height // block_size, width // block_size",
           own("round_to_even")),
    Mutant("block mask: exact floors", f"{MASKED}/block_mask.py",
           "dtype=torch.float32, device=device) * (cells / pixels)",
           "dtype=torch.float64, device=device) * cells / pixels", own("nearest_rule and reference")),
    Mutant("pseudo-labels: more than the threshold", f"{FEATURES}/pseudo_label.py", "(p >= threshold).sum((1, 2))",
           "(p > threshold).sum((1, 2))", own("threshold_itself and reference")),
    Mutant("pseudo-labels: the first row is always ignored", f"{FEATURES}/pseudo_label.py", "(row >= top)",
           "(row > top)", golden("segmentation_labels", "reference")),
    Mutant("consistency: mean over what counts", f"{FEATURES}/upsample_cross_entropy.py",
           "(label.long() != ignore_index).to(dtype) / max(label.numel(), 1)",
           "(label.long() != ignore_index).to(dtype) / (label.long() != ignore_index).sum().clamp(min=1)",
           golden("segmentation_loss", "reference")),
    Mutant("bilinear: corners are aligned", f"{FEATURES}/bilinear.py",
           "place = ((2 * torch.arange(out, device=device) + 1) * values - out).clamp_(min=0)",
           "place = 2 * torch.arange(out, device=device) * values", own("bilinear_matrix")),
    Mutant("detection: the weight of an anchor is a constant", f"{FEATURES}/detection_consistency.py",
           "objectness.detach() if detach_weight", "objectness.detach() if True",
           ("test_golden_mic.py", "-k", "detection")),
    Mutant("mean teacher: warm-up is one step late", "fastkd/models/ema.py", "min(1 - 1 / (step + 1), self.alpha)",
           "min(1 - 1 / (step + 2), self.alpha)", ("test_golden_mic.py", "-k", "mean_teacher")),
    Mutant("mean teacher: statistics are copied", "fastkd/models/ema.py", 'if self.buffers_rule != "keep":',
           "if True:", ("test_golden_mic.py", "-k", "mean_teacher")),
    Mutant("MIC: the teacher sees the masks, too", "fastkd/methods/mic.py", "pseudo_label(self.teacher(target_images)",
           "pseudo_label(self.teacher(0 * target_images)", ("test_mic.py", "-k", "sum_of_its_parts")),
    Mutant("triton block mask: columns by the scale of rows", f"{MASKED}/block_mask_triton.py",
           "x.to(tl.float32) * scale_x", "x.to(tl.float32) * scale_y", accuracy("mask_image", "triton")),
    Mutant("triton pseudo-labels: the last of equal classes", f"{FEATURES}/bilinear_triton.py",
           "larger = value > best", "larger = value >= best", own("first_class and triton")),
    Mutant("triton consistency: rows below are left out", f"{FEATURES}/upsample_cross_entropy_triton.py",
           "f_low = tl.where(above, 0.0, down)", "f_low = tl.where(above, 0.0, 0.0)", accuracy(LOSS, "triton")),
    Mutant("triton consistency: no gradient to the right neighbour", f"{FEATURES}/upsample_cross_entropy_triton.py",
           "+ tl.where(right == i, across, 0.0)", "+ tl.where(right == i, 0.0, 0.0)", accuracy(LOSS, "triton")),
    Mutant("C++ block mask: every row as the first", "csrc/block_mask.cpp", "kept + b * kb + cell_y * kh",
           "kept + b * kb", accuracy("mask_image", "cpp")),
    Mutant("C++ pseudo-labels: a strip counts once", "csrc/pseudo_label.cpp", "confident[unit] += sum",
           "confident[unit] = sum", ("test_mic_ops.py", "-k", "threshold_itself and cpp")),
    Mutant("C++ consistency: the first row of a tile lacks its upper half", "csrc/upsample_cross_entropy.cpp",
           "row = std::max<int64_t>(j0 - 1, 0)", "row = j0", own("many_rows and cpp")),
    Mutant("C++ consistency: ignored positions count", "csrc/upsample_cross_entropy.cpp",
           "c == ignore_ ? A(0) : unit", "c == ignore_ ? unit : unit", golden("segmentation_loss", "cpp")),
]  # fmt: skip
