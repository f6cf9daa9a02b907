"""Small runs on real pictures, one module per method: ``fastkd demo NAME``.

A demo module has a dataclass `Config`, the command-line options, and ``main(config) -> int``, the exit code, not 0
where something fails or what the demo promises does not hold.
"""

from __future__ import annotations

from typing import NamedTuple


class Demo(NamedTuple):
    """What ``fastkd demo --list`` tells.

    Attributes:
        line: what it compares, on which data.
        time: how long it takes on two cores.
        packages: what it needs beside fastkd itself.
    """

    line: str
    time: str
    packages: str = "fastkd[demos]"


DEMOS = {
    "dmae": Demo(
        "a small masked autoencoder at 75 and 95 % masking with a teacher, beside one without, on Fashion-MNIST",
        "2 minutes",
    ),
    "selfdist": Demo(
        "further pre-training on 200 unlabelled digits by itself and with self-distillation, from Fashion-MNIST",
        "6 minutes",
    ),
}
