"""Radial flows on a GPU."""

from __future__ import annotations

from fastflow.ops.cuda.steps import kernels
from fastflow.ops.radial import rows

__all__ = ["KERNELS"]

KERNELS = kernels("radial", rows)
