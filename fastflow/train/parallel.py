"""What the training loop needs of `torch.distributed`; in one process it does nothing."""

import gc
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError


def world() -> int:
    """Number of ranks, 1 outside `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process among `world()`."""
    return dist.get_rank() if world() > 1 else 0


def total(values: Tensor) -> Tensor:
    """`values` summed over the ranks, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def wrap(model: nn.Module) -> nn.Module:
    """`model` with gradients averaged over the ranks, if there are several."""
    if world() == 1:
        return model
    # The ranks' buffers are equal already, and writing to them would stale what caches know.
    # torch 2.13 renames the option, and warns about the old name.
    names = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(model, **{option: False})


def choose_device(name: str | None = None) -> torch.device:
    """`name`, or CUDA where there is one; under torchrun each local rank takes its own GPU.

    Raises `UserError` for a device that torch cannot use here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the process group that torchrun describes in the environment, if it does."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    # DistributedDataParallel imports this module, whose default arguments take hold of the process
    # group that exists by then: gloo's threads would outlive it and abort the process at its end.
    import torch.distributed.nn.functional  # noqa: F401

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        gc.collect()  # the wrapped model holds the group, and is held by a cycle
        dist.destroy_process_group()
