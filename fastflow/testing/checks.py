"""What every case must satisfy: a backend against the reference.

Tolerances are derived, never tuned: twice the reference's own error in that dtype against float64, plus one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastflow.testing.case import Case, Inputs, randn

__all__ = ["CHECKS", "cast", "check", "compare", "layouts", "tolerance"]

# --- tolerance --------------------------------------------------------------------------------------


def tolerance(truth: Tensor, same: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Twice the error of the same-dtype reference plus one rounding, in the maximum norm of the output.

    ``same`` are the reference's results for several layouts, that is for several orders of summation: one alone may
    be right by luck. Float64 has no wider reference: ``same`` is then the float32 one, whose error shrinks by the
    ratio of the roundings, and as ``truth`` is itself a float64 result, it is allowed as much as the value: four times.
    """
    truth = truth.double()
    if truth.numel() == 0:
        return 0.0
    error = max((s.double() - truth).abs().max().item() for s in same)
    factor = 2.0
    if dtype == torch.float64:
        factor = 4.0 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return factor * error + torch.finfo(dtype).eps * truth.abs().max().item()


def compare(what: str, value: Tensor, truth: Tensor, same: Sequence[Tensor]) -> None:
    """Raises AssertionError unless ``value`` is as near to ``truth`` as :func:`tolerance` says."""
    if value.shape != truth.shape:
        raise AssertionError(f"{what}: shape {list(value.shape)}, the reference has {list(truth.shape)}")
    if value.dtype != same[0].dtype and value.dtype != torch.float64:
        raise AssertionError(f"{what}: dtype {value.dtype}, the reference has {same[0].dtype}")
    if value.numel() == 0:
        return
    allowed = tolerance(truth, same, value.dtype)
    error = (value.double() - truth.double()).abs().max().item()
    if not error <= allowed:  # NaN fails
        raise AssertionError(f"{what}: error {error:.3g} above the derived tolerance {allowed:.3g}")


# --- checks -----------------------------------------------------------------------------------------


def cast(case: Case, inputs: Inputs, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    def one(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device)
        kept = name in case.keep and dtype not in (torch.float32, torch.float64)
        return tensor.to(device, torch.float32 if kept else dtype)

    return {name: one(name, tensor) for name, tensor in inputs.items()}


def layouts(case: Case, inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """The same values in the layouts a model produces: as made, channels_last, a channel split, a batch expanded."""
    yield "contiguous", inputs

    def each(change: Callable[[Tensor], Tensor]) -> Inputs:
        return {k: v if k in case.keep or v.dim() < 2 else change(v) for k, v in inputs.items()}

    def split(t: Tensor) -> Tensor:
        return torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]]

    yield "split", each(split)
    if any(t.dim() == 4 for t in inputs.values()):
        yield "channels_last", each(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
        yield (
            "channels_last split",
            each(lambda t: split(t.contiguous(memory_format=torch.channels_last)) if t.dim() == 4 else t),
        )
        yield "transposed", each(lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() == 4 else t)


def _grads(case: Case, inputs: Inputs, backend: str, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    inputs = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    outputs = case.run(backend=backend, **inputs)
    wanted = [v for v in inputs.values() if v.requires_grad]
    pairs = [(o, w.to(o)) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in pairs], wanted, [w for _, w in pairs], allow_unused=True)
    return tuple(torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True))


def _against(case: Case, backend: str, dtype: torch.dtype, device: str, size: str, compute: Callable) -> None:
    """``compute(case, inputs, backend)`` in every layout against the reference in float64."""
    inputs = cast(case, case.inputs(size), dtype, device)
    truth = compute(case, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}, "reference")
    rounded, lower = _rounded(case, inputs, dtype, device)
    arrangements = [*(arranged for _, arranged in layouts(case, lower)), *(case.orders(lower) if case.orders else ())]
    if device != "cpu":  # which sums in yet another order
        arrangements.append({k: v.cpu() for k, v in lower.items()})
    same = [[t.to(device) for t in compute(rounded, arranged, "reference")] for arranged in arrangements]
    for layout, arranged in layouts(case, inputs):
        for i, (value, expected, *references) in enumerate(
            zip(compute(case, arranged, backend), truth, *same, strict=True)
        ):
            compare(f"{case.id} {backend} {dtype} {size} {layout}, tensor {i}", value, expected, references)


def _rounded(case: Case, inputs: Inputs, dtype: torch.dtype, device: str) -> tuple[Case, Inputs]:
    """What shows the rounding of a dtype: the case itself, for float64 in float32."""
    if dtype != torch.float64:
        return case, inputs
    return case.plain or case, cast(case, inputs, torch.float32, device)


SIZES = ("tiny", "odd")


