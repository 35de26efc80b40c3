"""The cases of affine and additive coupling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.testing.case import Case, Inputs, randn

IMAGES = {"tiny": (2, 4, 2, 3), "odd": (11, 7, 5, 9), "bench": (64, 12, 16, 16)}
SELFTEST = ("sigmoid2-forward", "exp-inverse", "learned-checkerboard", "vector", "additive")
VECTORS = {"tiny": (3, 4), "odd": (37, 7), "bench": (4096, 64)}


def _inputs(size: str, shapes: dict, per_channel: int = 2, part: slice = slice(None), learned: bool = False) -> Inputs:
    x = randn(*shapes[size])
    changed = len(range(*part.indices(x.shape[1])))
    made = {"x": x, "params": randn(x.shape[0], per_channel * changed, *x.shape[2:], seed=1)}
    if learned:
        made["amplitude"] = randn(changed, seed=2).abs()
    return made


def _run(x: Tensor, params: Tensor, amplitude: Tensor | None = None, scale="sigmoid2", mask=None, **options):
    mask = mask.to(x.device) if isinstance(mask, Tensor) else mask
    if amplitude is not None:
        scale = ops.scale_map(scale, amplitude=amplitude)
    return ops.affine_coupling(x, params, scale=scale, mask=mask, **options)


def _back(outputs: tuple[Tensor, ...], run: Callable, x: Tensor, inverse: bool = False, **inputs) -> Tensor:
    return run(x=outputs[0], inverse=not inverse, **inputs)[0]


def _case(name: str, shapes: dict = IMAGES, additive: bool = False, learned: bool = False, **options) -> Case:
    part = options.get("mask") if isinstance(options.get("mask"), slice) else slice(None)
    if additive:
        run = partial(lambda x, params, **o: ops.additive_coupling(x, params, **o), **options)
    else:
        run = partial(_run, **options)
    inverse = options.pop("inverse", False)
    reverse = partial(run.func, **options)
    return Case(
        "coupling",
        name,
        run,
        partial(_inputs, shapes=shapes, per_channel=1 if additive else 2, part=part, learned=learned),
        back=partial(_back, run=reverse, inverse=inverse),
        logdet=1,
        selftest=name in SELFTEST,
    )


def cases() -> Iterator[Case]:
    maps = ("exp", "sigmoid2", "sigmoid2_eps", "softplus", "softplus_clamped", "wolf_tanh", "atan_clamp", "soft_clip")
    half = slice(3, None)
    for name in maps:
        for inverse in (False, True):
            direction = "inverse" if inverse else "forward"
            yield _case(f"{name}-{direction}", scale=name, mask=half, inverse=inverse)
    linear_tanh = ops.ScaleMap("linear_tanh", gain=0.5, amplitude=0.7)
    yield _case("linear_tanh", scale=linear_tanh)
    yield _case("tanh", scale=ops.scale_map("tanh_rescale", amplitude=0.5))
    yield _case("learned", scale="tanh_rescale", learned=True)
    yield _case("learned-checkerboard", scale="tanh_rescale", learned=True, mask="checkerboard_odd")
    yield _case("reciprocal", scale=ops.ScaleMap("sigmoid", offset=2.0, reciprocal=True))
    yield _case("additive", additive=True, mask=half)
    yield _case("additive-inverse", additive=True, mask=half, inverse=True, shift_gain=-0.5)
    for inverse in (False, True):
        yield _case(f"shift_first-{inverse}", order="shift_first", shift_gain=-1.0, inverse=inverse)
    for packing in ("interleaved_st", "chunk_ts", "chunk_st"):
        yield _case(packing, packing=packing, mask=slice(0, 3))
        yield _case(f"vector-{packing}", shapes=VECTORS, packing=packing, mask=slice(1, 4))
    yield _case("vector", shapes=VECTORS, scale="exp")
    yield _case("index", mask=torch.tensor([2, 0]))
    yield _case("index-vector", shapes=VECTORS, mask=torch.tensor([3, 1]))
    for parity in ("even", "odd"):
        yield _case(f"checkerboard_{parity}", mask=f"checkerboard_{parity}", inverse=parity == "odd")
    yield _case("save-output", save="output", mask=half)
    yield _case("save-output-shift_first", save="output", order="shift_first", scale="softplus")
