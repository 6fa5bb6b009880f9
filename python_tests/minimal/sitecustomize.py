"""On PYTHONPATH, an installation without a compiler and without Triton; subprocesses are too."""

import sys

for optional in ("ses_kernels._C", "triton"):
    sys.modules[optional] = None  # makes its import raise
