"""GPU kernels in Triton, each beside its naive twin in PyTorch.

Importing this package does not import Triton; where there is none, or no CUDA device, the twins run.
"""

from .ops import (
    ACTIVATIONS,
    DTYPES,
    grouped_conv,
    level,
    naive_grouped_conv,
    naive_level,
    naive_restriction_chain,
    packed,
    restriction_chain,
)

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "grouped_conv",
    "level",
    "naive_grouped_conv",
    "naive_level",
    "naive_restriction_chain",
    "packed",
    "restriction_chain",
]
