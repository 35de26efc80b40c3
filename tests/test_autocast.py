"""Under autocast every op takes what comes, computes in float32 and gives the dtypes it gives without it."""

import pytest
import torch

from fastflow import nn, testing
from fastflow.testing.case import randn
from fastflow.testing.cli import able

BACKENDS = able("cpu")


def outputs_and_gradients(case, inputs, backend, autocast):
    """The backward pass outside of autocast, as torch has it."""
    leaves = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = case.run(backend=backend, **leaves)
    wanted = [v for v in leaves.values() if v.requires_grad]
    differentiable = [o for o in outputs if o.requires_grad]  # what is drawn is not
    if not differentiable:
        return [*outputs]
    total = sum((o.float() * randn(*o.shape).float()).sum() for o in differentiable)
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    return [*outputs, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.id)
def test_same_numbers_with_and_without(case, backend):
    for dtype in (torch.float32, torch.bfloat16):
        if dtype not in case.dtypes:
            continue
        inputs = testing.cast(case, case.inputs("tiny"), dtype)
        found, without = (outputs_and_gradients(case, inputs, backend, on) for on in (True, False))
        for a, b in zip(found, without, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision(half):
    """The network's output is half precision, x and the log-determinant are not."""
    network = torch.nn.Conv2d(2, 8, 3, padding=1)
    layer = nn.AffineCoupling(network, slice(2, 6), scale="sigmoid2")
    x = torch.randn(3, 6, 4, 4)
    layer_input = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=half):
        z, logdet = layer(layer_input)
        back, minus = layer.inverse(z)
    assert z.dtype == logdet.dtype == torch.float32
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(minus, -logdet)
    (z.sum() + logdet.sum()).backward()
    assert network.weight.grad.dtype == torch.float32 and layer_input.grad.dtype == torch.float32