def check_forward(
    case: Case, backend: str, dtype: torch.dtype, device: str = "cpu", sizes: Sequence[str] = SIZES
) -> None:
    """Every output equals the reference's, in every layout, at ragged and empty sizes."""
    for size in sizes:
        _against(case, backend, dtype, device, size, lambda c, i, b: c.run(backend=b, **i))
    inputs = cast(case, case.inputs("tiny"), dtype, device)
    none = {k: v if k in case.keep or v.dim() < 2 else v[:0] for k, v in inputs.items()}
    for i, o in zip(case.run(backend=backend, **none), case.run(backend="reference", **none), strict=True):
        if i.shape != o.shape or i.dtype != o.dtype:
            raise AssertionError(f"{case.id} {backend}: an empty batch gives {i.shape}, the reference {o.shape}")


def check_gradient(
    case: Case, backend: str, dtype: torch.dtype, device: str = "cpu", sizes: Sequence[str] = SIZES
) -> None:
    """The gradient of every input equals the reference's, in every layout."""
    for size in sizes:
        weights = tuple(randn(*o.shape, seed=7) for o in case.run(backend="reference", **case.inputs(size)))
        weights = tuple(w.to(device) for w in weights)
        _against(case, backend, dtype, device, size, lambda c, i, b, w=weights: _grads(c, i, b, w))


def check_inverse(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """The inverse of the output is the input again, to the error the reference has."""
    if case.back is None:
        return
    inputs = cast(case, case.inputs("odd"), dtype, device)
    x = next(iter(inputs.values()))

    def roundtrip(c: Case, i: Inputs, b: str) -> Tensor:
        return c.back(c.run(backend=b, **i), backend=b, **i)

    rounded, lower = _rounded(case, inputs, dtype, device)
    same = [roundtrip(rounded, arranged, "reference") for _, arranged in layouts(case, lower)]
    compare(f"{case.id} {backend} {dtype} inverse", roundtrip(case, inputs, backend), x, same)


def check_logdet(case: Case, backend: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
    """The log-determinant equals that of the Jacobian that autograd finds."""
    if case.logdet is None or dtype != torch.float64:
        return
    inputs = cast(case, case.inputs("tiny"), dtype, device)
    name, x = next(iter(inputs.items()))
    rest = {k: v for k, v in inputs.items() if k != name}
    jacobian = torch.autograd.functional.jacobian(
        lambda v: case.run(backend=backend, **{name: v}, **rest)[0].flatten(1).sum(0), x
    )
    # samples do not mix: summing over the batch leaves the per-sample Jacobians [D, B, D]
    jacobian = jacobian.flatten(2).transpose(0, 1)
    truth = torch.linalg.slogdet(jacobian).logabsdet
    value = case.run(backend=backend, **inputs)[case.logdet]
    scale = max(1.0, truth.abs().max().item())
    error = (value - truth).abs().max().item()
    if not error <= 1e-9 * scale:
        raise AssertionError(f"{case.id} {backend}: logdet is off the Jacobian's by {error:.3g}")


def check_gradcheck(case: Case, backend: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
    """First and second derivatives agree with finite differences."""
    if dtype != torch.float64 or case.derivatives == 0:
        return
    inputs = cast(case, case.inputs("tiny"), dtype, device)
    names = [k for k, v in inputs.items() if v.is_floating_point()]
    fixed = {k: v for k, v in inputs.items() if k not in names}
    tensors = tuple(inputs[k].clone().requires_grad_() for k in names)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        outputs = case.run(backend=backend, **dict(zip(names, values, strict=True)), **fixed)
        return tuple(o for o in outputs if o.requires_grad)

    torch.autograd.gradcheck(run, tensors, fast_mode=True)
    if case.derivatives > 1:
        torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def check_deterministic(case: Case, backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """Two runs give the same bits; of a kernel also on another number of threads, which a library may depend on.

    A GPU has its own order of threads in every run, so that there a few more are compared.
    """
    inputs = cast(case, case.inputs("bench"), dtype, device)
    threads, cpu = torch.get_num_threads(), torch.device(device).type == "cpu"
    first = case.run(backend=backend, **inputs)
    for _ in range(1 if cpu else 4):
        try:
            torch.set_num_threads(1 if cpu and backend != "reference" else threads)
            second = case.run(backend=backend, **inputs)
        finally:
            torch.set_num_threads(threads)
        for a, b in zip(first, second, strict=True):
            if not torch.equal(a, b):
                raise AssertionError(f"{case.id} {backend} {dtype}: two runs differ")


CHECKS: dict[str, Callable[..., None]] = {
    "forward": check_forward,
    "gradient": check_gradient,
    "inverse": check_inverse,
    "logdet": check_logdet,
    "gradcheck": check_gradcheck,
    "deterministic": check_deterministic,
}


def check(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """All checks of a case; raises AssertionError naming what failed."""
    for one in CHECKS.values():
        one(case, backend, dtype, device)
