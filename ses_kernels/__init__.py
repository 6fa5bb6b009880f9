"""The spectrum of activations inside a training loop: entropy, effective rank, batched eigh."""

from ses_kernels import linalg, metrics, reference, schedules
from ses_kernels.functional import effective_rank, spectral_entropies, spectral_entropy
from ses_kernels.regularizer import SESRegularizer, Term

__version__ = "0.1.0"
__all__ = [
    "SESRegularizer",
    "Term",
    "effective_rank",
    "linalg",
    "metrics",
    "reference",
    "schedules",
    "spectral_entropies",
    "spectral_entropy",
]
