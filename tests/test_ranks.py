"""Layers whose statistics are those of all ranks: two processes see what one would, of shares of different sizes."""

import os
import subprocess
import sys

import torch

from fastflow import nn

LAYERS = ("ActNorm", "BatchNorm", "MovingBatchNorm")

PROCESS = """
import sys, torch
import torch.distributed as dist
from test_ranks import LAYERS, through
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.save([through(name, slice(3) if rank == 0 else slice(3, None)) for name in LAYERS], out + str(rank))
dist.barrier()
dist.destroy_process_group()
"""


def through(name, share):
    """A new layer's values and gradients of a share of the batch, and its state afterwards."""
    x = 3 + 2 * torch.randn(10, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    x = x[share].requires_grad_()
    layer = getattr(nn, name)(5)
    z, logdet = layer(x)
    (z.pow(3).sum() + logdet.sum()).backward()
    return z.detach(), x.grad, layer.state_dict()


def test_statistics_and_gradients_over_all_ranks(tmp_path):
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "store"), str(tmp_path / "out")], env=environment
        )
        for rank in range(2)
    ]
    assert [p.wait(120) for p in started] == [0, 0]
    for name, *shares in zip(LAYERS, *(torch.load(tmp_path / f"out{rank}") for rank in range(2)), strict=True):
        z, gradient, state = through(name, slice(None))
        (first_z, first_gradient, first), (second_z, second_gradient, second) = shares
        torch.testing.assert_close(torch.cat([first_z, second_z]), z, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.cat([first_gradient, second_gradient]), gradient, rtol=1e-4, atol=1e-4)
        for of_rank in (first, second):
            torch.testing.assert_close(of_rank, state, msg=lambda why, name=name: f"{name}: {why}")
