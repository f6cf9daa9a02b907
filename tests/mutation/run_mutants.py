"""Planted bugs in what surrounds training: options, data, checkpoints, evaluation."""

from __future__ import annotations

from .kinds import Mutant

RUNS = [
    Mutant("options: the file wins over the command line", "fastkd/options.py", "given |= named",
           "given = named | given", ("test_options.py", "-k", "same_keys")),
    Mutant("checkpoint: sums are not compared", "fastkd/train/checkpoint.py", "if written.get(name) != digest]",
           "if name not in written]", ("test_run_checkpoints.py", "-k", "damaged_checkpoint_is_left_aside")),
    Mutant("all steps draw the same numbers", "fastkd/train/session.py", "config.seed, step, self.group.rank)",
           "config.seed, 0, self.group.rank)", ("test_reseed.py",)),
    Mutant("average: a step that was left out counts", "fastkd/models/ema.py", "if left_out is not None:",
           "if left_out is None and False:", ("test_weight_average.py", "-k", "left_out_does_not_count")),
    Mutant("linear probe: the worst head is chosen", "fastkd/evaluation/linear.py",
           "(-accuracies[index], losses[index])", "(accuracies[index], losses[index])",
           ("test_evaluation.py", "-k", "logistic_regression")),
    Mutant("pictures: no limit of pixels", "fastkd/data/reading.py", "if image.width * image.height > MAX_PIXELS:",
           "if False:", ("test_odd_images.py", "-k", "limit_is_told")),
]  # fmt: skip
