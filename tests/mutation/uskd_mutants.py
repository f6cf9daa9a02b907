"""Bugs planted in USKD, DIST, logit standardisation and their methods, see `mutants`."""

from __future__ import annotations

from .kinds import Mutant, accuracy

LOGITS = "fastkd/ops/logits"


def golden(what: str, backend: str) -> tuple[str, ...]:
    return ("test_golden_uskd.py", "-k", f"{what} and {backend}")


def unpinned(what: str, backend: str = "") -> tuple[str, ...]:
    return ("test_uskd.py", "-k", f"{what} and {backend}" if backend else what)


PYTHON = [
    Mutant("USKD: no mean is taken off the soft target", f"{LOGITS}/uskd.py",
           "p = torch.where(present, squares + values - mean / means[0].clamp_min(1), 0)",
           "p = torch.where(present, squares + values, 0)", golden("golden_uskd", "reference")),
    Mutant("USKD: Zipf labels keep the share of the targets", f"{LOGITS}/uskd.py",
           "zeta = zeta / zeta.sum(1, keepdim=True)\n    smooth", "zeta = zeta / harmonic(classes)\n    smooth",
           golden("golden_uskd", "reference")),
    Mutant("USKD: unmixed rows lose a second class", f"{LOGITS}/uskd.py", "    present = values > 0\n    scores =",
           "    present = values >= 0\n    scores =", unpinned("unmixed", "reference")),
    Mutant("USKD: the mean is not shared", f"{LOGITS}/uskd.py",
           "torch.distributed.all_reduce(means, group=group)", "pass", unpinned("shared_between")),
    Mutant("DIST: the gradient keeps what lies along the row", f"{LOGITS}/dist.py",
           "torch.where(above, correlation * own, 0)", "0 * own", golden("golden_dist", "reference")),
    Mutant("standardisation: biased deviation", f"{LOGITS}/standardise.py", "/ (x.shape[1] - 1)).sqrt()",
           "/ x.shape[1]).sqrt()", accuracy("logit_standardization", "reference")),
    Mutant("cosine: ignored rows count in the mean", f"{LOGITS}/cosine.py", "/ valid.sum().clamp_min(1)",
           "/ valid.numel()", unpinned("cosine_leaves")),
    Mutant("USKD method: the feature of the last stage", "fastkd/methods/uskd.py", "max(depth - 2, 0)",
           "max(depth - 1, 0)", ("test_uskd_methods.py", "-k", "pooled_stage")),
]  # fmt: skip
TRITON = [
    Mutant("triton USKD: ties the other way", f"{LOGITS}/uskd_triton.py",
           "(j[None, :] < i[:, None])", "(j[None, :] > i[:, None])", unpinned("equal_scores", "triton")),
    Mutant("triton USKD: ranks of sorted classes are those of their places", f"{LOGITS}/uskd_triton.py",
           ".scatter_(1, order, torch.arange(classes, device=order.device).expand_as(order))", ".copy_(order)",
           accuracy("uskd_loss-many_classes", "triton")),
    Mutant("triton standardisation: backward forgets the mean", f"{LOGITS}/standardise_triton.py",
           "(g - total / classes -", "(g -", accuracy("logit_standardization", "triton")),
]  # fmt: skip
NATIVE = [
    Mutant("C++ USKD: the lower of equal classes comes last", "csrc/ranked.h",
           "rank += j < i ? values[j] >= values[i] : values[j] > values[i];",
           "rank += j > i ? values[j] >= values[i] : values[j] > values[i];", unpinned("equal_scores", "cpp")),
    Mutant("C++ USKD: what fixed point does not tell apart stays as it is", "csrc/ranked.h",
           "    sort_runs(values);\n", "", unpinned("nearly_equal", "cpp")),
    Mutant("C++ DIST: columns are not centred", "csrc/dist_loss.cpp", "q[row * stride + i] - sum_q[i]",
           "q[row * stride + i]", accuracy("dist_loss", "cpp")),
]  # fmt: skip
USKD = PYTHON + TRITON + NATIVE
