"""WaveNet: against convolutions of PyTorch, causal, generated as it is scored, in pieces and from a saved state."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from fastflow import ops, use_backend
from fastflow.models import WaveNet
from fastflow.models.wavenet import mu_law_decode, mu_law_encode
from fastflow.ops import wavenet
from fastflow.ops.wavenet_generate import draw

SMALL = {"levels": 12, "residual": 6, "dilation": 5, "skip": 9, "blocks": 2, "depth": 3}
BOTH = {"local_features": 3, "global_features": 4}


def made(seed=0, dtype=torch.float32, **options):
    """A model of which no bias is zero."""
    torch.manual_seed(seed)
    model = WaveNet(**{**SMALL, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def context_of(model, n, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dtype = model.bias.dtype
    parts = []
    if model.local_weight is not None:
        parts.append(torch.randn(n, model.config["local_features"], steps, generator=generator).to(dtype))
    if model.classes is not None:
        parts.append(torch.randint(model.config["global_classes"], (n,), generator=generator))
    elif model.global_weight is not None:
        parts.append(torch.randn(n, model.config["global_features"], generator=generator).to(dtype))
    return tuple(parts) if len(parts) > 1 else parts[0] if parts else None


def codes_of(model, n, steps, seed=2):
    return torch.randint(model.levels, (n, steps), generator=torch.Generator().manual_seed(seed))


# --- convolutions, channels first, one-hot inputs -----------------------------------------------------


def independent(model, onehot, context=None):
    """Logits [B, V, T] for the codes [B, V, T]: a convolution pads its own inputs, and the first sees no code."""
    width, n = model.config["width"], len(onehot)
    local = context[0] if isinstance(context, tuple) else context if model.local_weight is not None else None
    glob = context[1] if isinstance(context, tuple) else context if model.global_weight is not None else None
    if model.classes is not None:
        glob = model.classes.weight[glob]
    first = model.embedding.permute(2, 1, 0)  # [R, V, w]
    h = F.conv1d(F.pad(onehot, (width, 0)), first)[..., : onehot.shape[2]]
    total = 0
    for i, d in enumerate(model.dilations):
        a = F.conv1d(F.pad(h, ((width - 1) * d, 0)), model.weight[i], model.bias[i], dilation=d)
        if local is not None:
            a = a + F.conv1d(local, model.local_weight[i][..., None])
        if glob is not None:
            a = a + F.linear(glob, model.global_weight[i])[..., None]
        f, g = a.chunk(2, 1)
        z = torch.tanh(f) * torch.sigmoid(g)
        total = total + F.conv1d(z, model.skip_weight[i][..., None], model.skip_bias[i])
        h = h + F.conv1d(z, model.residual_weight[i][..., None], model.residual_bias[i])
    a = F.relu(F.conv1d(F.relu(total), model.hidden_weight[..., None], model.hidden_bias))
    assert a.shape[0] == n
    return F.conv1d(a, model.output_weight[..., None], model.output_bias)


@pytest.mark.parametrize("options", [{}, {"width": 3, **BOTH}, {"width": 1}, {"global_classes": 3}], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_independent_implementation(options, backend):
    model = made(dtype=torch.float64, **options)
    codes, context = codes_of(model, 3, 90), context_of(model, 3, 90)
    with use_backend(backend):
        log_prob = model(codes, context)
    onehot = F.one_hot(codes, model.levels).transpose(1, 2).double()
    expected = (torch.log_softmax(independent(model, onehot, context), 1) * onehot).sum((1, 2))
    torch.testing.assert_close(log_prob, expected, rtol=1e-12, atol=1e-12)
    weights, parameters = torch.tensor([1.0, -2.0, 0.5]), list(model.parameters())
    grads = (torch.autograd.grad((v * weights).sum(), parameters, allow_unused=True) for v in (log_prob, expected))
    for (name, p), ours, theirs in zip(model.named_parameters(), *grads, strict=True):
        # the last layer's h goes nowhere: zeros of ours, none of autograd's
        theirs = torch.zeros_like(p) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_probabilities_sum_to_one():
    model = made(levels=4, dtype=torch.float64)
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)
    assert model(every).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_gradients_whatever_the_threads():
    """A long sample alone is split over layers, many samples over samples."""
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            for samples in (1, 11):
                model = made(residual=16, dilation=16, skip=32)
                model(codes_of(model, samples, 700)).sum().backward()
                found.append([p.grad for p in model.parameters()])
        finally:
            torch.set_num_threads(threads)
    for one, several in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


# --- what depends on what -----------------------------------------------------------------------------


def test_causal():
    model, steps = made(), 60
    codes = codes_of(model, 2, steps)
    before = model.logits(codes)
    for t in (0, 7, 30, steps - 2):
        changed = codes.clone()
        changed[:, t] = (changed[:, t] + 1) % model.levels
        after = model.logits(changed)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert not torch.equal(after[:, t + 1], before[:, t + 1])


@pytest.mark.parametrize("width", [2, 3])
def test_receptive_field(width):
    """The prediction of x_t, that is the output at t - 1, sees x_{t-R} and no earlier code."""
    model, t = made(width=width, dtype=torch.float64), 55
    field = model.receptive_field
    assert field == (width - 1) * 2 * 7 + 1 + (width - 1)
    codes = codes_of(model, 1, t + 1)
    onehot = F.one_hot(codes, model.levels).transpose(1, 2).double().requires_grad_()
    seen = torch.autograd.grad(independent(model, onehot)[..., t].sum(), onehot)[0].abs().sum((0, 1))
    assert seen[t - field] > 0 and not seen[: t - field].any() and not seen[t:].any()
    before = model.logits(codes)[:, t]
    for back, same in ((field, False), (field + 1, True)):
        changed = codes.clone()
        changed[:, t - back] = (changed[:, t - back] + 1) % model.levels
        assert torch.equal(model.logits(changed)[:, t], before) == same


def test_published_receptive_field():
    assert WaveNet.preset("ibab", levels=4).receptive_field == 5117
    with pytest.raises(ValueError, match="expected one of ibab"):
        WaveNet.preset("nonsense")


# --- generation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"width": 3, **BOTH}, {"width": 1}, {"global_classes": 3}, {"residual": 32, "skip": 48}], ids=str
)
def test_generated_as_scored(options):
    """The logits that codes were drawn from, before and after the receptive field is full, are those of the pass over
    all of them."""
    model = made(**options)
    context, steps = context_of(model, 3, 200), 200
    local = context[0] if isinstance(context, tuple) else None
    stream = model.stream(3, context[1] if isinstance(context, tuple) else context)
    codes, logits = stream.generate(steps, local, generator=torch.Generator().manual_seed(0), return_logits=True)
    assert codes.shape == (3, steps) and len(codes.unique()) > 5
    torch.testing.assert_close(logits, model.logits(codes, context), rtol=1e-5, atol=1e-5)
    assert torch.equal(codes, model.sample(3, context, generator=torch.Generator().manual_seed(0), length=steps))


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("options", [{}, {"width": 3, **BOTH}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_codes_of_the_reference(options, backend, dtype, request):
    if backend == "cuda":
        request.getfixturevalue("emulated")
    model, steps = made(dtype=dtype, depth=2, **options), 12
    context = context_of(model, 2, steps)
    local, glob = context if isinstance(context, tuple) else (None, context)
    for temperature in (1.0, 0.5, 0.0):
        found = []
        for name in (backend, "reference"):
            with use_backend(name):
                stream = model.stream(2, glob)
                generator = torch.Generator().manual_seed(3)
                made_here = stream.generate(
                    steps, local, temperature=temperature, generator=generator, return_logits=True
                )
                found.append((*made_here, stream.past, stream.recent))
        (codes, *numbers), (expected, *others) = found
        assert torch.equal(codes, expected)
        for a, b in zip(numbers, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"width": 3, **BOTH}], ids=str)
def test_streams_go_on(options):
    """In pieces, from a saved state, beside other streams and on other threads: the same bits."""
    model = made(**options)
    context = context_of(model, 5, 60)
    local, glob = context if isinstance(context, tuple) else (None, context)

    def part(a, b):
        return None if local is None else local[..., a:b]

    whole = model.stream(5, glob)
    codes = whole.generate(60, local, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    pieces = model.stream(5, glob)
    first = pieces.generate(23, part(0, 23), generator=generator)
    saved, noise = copy.deepcopy(pieces.state_dict()), generator.get_state()
    second = pieces.generate(37, part(23, 60), generator=generator)
    assert torch.equal(torch.cat([first, second], 1), codes)
    again = model.stream(5, glob)
    again.load_state_dict(saved)
    generator.set_state(noise)
    assert torch.equal(again.generate(37, part(23, 60), generator=generator), second)
    assert torch.equal(again.past, whole.past) and torch.equal(again.recent, whole.recent)

    uniforms = torch.rand(60, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for b in (0, 3):  # each by itself: other products, the same sums
        alone = model.stream(1, None if glob is None else glob[b : b + 1])
        rows = None if local is None else local[b : b + 1].transpose(1, 2)
        found = ops.wavenet_generate(alone.weights, alone.past, alone.recent, uniforms[:, b : b + 1].t(), context=rows)
        assert torch.equal(found[0], codes[b])
    with pytest.raises(ValueError, match="past: expected"):
        model.stream(4, None if glob is None else glob[:4]).load_state_dict(saved)


@pytest.mark.parametrize("width", [2, 3])
def test_feed_goes_where_generation_went(width):
    """Given codes in parallel, in pieces and between generated ones: the state and the predictions are the same."""
    model = made(width=width)
    stream, fed = model.stream(2), model.stream(2)
    codes, logits = stream.generate(90, return_logits=True)
    scored = [fed.feed(codes[:, a:b]) for a, b in ((0, 1), (1, 8), (8, 8), (8, 70), (70, 71))]
    assert fed.position == 71
    torch.testing.assert_close(torch.cat(scored, 1), logits[:, :71], rtol=1e-5, atol=1e-5)
    fed.feed(codes[:, 71:])
    torch.testing.assert_close(fed.past, stream.past, rtol=1e-5, atol=1e-5)
    assert torch.equal(fed.recent, stream.recent)
    a, b = (s.generate(50, generator=torch.Generator().manual_seed(5)) for s in (fed, stream))
    assert torch.equal(a, b)


def test_draws_have_the_probabilities():
    """A grid of uniforms meets every code as often as its probability says, on either side."""
    model = made(levels=7, blocks=1, depth=1)
    n = 5000
    uniforms = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    for temperature in (1.0, 0.3):
        stream = model.stream(n)
        codes, logits = ops.wavenet_generate(
            stream.weights, stream.past, stream.recent, uniforms, temperature=temperature, return_logits=True
        )
        expected = n * torch.softmax(logits[0, 0].double() / temperature, 0)
        assert (codes.flatten().bincount(minlength=7) - expected).abs().max() <= 1.01
        assert torch.equal(codes[:, 0], draw(logits[:, 0], uniforms[:, 0], temperature))
    assert torch.equal(model.stream(3).generate(1, temperature=0)[:, 0], logits[:3, 0].argmax(1))


def test_logits_that_are_not_finite():
    model = made()
    with torch.no_grad():
        model.output_bias[2] = math.nan
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises(ValueError, match="not finite"):
            model.sample(2, length=3)


# --- sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_shorter_than_the_receptive_field(steps):
    model = made(dtype=torch.float64)
    codes = codes_of(model, 2, 40)
    torch.testing.assert_close(model.logits(codes)[:, :steps], model.logits(codes[:, :steps]), rtol=1e-12, atol=1e-12)
    model(codes[:, :steps]).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_empty():
    model = made(**BOTH)
    context = context_of(model, 0, 20)
    value = model(codes_of(model, 0, 20), context)
    value.sum().backward()
    assert value.shape == (0,) and not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    assert model.sample(0, context).shape == (0, 20)
    model = made()
    assert model.sample(2, length=0).shape == (2, 0) and model.logits(codes_of(model, 2, 0)).shape == (2, 0, 12)
    assert model.stream(2).feed(codes_of(model, 2, 0)).shape == (2, 0, 12)


def test_long_sequences_in_pieces(monkeypatch):
    """Where no gradient needs the inputs of the layers, they are not all kept."""
    model = made(**BOTH)
    codes, context = codes_of(model, 2, 150), context_of(model, 2, 150)
    expected = model(codes, context).detach()
    monkeypatch.setattr(wavenet, "PIECE", 32)
    with torch.no_grad():
        torch.testing.assert_close(model(codes, context), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Rounded weights, but computed in float32: as the model of the rounded weights in float32."""
    model = made(dtype=dtype)
    codes = codes_of(model, 2, 50)
    wide = copy.deepcopy(model).float()
    a, b = (m.sample(2, generator=torch.Generator().manual_seed(0), length=50) for m in (model, wide))
    assert torch.equal(a, b)
    # the stack is the same; its inputs and the head are of the dtype
    torch.testing.assert_close(model(codes).float(), wide(codes), rtol=0, atol=50 * 2 * torch.finfo(dtype).eps * 8)


