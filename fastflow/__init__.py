"""fastflow: normalizing flows on fused kernels for PyTorch."""

from fastflow.ops import *  # noqa: F403

__version__ = "0.1.0"
