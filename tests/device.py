"""What the layer is tested on."""

import os

from batchnorm import ops

# The suite also runs on a GPU: BATCHNORM_TEST_DEVICE=cuda.
DEVICE = os.environ.get("BATCHNORM_TEST_DEVICE", "cpu")

# Triton's interpreter takes some ten milliseconds a program: smaller shapes, fewer cases.
INTERPRETED = ops.kernels()["cpu"].endswith("interpreted")
