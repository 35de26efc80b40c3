"""Stacks of MLP couplings beyond the table: against the layers they are made of, other libraries, bad input."""

import copy
import math

import pytest
import torch

import fastflow
from fastflow import nn, ops
from fastflow.ops import ActNormStep, CouplingStep, MLPStack, PermutationStep, mlp_coupling
from fastflow.ops.mlp_coupling import DOUBLES

MAPS = ("exp", "sigmoid2", "sigmoid2_eps", "softplus", "softplus_eps", "softplus_clamped", "tanh_rescale", "wolf_tanh")
MAPS += ("atan_clamp", "soft_clip")


def mlp(*widths, activation=torch.nn.Tanh):
    layers = []
    for n, m in zip(widths, widths[1:], strict=False):
        layers += [torch.nn.Linear(n, m), activation()]
    return torch.nn.Sequential(*layers[:-1])


def flow(features=3, layers=3, seed=0, **options):
    """ActNorm, coupling, permutation, again and again."""
    torch.manual_seed(seed)
    options = {"hidden": (16, 8), "zero_init": False, "mask": "odd", **options}
    parts = []
    for _ in range(layers):
        parts += [nn.ActNorm(features), nn.MLPCoupling(features, **options), nn.Permutation(features)]
    return parts


def both(stack, x, context=None, inverse=False):
    """Values and all gradients of the fused stack, and of its layers one by one."""
    found = []
    chain = nn.Sequential(*copy.deepcopy(list(stack)))
    for module in (stack, chain):
        leaves = [x.clone().requires_grad_(), *([] if context is None else [context.clone().requires_grad_()])]
        run = module.inverse if inverse else module
        z, logdet = run(*leaves)
        total = (z * torch.linspace(0.5, 2, z.shape[1])).sin().sum() + (logdet * logdet.detach().cos()).sum()
        found.append((z, logdet, *torch.autograd.grad(total, [*leaves, *module.parameters()])))
    return found


def close(pair, tolerance=2e-5):
    for i, (value, expected) in enumerate(zip(*pair, strict=True)):
        scale = expected.abs().max().clamp(min=1e-3)
        assert (value - expected).abs().max() <= tolerance * scale, i


# --- the same as its layers -------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("features", [2, 5])
def test_equals_its_layers(features, inverse):
    stack = nn.CouplingStack(*flow(features))
    x = torch.randn(100, features)
    stack(2 * x + 1)
    close(both(stack, x, inverse=inverse))


def test_equals_couplings_with_a_network():
    """nn.AffineCoupling calls its network and then the kernel of the coupling: nothing here is shared with that."""
    torch.manual_seed(0)
    mask = torch.tensor([True, False, False, True, False])
    leaky = mlp(3, 16, 16, 4, activation=lambda: torch.nn.LeakyReLU(0.2))
    stack = nn.CouplingStack(
        nn.AffineCoupling(leaky, mask, scale="tanh_rescale", rescale=2, packing="chunk_st"),
        nn.Permutation(5, "shuffle"),
        nn.Sequential(
            nn.AffineCoupling(mlp(2, 7, 6), slice(2, 5), order="shift_first", shift_gain=-1.0),
            nn.AdditiveCoupling(mlp(2, 8, 3), "first_half"),
        ),
        nn.ActNorm(5),
        nn.AffineCoupling(mlp(3, 4), scale="softplus"),
    )
    x = torch.randn(70, 5)
    stack(x)
    for inverse in (False, True):
        close(both(stack, x, inverse=inverse))


@pytest.mark.parametrize("scale", MAPS)
def test_every_scale_map(scale):
    stack = nn.CouplingStack(*flow(4, scale=scale, layers=2)[1:])
    x = torch.randn(65, 4)
    stack(x)
    for inverse in (False, True):
        close(both(stack, x, inverse=inverse))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "elu", "silu", "softplus"])
