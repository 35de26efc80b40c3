"""Planar flows on a GPU."""

from __future__ import annotations

from fastflow.ops.cuda.steps import kernels
from fastflow.ops.planar import rows

__all__ = ["KERNELS"]

KERNELS = kernels("planar", rows)
