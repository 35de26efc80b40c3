"""Random numbers as a pure function of a key and a counter (SplitMix64).

Shuffling and dequantisation ask for the number that belongs to a sample, not for the next number
of a stream. So they do not depend on how many ranks share a batch, on which device computes it, or
on where a run was stopped, and there is no generator state to save.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SPLIT, SHUFFLE, DEQUANTIZE, HELD_OUT, STEP, BINARIZE = range(6)  # the second word of a key: what it is for

_U = 1 << 16  # 16 bits of noise on 8 bits of pixel is what a float32 holds exactly


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's int64 shift copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def key(*words: int) -> int:
    """Folds integers such as (seed, purpose, epoch) into one 64-bit key."""
    z = torch.zeros((), dtype=torch.int64)
    for word in words:
        z = _mix(z + _GAMMA + word)
    return int(z)


def random_bits(key: int, counter: Tensor) -> Tensor:
    """64 random bits for every element of the int64 tensor `counter`."""
    return _mix(counter * _GAMMA + key)


def permutation(key: int, n: int) -> Tensor:
    """A random order of 0..n-1, int64 [n]."""
    return random_bits(key, torch.arange(n)).argsort(stable=True)


def uniform(key: int, index: Tensor, dims: int) -> Tensor:
    """Noise in [0, 1) for the samples `index` [B]: float32 [B, dims] on `index`'s device."""
    counter = index[:, None] * dims + torch.arange(dims, device=index.device)
    return _shift(random_bits(key, counter), 48).float() / _U


@contextmanager
def own_generator(device: torch.device, *words: int) -> Iterator[None]:
    """torch's global generator, seeded by a key of `words`; the caller's comes back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(key(*words))
        yield