def test_every_activation(activation):
    stack = nn.CouplingStack(nn.MLPCoupling(3, (9, 9, 9), activation=activation, slope=0.3, zero_init=False))
    network = stack[0].network
    layers = nn.CouplingStack(nn.AffineCoupling(network), nn.Permutation(3))
    x = torch.randn(33, 3)
    close(both(layers, x))
    close([stack(x), nn.AffineCoupling(network)(x)])


@pytest.mark.parametrize("width", [1, 3, 16, 31, 64, 100, 128, 200])
def test_every_width(width):
    torch.manual_seed(width)
    stack = nn.CouplingStack(nn.AffineCoupling(mlp(2, width, max(1, width // 2), 4)), nn.Permutation(4))
    close(both(stack, torch.randn(30, 4)))


def test_context():
    stack = nn.CouplingStack(*flow(3, context_features=4))
    x, context = torch.randn(70, 3), torch.randn(70, 4)
    stack(x, context)
    for inverse in (False, True):
        close(both(stack, x, context, inverse))
    with pytest.raises(ValueError, match=r"context: expected \[B, 4\], got none"):
        stack(x)
    without = nn.CouplingStack(*flow(3)[1:])
    without(x)
    assert torch.equal(without(x, context)[0], without(x)[0])  # a layer without use for it ignores it


def test_two_networks_that_see_zeros():
    """normflows' MaskedAffineFlow: s(b x) and t(b x), both over all features."""
    torch.manual_seed(0)
    b = torch.tensor([1.0, 0.0, 1.0])
    s, t = mlp(3, 8, 3), mlp(3, 5, 5, 3)
    step = CouplingStep((1,), (5, 5), "tanh", packing="separate", hidden_scale=(8,), masked=True, scale="exp")
    x = torch.randn(20, 3)
    z, logdet = mlp_coupling(x, [*t.parameters(), *s.parameters()], MLPStack(3, [step]))
    torch.testing.assert_close(z, b * x + (1 - b) * (x * s(b * x).exp() + t(b * x)))
    torch.testing.assert_close(logdet, ((1 - b) * s(b * x)).sum(1))


def test_normflows():
    nf = pytest.importorskip("normflows")
    torch.manual_seed(0)
    for scale_map, scale in (("exp", "exp"), ("sigmoid_inv", "sigmoid2"), ("sigmoid", None)):
        theirs, ours = [], []
        for _ in range(3):
            theirs += [nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 16, 16, 4]), scale_map=scale_map)]
            theirs += [nf.flows.Permute(4, mode="swap")]
            network = mlp(2, 16, 16, 4, activation=torch.nn.ReLU)
            network.load_state_dict(theirs[-2].flows[1].param_map.net.state_dict())
            map_ = scale or ops.ScaleMap("sigmoid", offset=2.0, reciprocal=True)
            ours += [nn.AffineCoupling(network, scale=map_), nn.Permutation([2, 3, 0, 1])]
        stack, z = nn.CouplingStack(*ours), torch.randn(50, 4)
        grads = []
        for (x, logdet), parameters in ((_chain(theirs, z), theirs), (stack(z), ours)):
            leaves = [p for m in parameters for p in m.parameters()]
            grads.append((x, logdet, *torch.autograd.grad((x.sin().sum() + logdet.sum()), leaves)))
        close(grads[::-1])


def _chain(flows, z):
    total = 0
    for one in flows:
        z, logdet = one(z)
        total = total + logdet
    return z, total


# --- properties -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
def test_jacobian(inverse):
    stack = nn.CouplingStack(*flow(4, scale="exp")).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    stack(3 * x)
    run = stack.inverse if inverse else stack
    jacobian = torch.autograd.functional.jacobian(lambda v: run(v)[0].sum(0), x).transpose(0, 1)
    torch.testing.assert_close(run(x)[1], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-10, atol=1e-10)


def test_round_trip():
    stack = nn.CouplingStack(*flow(6, layers=6, scale="exp"))
    x = torch.randn(300, 6)
    z, logdet = stack(x)
    back, minus = stack.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(minus, -logdet, rtol=1e-4, atol=1e-4)
    error = fastflow.inverse_error(stack, x)
    assert len(error.layers) == 18 and error.chain[0] < 1e-4


def test_additive_has_no_logdet():
    """And its backward starts from the output."""
    stack = nn.CouplingStack(*[m for m in flow(4, scale="none", layers=4) if not isinstance(m, nn.ActNorm)])
    x = torch.randn(40, 4)
    assert torch.equal(stack(x)[1], torch.zeros(40)) and stack._stack.amplification == {False: 0, True: 0}
    for inverse in (False, True):
        close(both(stack, x, inverse=inverse))


def test_where_backward_starts():
    """log of what a rounding may grow by, from the bounds of the scale maps."""

    def grows(scale, number=1, **options):
        return MLPStack(2, number * [CouplingStep((1,), (4,), scale=scale, **options)]).amplification

    assert grows("sigmoid2_eps", 2) == {False: -2 * math.log(1e-3), True: 2 * math.log(1 + 1e-3)}
    assert grows("exp") == {False: math.inf, True: math.inf} == grows("tanh_rescale", rescale=1)
    assert grows("sigmoid2") == {False: math.inf, True: 0.0}
    bounded = ops.scale_map("tanh_rescale", amplitude=0.1)
    assert 0.59 < grows(bounded, 6)[False] < DOUBLES < grows(bounded, 8)[False] < 0.81
    assert grows("softplus_clamped")[True] == pytest.approx(math.log(3.0))
    params = {}
    for save in ("input", "output", "auto"):
        stack = MLPStack(2, 4 * [CouplingStep((1,), (4,), scale=bounded), PermutationStep((1, 0))])
        own = [torch.ones(s, dtype=torch.float64).mul(0.3).requires_grad_() for s in stack.shapes]
        z, logdet = mlp_coupling(torch.linspace(0, 1, 6, dtype=torch.float64).view(3, 2), own, stack, save=save)
        params[save] = torch.autograd.grad(z.sum() + logdet.sum(), own)
    for a, b, c in zip(*params.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert torch.equal(b, c)


def test_nan_reaches_the_logdet():
    for activation in ("relu", "leaky_relu", "tanh", "elu", "silu", "softplus"):
        stack = nn.CouplingStack(nn.MLPCoupling(2, (8,), activation=activation, zero_init=False))
        z, logdet = stack(torch.tensor([[math.nan, 1.0], [1.0, 1.0]]))
        assert logdet.isnan().tolist() == [True, False] and z.isnan().tolist() == [[True, True], [False, False]]


def test_rows_do_not_touch():
    """A sample that overflows leaves the others' gradients alone, and the padding of a block is no sample."""
    stack = nn.CouplingStack(nn.MLPCoupling(2, (8,), scale="exp", zero_init=False))
    with torch.no_grad():
        stack[0].network[-1].bias.fill_(89.0)  # e^89 overflows
        stack[0].network[-1].weight.fill_(-1.0)
        stack[0].network[0].bias.fill_(1.0)
        stack[0].network[0].weight.fill_(1.0)
    x = torch.full((3, 2), 5.0).requires_grad_()
    z, logdet = stack(x)
    grads = torch.autograd.grad(z.sum() + logdet.sum(), [x, *stack.parameters()])
    assert all(g.isfinite().all() for g in grads)


def test_empty_batch():
    stack = nn.CouplingStack(*flow(3, layers=1)[1:])
    for run in (stack, stack.inverse):
        z, logdet = run(torch.empty(0, 3))
        assert z.shape == (0, 3) and logdet.shape == (0,)
        grads = torch.autograd.grad(z.sum() + logdet.sum(), list(stack.parameters()))
        assert all(not g.any() for g in grads)


def test_threads_do_not_matter():
    stack = nn.CouplingStack(*flow(2, layers=4, hidden=(64, 64)))
    x = torch.randn(1000, 2)
    stack(x)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            z, logdet = stack(x)
            found.append((z, logdet, *torch.autograd.grad(z.sum() + logdet.sum(), list(stack.parameters()))))
    finally:
        torch.set_num_threads(threads)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


def test_what_training_keeps():
    """D numbers per sample and coupling, whatever the width; nothing where backward starts from the output."""

    def kept(hidden, layers, scale):
        stack = nn.CouplingStack(
            *(m for m in flow(2, layers=layers, hidden=hidden, scale=scale) if not isinstance(m, nn.ActNorm))
        )
        own = {p.untyped_storage().data_ptr() for p in stack.parameters()}
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            stack(torch.randn(256, 2))
        return sum(size for address, size in sizes.items() if address not in own)

    x = 256 * 2 * 4
    assert kept((8,), 4, "exp") == kept((128, 128), 4, "exp") == 2 * x + 4 * x
    assert kept((8,), 4, "none") == kept((64, 64), 16, "none") == 2 * x


def test_second_derivatives():
    stack = MLPStack(3, [ActNormStep(), CouplingStep((0, 2), (4,), "tanh", scale="exp"), PermutationStep((1, 2, 0))])
    params = [torch.randn(s, dtype=torch.float64).mul(0.5).requires_grad_() for s in stack.shapes]
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for inverse in (False, True):
        run = lambda x, *params, i=inverse: mlp_coupling(x, params, stack, inverse=i)  # noqa: E731
        torch.autograd.gradcheck(run, (x, *params))
        torch.autograd.gradgradcheck(run, (x, *params), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Computed in float32 whatever is given in half; under autocast, too."""
    stack = nn.CouplingStack(*flow(3, layers=2)[1:])
    x = torch.randn(20, 3)
    stack(x)
    expected = both(stack, x.to(dtype).float())[0]
    z, logdet = stack(x.to(dtype))
    assert z.dtype == dtype and logdet.dtype == torch.float32
    torch.testing.assert_close(z, expected[0].to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16), fastflow.use_backend("reference"):
        torch.testing.assert_close(stack(x.to(dtype))[1], logdet)
    half = copy.deepcopy(stack).to(dtype)
    z, logdet = half(x.to(dtype))
    logdet.sum().backward()
    assert all(p.grad.dtype == dtype for p in half.parameters() if p.grad is not None)
    wide = copy.deepcopy(half).float()
    torch.testing.assert_close(logdet, wide(x.to(dtype).float())[1])


def test_layouts():
    """Strided x, transposed weights."""
    stack = MLPStack(2, [CouplingStep((1,), (4, 4))])
    params = [torch.randn(s).requires_grad_() for s in stack.shapes]
    turned = [p.detach().t().contiguous().t().requires_grad_() if p.dim() == 2 else p for p in params]
    x = torch.randn(30, 4)
    found = []
    for v, own in ((x[:, ::2], turned), (x[:, ::2].contiguous(), params)):
        z, logdet = mlp_coupling(v, own, stack)
        found.append((z, logdet, *torch.autograd.grad(z.sum() + logdet.sum(), own)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_compile():
    stack = nn.CouplingStack(*flow(3, layers=2, scale="exp"))
    x = torch.randn(20, 3)
    stack(x)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    found = []
    for run in (stack, compiled):
        z, logdet = run(x)
        found.append((z, logdet, *torch.autograd.grad(z.sum() + logdet.sum(), list(stack.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    one = torch.compile(stack[1], fullgraph=True, backend="aot_eager")
    assert torch.equal(one(x)[0], stack[1](x)[0])


def test_opcheck():
    stack = MLPStack(2, [ActNormStep(), CouplingStep((1,), (4,))], 3)
    params = [torch.randn(s) for s in stack.shapes]
    arguments = (torch.randn(5, 2), torch.randn(5, 3), params, stack.code, stack.constants, False, 1)
    torch.library.opcheck(torch.ops.fastflow.mlp_coupling_fwd.cpu, arguments)


# --- the modules --------------------------------------------------------------------------------------


def test_actnorm_initialises_layer_by_layer():
    parts = flow(3, layers=3)
    chain = nn.Sequential(*copy.deepcopy(parts))
    stack = nn.CouplingStack(*parts)
    with pytest.raises(RuntimeError, match="ActNorm is not initialised"):
        stack.inverse(torch.randn(5, 3))
    x = 3 + 2 * torch.randn(200, 3)
    for a, b in zip(stack(x), chain(x), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(stack.state_dict().items(), chain.state_dict().items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
    loaded = nn.CouplingStack(*flow(3, layers=3, seed=1))
    loaded.load_state_dict(stack.state_dict())
    assert torch.equal(loaded.inverse(x)[0], stack.inverse(x)[0])


def test_state():
    """Names as ordinary modules have them; what is loaded, replaced or moved counts at once."""
    layer = nn.MLPCoupling(4, (8,), scale="tanh_rescale", rescale=1)
    names = ["rescale", "network.0.weight", "network.0.bias", "network.2.weight", "network.2.bias"]
    assert list(layer.state_dict()) == names
    stack = nn.CouplingStack(*flow(3, layers=2)[1:], nn.Permutation(3, "shuffle"))
    x = torch.randn(9, 3)
    stack(x)
    state = {k: v.clone() for k, v in stack.state_dict().items()}
    state["5.indices"], state["5.inverse_indices"] = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    stack.load_state_dict(state)
    assert torch.equal(stack(x)[0], nn.Sequential(*stack)(x)[0])
    stack[0].network[2] = torch.nn.Linear(16, 8)
    close(both(stack, x))
    other = nn.CouplingStack(nn.AffineCoupling(mlp(2, 8, 2)), nn.Permutation(3))
    other[0].network = mlp(2, 5, 5, 2)
    close(both(other, x))
    copied = copy.deepcopy(stack)
    with torch.no_grad():
        copied[0].network[4].bias.add_(1.0)
    assert not torch.equal(copied(x)[0], stack(x)[0])
    wide, _ = copy.deepcopy(stack).double()(x.double())
    torch.testing.assert_close(wide.float(), stack(x)[0])
    torch.nn.utils.parametrizations.weight_norm(stack[0].network[0])
    close(both(stack, x))


def test_hooks_and_debug_see_the_layers():
    stack = nn.CouplingStack(*flow(2, layers=2)[1:])
    stack(torch.randn(9, 2))
    seen = []
    handle = stack[0].network[0].register_forward_hook(lambda *_: seen.append(1))
    stack(torch.randn(9, 2))
    handle.remove()
    with fastflow.debug(), pytest.raises(fastflow.NonFiniteError, match=r"0 \(MLPCoupling\), forward"):
        stack(torch.tensor([[math.nan, 0.0]]))


def test_trains():
    """Two moons are found by a few layers."""
    torch.manual_seed(0)
    angle = math.pi * torch.rand(2000)
    upper = torch.rand(2000) < 0.5
    x = torch.stack(
        [torch.where(upper, angle.cos(), 1 - angle.cos()), torch.where(upper, angle.sin(), 0.5 - angle.sin())]
    )
    x = x.t() + 0.1 * torch.randn(2000, 2)
    parts = []
    for i in range(6):
        parts += [
            nn.MLPCoupling(2, (32, 32), "odd" if i % 2 else "even", scale="tanh_rescale", rescale=1),
            nn.ActNorm(2),
        ]
    model = nn.Flow(nn.StandardNormal(2), nn.CouplingStack(*parts))
    model.initialize(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = -model.log_prob(x).mean().item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = -model.log_prob(x[torch.randint(2000, (256,))]).mean()
        loss.backward()
        optimizer.step()
    assert -model.log_prob(x).mean().item() < first - 0.5
    assert model.sample(10).isfinite().all()


# --- bad input ----------------------------------------------------------------------------------------


def test_what_is_refused():
    cases = [
        (lambda: nn.MLPCoupling(1), "features: expected at least 2"),
        (lambda: nn.MLPCoupling(2, mask=[True, True]), "changed: all 2 features change"),
        (lambda: nn.MLPCoupling(3, mask=[True]), "mask: expected a slice or 3 bools"),
        (lambda: nn.MLPCoupling(3, mask="left"), "mask: expected one of second_half"),
        (lambda: nn.MLPCoupling(3, activation="gelu"), "activation: expected one of relu"),
        (lambda: nn.MLPCoupling(3, hidden=(4, 0)), "hidden: expected widths of at least 1"),
        (lambda: nn.MLPCoupling(4, rescale=2), "rescale: expected 0, or with a scale map of kind tanh"),
        (lambda: CouplingStep((1, 1)), "changed: expected features, each once"),
        (lambda: CouplingStep((1,), slope=-1.0), "slope: expected a number of at least 0"),
        (lambda: MLPStack(2, [CouplingStep((2,))]), r"steps\[0\]: changed: expected features below 2"),
        (lambda: MLPStack(2, [PermutationStep((0, 0))]), r"steps\[0\]: indices: expected each of 0 ... 1 once"),
        (lambda: nn.CouplingStack(nn.ActNorm(2), nn.Permutation(3)), "layers: expected one number of features"),
        (lambda: nn.CouplingStack(nn.AffineCoupling(mlp(1, 2))), "layers: expected one number of features, got none"),
        (lambda: nn.CouplingStack(nn.MLPCoupling(2), nn.MLPCoupling(2, context_features=3)), "see the same context"),
        (lambda: nn.CouplingStack(nn.ActNorm(4), nn.AffineCoupling(mlp(1, 4))), r"layers\[1\].network: expected param"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    network = torch.nn.Sequential(torch.nn.Linear(1, 4, bias=False), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    mixed = torch.nn.Sequential(*mlp(1, 4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    wrong = [
        (nn.Squeeze(), r"layers\[1\]: expected a coupling, ActNorm or Permutation, got Squeeze"),
        (nn.AffineCoupling(torch.nn.Linear(1, 2)), r"layers\[1\].network: expected an nn.Sequential"),
        (nn.AffineCoupling(network), r"layers\[1\].network\[0\]: expected an nn.Linear with bias"),
        (nn.AffineCoupling(mixed), r"layers\[1\].network\[3\]: expected one of relu"),
        (nn.AffineCoupling(torch.nn.Sequential(*mlp(1, 2), torch.nn.ELU())), "expected an nn.Linear as its last layer"),
    ]
    for layer, message in wrong:
        with pytest.raises(TypeError, match=message):
            nn.CouplingStack(nn.ActNorm(2), layer)


def test_bad_calls():
    stack = MLPStack(2, [CouplingStep((1,), (4,))], 3)
    params, x, context = [torch.randn(s) for s in stack.shapes], torch.randn(5, 2), torch.randn(5, 3)
    calls = [
        (ValueError, r"x: expected \[B, 2\], got \[5, 3\]", lambda: mlp_coupling(context, params, stack)),
        (ValueError, r"context: expected \[B, 3\], got none", lambda: mlp_coupling(x, params, stack)),
        (ValueError, "context: expected shape", lambda: mlp_coupling(x, params, stack, context=x)),
        (ValueError, "params: expected 4 tensors, got 3", lambda: mlp_coupling(x, params[1:], stack, context=context)),
        (
            ValueError,
            r"params\[0\]: expected shape \[4, 4\], got \[4\]",
            lambda: mlp_coupling(x, [params[1], *params[1:]], stack, context=context),
        ),
        (
            TypeError,
            r"params\[0\]: float64 goes with float64 only",
            lambda: mlp_coupling(x, [params[0].double(), *params[1:]], stack, context=context),
        ),
        (ValueError, "save: expected", lambda: mlp_coupling(x, params, stack, context=context, save="all")),
        (ValueError, "logdet: expected", lambda: mlp_coupling(x, params, stack, context=context, logdet=x)),
    ]
    for error, message, call in calls:
        with pytest.raises(error, match=message):
            call()
    # what the op is told directly it checks before it reads
    with pytest.raises(ValueError, match="parameter 0 of a stack has another size"):
        torch.ops.fastflow.mlp_coupling_fwd.cpu(
            x, context, [params[1], *params[1:]], stack.code, stack.constants, False, 0
        )
    with pytest.raises(ValueError, match="a stack has more parameters than were given"):
        torch.ops.fastflow.mlp_coupling_fwd.cpu(x, context, params[:2], stack.code, stack.constants, False, 0)
