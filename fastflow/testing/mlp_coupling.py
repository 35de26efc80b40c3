"""The cases of stacks of MLP couplings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.ops.mlp_stack import ACTIVATIONS, ActNormStep, CouplingStep, MLPStack, PermutationStep, Step
from fastflow.testing.case import Case, Inputs, randn

# size: samples, features, hidden layers of the first coupling and of the second
SIZES = {
    "tiny": (16, 3, (6, 4), (5,)),
    "odd": (77, 5, (33, 17), (21, 6, 3)),
    "bench": (512, 2, (64, 64), (64, 64)),
}
SELFTEST = ("exp", "tanh_rescale-inverse", "networks-masked")

Steps = Callable[[int, tuple[int, ...], tuple[int, ...]], Sequence[Step]]


def _stack(features: int, steps: Steps, context: int) -> MLPStack:
    hidden = next(sizes[2:] for sizes in SIZES.values() if sizes[1] == features)
    return MLPStack(features, steps(features, *hidden), context)


def _inputs(size: str, steps: Steps, context: int) -> Inputs:
    samples, features = SIZES[size][:2]
    made = {"x": randn(samples, features)}
    if context:
        made["context"] = randn(samples, context, seed=1)
    for i, shape in enumerate(_stack(features, steps, context).shapes):
        made[f"p{i}"] = 0.5 * (shape[-1] ** -0.5 if len(shape) == 2 else 1.0) * randn(*shape, seed=i + 2)
    return made


def _run(x: Tensor, steps: Steps, width: int, context: Tensor | None = None, order: Tensor | None = None, **rest):
    """With ``order`` samples and hidden units are permuted on the way in, and samples back on the way out."""
    params = [rest.pop(name) for name in list(rest) if name.startswith("p") and name[1:].isdigit()]
    stack = _stack(x.shape[1], steps, width)
    if order is None:
        return ops.mlp_coupling(x, params, stack, context=context, **rest)
    generator = torch.Generator().manual_seed(int(order))
    samples = torch.randperm(x.shape[0], generator=generator).to(x.device)
    context = None if context is None else context[samples]
    params = _units(params, stack, generator)
    y, logdet = ops.mlp_coupling(x[samples], params, stack, context=context, **rest)
    return y[samples.argsort()], logdet[samples.argsort()]


def _units(params: list[Tensor], stack: MLPStack, generator: torch.Generator) -> list[Tensor]:
    """The same networks with their hidden units in other orders."""
    found = []
    for step, own in stack.split(params):
        given = list(own)
        for widths in step.widths(stack.features, stack.context_features) if isinstance(step, CouplingStep) else ():
            columns = torch.arange(widths[0])
            for i, width in enumerate(widths[1:], 1):
                last = i + 1 == len(widths)
                rows = torch.arange(width) if last else torch.randperm(width, generator=generator)
                weight, bias = given.pop(0), given.pop(0)
                found += [weight[rows.to(weight.device)][:, columns.to(weight.device)], bias[rows.to(bias.device)]]
                columns = rows
        found += given
    return found


def _orders(inputs: Inputs) -> Iterator[Inputs]:
    return ({**inputs, "order": torch.tensor(seed)} for seed in range(12))


def _back(outputs: tuple[Tensor, ...], x: Tensor, inverse: bool = False, **inputs) -> Tensor:
    return _run(outputs[0], inverse=not inverse, **inputs)[0]


def _case(name: str, steps: Steps, context: int = 0, **options) -> Case:
    make = partial(_inputs, steps=steps, context=context)
    fixed = {"steps": steps, "width": context, **options}
    return Case(
        "mlp_coupling",
        name,
        partial(_run, **fixed),
        make,
        back=partial(_back, **fixed),
        logdet=1,
        keep=tuple(make("tiny"))[1 + (context > 0) :],
        orders=_orders,
        selftest=name in SELFTEST,
    )


def _two(number: int, scale: str | ops.ScaleMap, rescale: bool = False, **options) -> Steps:
    """ActNorm, coupling, permutation, coupling: every other feature changes, then the others."""
    activation = list(ACTIVATIONS)[number % len(ACTIVATIONS)]

    def steps(features: int, first: tuple[int, ...], second: tuple[int, ...]) -> Sequence[Step]:
        changed = tuple(range(1, features, 2))
        made = {"activation": activation, "slope": 0.2, "scale": scale, **options}
        return (
            ActNormStep(1.5),
            CouplingStep(changed, first, rescale=len(changed) if rescale else 0, **made),
            PermutationStep(tuple(reversed(range(features)))),
            CouplingStep(changed[::-1], second, rescale=int(rescale), **made),
        )

    return steps


def _networks(features: int, first: tuple[int, ...], second: tuple[int, ...]) -> Sequence[Step]:
    """Two networks, which see zeros where x changes; layers without a coupling behind them."""
    some = tuple(range(0, features, 2))
    return (
        CouplingStep(some, first, packing="separate", hidden_scale=second, masked=True, scale="exp", activation="tanh"),
        PermutationStep((*range(1, features), 0)),
        CouplingStep(some, (), packing="chunk_st", order="shift_first", shift_gain=-0.5, scale="sigmoid2"),
        ActNormStep(),
        PermutationStep((*range(1, features), 0)),
        ActNormStep(0.5),
    )


def cases() -> Iterator[Case]:
    maps = ("exp", "sigmoid2", "sigmoid2_eps", "softplus", "softplus_clamped", "wolf_tanh", "atan_clamp", "soft_clip")
    for i, name in enumerate(maps):
        inverse = i % 2 == 1
        yield _case(f"{name}-inverse" if inverse else name, _two(i, name), inverse=inverse)
    linear = ops.ScaleMap("linear_tanh", gain=0.5, amplitude=0.7)
    yield _case("linear_tanh", _two(2, linear, packing="chunk_ts", order="shift_first"))
    yield _case("additive", _two(3, "none"))
    yield _case("additive-inverse", _two(4, "none", shift_gain=-0.5), inverse=True)
    yield _case("reciprocal", _two(5, ops.ScaleMap("sigmoid", offset=2.0, reciprocal=True), packing="interleaved_st"))
    for inverse in (False, True):
        name = "tanh_rescale-inverse" if inverse else "tanh_rescale"
        yield _case(name, _two(int(inverse), "tanh_rescale", rescale=True), context=4, inverse=inverse)
        yield _case("networks-inverse" if inverse else "networks-masked", _networks, inverse=inverse)
    yield _case("save-output", _two(2, "tanh_rescale", packing="chunk_st"), save="output")
    yield _case("save-output-inverse", _two(4, "soft_clip"), context=3, save="output", inverse=True)
