"""Noise, dequantisation and bits per dimension."""

import math

import pytest
import torch
from torch import nn

from fastflow.train import Images, bits_per_dim, evaluate, noise, pixels


class Uniform(nn.Module):
    """Density 1 on the unit cube."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        assert x.min() >= -0.5 and x.max() < 0.5
        return x.new_zeros(len(x))


@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_uniform_density_costs_log2_levels(levels):
    images = torch.randint(levels, (40, 3, 4, 2), dtype=torch.uint8)
    bits = evaluate(Uniform(), Images("x", images, images, levels), batch_size=16)
    assert bits == pytest.approx(math.log2(levels), abs=1e-7)
    assert bits_per_dim(torch.zeros(1), 24, levels).item() == pytest.approx(math.log2(levels))


def test_bits_per_dim_of_a_density():
    # dividing the log-density of 24 sub-pixels by each one's cell of 1/256
    log_prob, dims = torch.tensor([30.0]), 24
    expected = -(30.0 - dims * math.log(256)) / (dims * math.log(2))
    assert bits_per_dim(log_prob, dims, 256).item() == pytest.approx(expected)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantisation_round_trips(levels):
    images = torch.arange(levels, dtype=torch.uint8).view(-1, 1, 1, 1)
    for u in (0.0, 1 - 2**-16):  # the ends of what `uniform` gives
        x = pixels.dequantize(images, levels, torch.full((levels, 1), u))
        assert x.min() >= -0.5 and x.max() < 0.5
        assert u == 0 or torch.equal(pixels.quantize(x, levels), images)
    with pytest.raises(ValueError, match="1 of 2"):
        pixels.quantize(torch.tensor([[0.0], [math.nan]]), levels)


def test_noise_belongs_to_the_sample():
    key = noise.key(1, 2, 3)
    index = torch.arange(1000)
    u = noise.uniform(key, index, 50)
    assert torch.equal(noise.uniform(key, index[300:310], 50), u[300:310])
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean().item() - 0.5) < 0.01 and abs(u.var().item() - 1 / 12) < 0.002
    other = noise.uniform(noise.key(1, 2, 4), index, 50)
    assert abs(torch.corrcoef(torch.stack((u.flatten(), other.flatten())))[0, 1]) < 0.02
    order = noise.permutation(key, 1000)
    assert torch.equal(order.sort().values, index) and not torch.equal(order, index)


def test_histogram_is_the_entropy_of_independent_pixels(digits):
    bits = pixels.histogram_bits(digits.train, digits.held_out, 17)
    assert 2.3 < bits < 2.5
    constant = torch.full((5000, 1, 2, 2), 3, dtype=torch.uint8)
    assert pixels.histogram_bits(constant, constant, 256) < 0.1
