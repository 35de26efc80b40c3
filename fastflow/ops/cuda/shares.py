"""The launch of csrc/cuda/shares.cu."""

from __future__ import annotations

from fastflow.ops.cuda.plan import Address, Launch
from fastflow.ops.cuda.source import Instance
from fastflow.ops.cuda.walk import THREADS

__all__ = ["add_shares"]


def add_shares(kind: str, partial: Address, out: Address, parameters: int, blocks: int) -> Launch:
    """out [parameters], the sum over the blocks of partial [blocks, parameters]; both ``float`` or both ``double``."""
    instance = Instance("shares", "add_shares", "Shares", (kind,))
    return Launch(instance, -(-parameters // THREADS), [partial, out, parameters, blocks])