def test_autocast():
    model = made()
    codes = codes_of(model, 2, 50)
    with torch.autocast("cpu", torch.bfloat16):
        value = model(codes)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, model(codes), rtol=0.02, atol=0.0)


def test_compiles():
    model = made()
    codes = codes_of(model, 2, 40)
    compiled = torch.compile(lambda x: model(x), fullgraph=True, backend="aot_eager")
    for a, b in zip(
        *(torch.autograd.grad(f(codes).sum(), list(model.parameters())) for f in (compiled, model)), strict=True
    ):
        torch.testing.assert_close(a, b)


# --- codes and refusals -------------------------------------------------------------------------------


def test_mu_law():
    x = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    codes = mu_law_encode(x)
    assert codes.min() == 0 and codes.max() == 255 and (codes.diff() >= 0).all()

    def companded(v):
        return v.sign() * torch.log1p(255 * v.abs()) / math.log(256)

    # within half a step of the companded scale, [-1, 1] in 255 steps
    assert (companded(mu_law_decode(codes).double()) - companded(x)).abs().max() <= 1 / 255 + 1e-6
    every = torch.arange(256)
    assert torch.equal(mu_law_encode(mu_law_decode(every)), every)
    assert mu_law_encode(torch.empty(0)).shape == (0,) and mu_law_encode(x.bfloat16()).dtype == torch.int64


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.tensor([0.5, -1.001]), ValueError, r"x: expected audio in \[-1, 1\], got values from -1.001 to 0.5"),
        (torch.tensor([math.nan]), ValueError, "x: expected audio"),
        (torch.tensor([3, 200]), TypeError, "x: expected floating point audio in .* got torch.int64"),
    ],
)
def test_mu_law_refuses(x, error, words):
    with pytest.raises(error, match=words):
        mu_law_encode(x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m(torch.rand(2, 5)), TypeError, "codes: expected integers, got torch.float32"),
        (lambda m: m(torch.tensor([[0, 12]])), ValueError, "codes: expected 0 to 11, got 0 to 12"),
        (lambda m: m(torch.tensor([[-1, 3]])), ValueError, "codes: expected 0 to 11, got -1 to 3"),
        (lambda m: m(torch.tensor([1, 3])), ValueError, r"codes: expected \[B, T\]"),
        (lambda m: m(torch.tensor([[1, 3]]), torch.ones(1, 2)), ValueError, "context: expected none for this model"),
        (lambda m: m.stream(1).feed(torch.tensor([[12]])), ValueError, "codes: expected 0 to 11, got 12 to 12"),
        (lambda m: m.stream(1).feed(torch.rand(1, 3)), TypeError, "codes: expected integers, got torch.float32"),
        (lambda m: m.sample(1, temperature=-1.0, length=1), ValueError, "temperature: expected a finite number"),
        (lambda m: WaveNet(width=0), ValueError, "width: expected at least 1, got 0"),
    ],
)
def test_refuses(call, error, words):
    with pytest.raises(error, match=words):
        call(made())


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (None, "context: expected local and global for this model, got 0"),
        ((torch.zeros(2, 4, 9), torch.zeros(2, 4)), r"context: expected a local one \[2, 3, T\], got \[2, 4, 9\]"),
        ((torch.zeros(2, 3, 8), torch.zeros(2, 4)), "context: expected 9 steps like the codes, got 8"),
        ((torch.zeros(2, 3, 9), torch.zeros(1, 4)), r"context: expected a global one \[2, 4\], got \[1, 4\]"),
    ],
)
def test_refuses_contexts(context, words):
    model = made(**BOTH)
    with pytest.raises(ValueError, match=words):
        model(codes_of(model, 2, 9), context)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(2, 5)}, "x: expected at least 3 dimensions"),
        ({"weight": torch.zeros(2, 6, 5, 2)}, r"weight: expected \[L, 2D, 4, w\]"),
        ({"bias": torch.zeros(2, 5)}, r"bias: expected shape \[2, 6\]"),
        ({"skip_weight": torch.zeros(2, 7, 4)}, r"skip_weight: expected shape \[2, 7, 3\]"),
        ({"dilations": [1, 0]}, "dilations: expected 2 positive numbers"),
        ({"context": torch.zeros(2, 5, 3)}, "context: expected context and context_weight together"),
        ({"past": torch.zeros(2, 2, 4)}, r"past: expected shape \[2, 3, 4\]"),
        ({"residual_bias": torch.zeros(2, 4, dtype=torch.float64)}, "residual_bias: float64 goes with float64 only"),
    ],
)
def test_stack_refuses(changes, words):
    shapes = {"weight": (2, 6, 4, 2), "bias": (2, 6), "residual_weight": (2, 4, 3), "residual_bias": (2, 4)}
    shapes |= {"skip_weight": (2, 7, 3), "skip_bias": (2, 7)}
    given = {"x": torch.zeros(2, 5, 4), **{k: torch.zeros(s) for k, s in shapes.items()}, "dilations": [1, 2]}
    with pytest.raises((ValueError, TypeError), match=words):
        ops.wavenet_stack(**{**given, **changes})
