"""Small runs on real pictures, one module per method: ``fastkd demo NAME``.

A demo module has a dataclass `Config`, the command-line options, and ``main(config) -> int``, the exit code.
"""

DEMOS = {
    "dmae": "distil a small masked autoencoder at 75 and 95 % masking, beside plain MAE, on Fashion-MNIST (2 minutes)",
}
