"""The cases of Gaussian log-likelihood, sample and KL divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from fastflow import ops
from fastflow.testing.case import Case, Inputs, randn

IMAGES = {"tiny": (2, 4, 2, 3), "odd": (11, 7, 5, 9), "bench": (64, 12, 8, 8)}
SELFTEST = ("standard", "log_prob-exp", "log_prob-vector-chunk_ts", "sample-glow", "kl-packed", "kl-standard")
VECTORS = {"tiny": (3, 4), "odd": (37, 7), "bench": (4096, 64)}


def _inputs(size: str, shapes: dict, names: dict[str, int], per_channel: tuple[str, ...] = ()) -> Inputs:
    """A tensor for every name, of so many channels per variable; one value per channel for ``per_channel``."""
    samples, channels, *positions = shapes[size]
    made = {}
    for seed, (name, n) in enumerate(names.items()):
        shape = (n * channels,) if name in per_channel else (samples, n * channels, *positions)
        made[name] = randn(*shape, seed=seed)
    return made


def _tuple(run: Callable, **arguments):
    """The outputs of an op as a tuple."""
    out = run(**arguments)
    return out if isinstance(out, tuple) else (out,)


def _case(name: str, run: Callable, names: dict[str, int], shapes: dict = IMAGES, per_channel=(), **options) -> Case:
    return Case(
        "gaussian",
        name,
        partial(_tuple, run, **options),
        partial(_inputs, shapes=shapes, names=names, per_channel=per_channel),
        selftest=name in SELFTEST,
    )


def cases() -> Iterator[Case]:
    glow = ops.scale_map("exp", gain=3.0)
    maf = ops.ScaleMap("exp", gain=0.5, reciprocal=True)
    packed = {"z": 1, "params": 2}
    separate = {"z": 1, "params": 1, "raw": 1}
    log_prob = partial(_case, run=ops.gaussian_log_prob)
    yield log_prob("standard", names={"z": 1})
    yield log_prob("standard-vector", names={"z": 1}, shapes=VECTORS)
    for scale in ("exp", "softplus", "softplus_eps", "sigmoid2", "soft_clip"):
        yield log_prob(f"log_prob-{scale}", names=packed, scale=scale)
    yield log_prob("log_prob-glow", names=packed, scale=glow)
    yield log_prob("log_prob-reciprocal", names=packed, scale=maf)
    for packing in ("interleaved_st", "chunk_ts", "chunk_st"):
        yield log_prob(f"log_prob-{packing}", names=packed, packing=packing)
        yield log_prob(f"log_prob-vector-{packing}", names=packed, packing=packing, shapes=VECTORS)
    yield log_prob("log_prob-separate", names=separate)
    yield log_prob("log_prob-channel", names=separate, per_channel=("params", "raw"))
    yield log_prob("log_prob-vector-channel", names=packed, per_channel=("params",), shapes=VECTORS)

    sample = partial(_case, run=ops.gaussian_sample)
    noise = {"noise": 1, "params": 2}
    yield sample("sample-standard", names={"noise": 1}, temperature=0.7)
    yield sample("sample-exp", names=noise)
    yield sample("sample-glow", names=noise, scale=glow, temperature=0.7)
    yield sample("sample-softplus", names=noise, scale="softplus", temperature=0.7, packing="chunk_st")
    yield sample("sample-cold", names=noise, temperature=0.0)
    yield sample("sample-vector", names=noise, shapes=VECTORS, packing="chunk_ts")
    yield sample("sample-channel", names={"noise": 1, "params": 1, "raw": 1}, per_channel=("params", "raw"))

    kl = partial(_case, run=ops.gaussian_kl)
    yield kl("kl-standard", names={"params": 2})
    yield kl("kl-standard-separate", names={"params": 1, "raw": 1}, shapes=VECTORS, scale="softplus")
    yield kl("kl-packed", names={"params": 2, "prior": 2}, packing="chunk_ts")
    yield kl("kl-softplus", names={"params": 2, "prior": 2}, scale="softplus")
    yield kl("kl-separate", names={"params": 1, "raw": 1, "prior": 1, "prior_raw": 1}, shapes=VECTORS)
    yield kl("kl-channel", names={"params": 2, "prior": 2}, per_channel=("prior",))
