"""WaveNet: audio one sample at a time, each a softmax over mu-law codes of all samples before it.

van den Oord et al., 2016, https://arxiv.org/abs/1609.03499; the sizes are those of github.com/ibab/tensorflow-wavenet.
Generation keeps the layers' past inputs: Le Paine et al., 2016, https://arxiv.org/abs/1611.09482.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow.ops import wavenet_feed, wavenet_generate, wavenet_stack, wavenet_weights
from fastflow.ops._op import accumulator
from fastflow.ops.wavenet_generate import embed

__all__ = ["PRESETS", "Stream", "WaveNet", "mu_law_decode", "mu_law_encode"]

PRESETS: dict[str, dict[str, Any]] = {
    # github.com/ibab/tensorflow-wavenet: the defaults of its training script
    "ibab": {"residual": 32, "dilation": 32, "skip": 512, "width": 2, "blocks": 5, "depth": 10},
}

Context = Tensor | tuple[Tensor, Tensor]

# --- mu-law -----------------------------------------------------------------------------------------


def mu_law_encode(x: Tensor, levels: int = 256) -> Tensor:
    r"""The codes :math:`\lfloor (f + 1) / 2 \cdot \mu + 1/2 \rfloor` of audio in [-1, 1], where
    :math:`f = \mathrm{sign}(x) \ln(1 + \mu |x|) / \ln(1 + \mu)` and :math:`\mu` = levels - 1; int64.

    Raises:
        TypeError: integers, whose range nobody knows here.
        ValueError: values outside of [-1, 1], or NaN.

    >>> mu_law_encode(torch.tensor([-1.0, -0.01, 0.0, 0.01, 1.0])).tolist()
    [0, 98, 128, 157, 255]
    """
    if not x.is_floating_point():
        raise TypeError(f"x: expected floating point audio in [-1, 1], got {x.dtype}: divide 16-bit samples by 32768")
    if x.numel() and not bool((x.abs() <= 1).all()):  # NaN is not
        raise ValueError(f"x: expected audio in [-1, 1], got values from {x.min():g} to {x.max():g}")
    mu = levels - 1
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    f = x.sign() * torch.log1p(mu * x.abs()) / math.log1p(mu)
    return ((f + 1) / 2 * mu + 0.5).floor().long()


def mu_law_decode(codes: Tensor, levels: int = 256) -> Tensor:
    r"""Audio :math:`\mathrm{sign}(y) ((1 + \mu)^{|y|} - 1) / \mu` of codes, with y = 2 code / mu - 1; float32.

    Raises:
        TypeError, ValueError: codes that are not whole numbers from 0 to levels - 1.

    >>> codes = torch.arange(256)
    >>> bool((mu_law_encode(mu_law_decode(codes)) == codes).all())
    True
    """
    if codes.is_floating_point():
        raise TypeError(f"codes: expected whole numbers, got {codes.dtype}")
    if codes.numel() and not (0 <= codes.min() and codes.max() < levels):
        raise ValueError(f"codes: expected 0 to {levels - 1}, got {codes.min()} to {codes.max()}")
    mu = levels - 1
    y = 2 * codes.to(torch.float32) / mu - 1
    return y.sign() * torch.expm1(y.abs() * math.log1p(mu)) / mu


# --- the model --------------------------------------------------------------------------------------


class WaveNet(nn.Module):
    r"""log p(x) = sum over t of log p(x_t | x_0 ... x_{t-1}, context), a stack of dilated causal convolutions.

    The first code is predicted from nothing: no code adds to the layers' inputs before it, and the layers see zeros for
    what lies before the start, each in its own input. Bits per sample are -log_prob / (T ln 2).

    Args:
        levels: of the codes.
        residual, dilation, skip: channels of the stack, of its gates, and of what goes to the head.
        width: w, of all convolutions, the first included.
        blocks, depth: ``blocks`` times the dilations 1, 2, 4 ... 2^(depth - 1).
        local_features: channels of a local context [B, Cc, T], whose step t belongs to x_t.
        global_features: channels of a global context [B, Cg].
        global_classes: the global context is a label [B] below this, embedded in ``global_features`` channels, or as
            many as ``residual`` where these are not given.
        length: of a sample where nothing says how long it shall be: one second of the paper's audio.

    The context of a call is the local or the global one, or the pair (local, global) where the model has both.

    >>> model = WaveNet(levels=16, residual=8, dilation=8, skip=16, blocks=2, depth=3)
    >>> codes = torch.randint(16, (2, 50))
    >>> model(codes).shape, model.logits(codes).shape, model.receptive_field
    (torch.Size([2]), torch.Size([2, 50, 16]), 16)
    >>> stream = model.stream(2)
    >>> _ = stream.feed(codes)  # goes on from a given beginning
    >>> stream.generate(100, temperature=0.9).shape
    torch.Size([2, 100])
    """

    def __init__(
        self,
        levels: int = 256,
        residual: int = 32,
        dilation: int = 32,
        skip: int = 512,
        width: int = 2,
        blocks: int = 5,
        depth: int = 10,
        *,
        local_features: int = 0,
        global_features: int = 0,
        global_classes: int = 0,
        length: int = 16000,
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        for name in ("levels", "residual", "dilation", "skip", "width", "blocks", "depth"):
            if self.config[name] < 1:
                raise ValueError(f"{name}: expected at least 1, got {self.config[name]}")
        self.levels, self.dilations = levels, tuple(2**i for i in range(depth)) * blocks
        layers, both = len(self.dilations), 2 * dilation
        if global_classes and not global_features:
            global_features = residual

        def parameter(*shape: int, fan: int = 0) -> nn.Parameter:
            """Uniform with Glorot's variance 2 / (the inputs and outputs of a layer); zeros without them."""
            bound = math.sqrt(6 / fan) if fan else 0.0
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        self.embedding = parameter(width, levels, residual, fan=width * (levels + residual))
        self.weight = parameter(layers, both, residual, width, fan=width * (residual + dilation))
        self.bias = parameter(layers, both)
        self.residual_weight = parameter(layers, residual, dilation, fan=residual + dilation)
        self.residual_bias = parameter(layers, residual)
        self.skip_weight = parameter(layers, skip, dilation, fan=skip + dilation)
        self.skip_bias = parameter(layers, skip)
        self.hidden_weight, self.hidden_bias = parameter(skip, skip, fan=2 * skip), parameter(skip)
        self.output_weight, self.output_bias = parameter(levels, skip, fan=levels + skip), parameter(levels)
        self.local_weight = self.global_weight = self.classes = None
        if local_features:
            self.local_weight = parameter(layers, both, local_features, fan=local_features + dilation)
        if global_features:
            self.global_weight = parameter(layers, both, global_features, fan=global_features + dilation)
        if global_classes:
            self.classes = nn.Embedding(global_classes, global_features)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> WaveNet:
        """A published configuration by name (``PRESETS``), with changes."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def receptive_field(self) -> int:
        """R = (w - 1) sum of d + 1 + (w - 1): codes that a prediction depends on."""
        width = self.config["width"]
        return (width - 1) * sum(self.dilations) + 1 + (width - 1)

    # --- likelihood -----------------------------------------------------------------------------------

    def forward(self, codes: Tensor, context: Context | None = None) -> Tensor:
        """log p(codes) [B] in nats, of integers [B, T]."""
        logits = self.logits(codes, context)
        logits = logits.to(accumulator(logits.dtype))
        loss = F.cross_entropy(logits.flatten(0, 1), codes.long().flatten(), reduction="none")
        return -loss.view(codes.shape).sum(1)

    def log_prob(self, codes: Tensor, context: Context | None = None) -> Tensor:
        """log p(codes) [B] in nats."""
        return self(codes, context)

    def logits(self, codes: Tensor, context: Context | None = None) -> Tensor:
        """[B, T, levels]: for every code of [B, T] the prediction from those before it."""
        codes = self._codes(codes)
        local, bias = self._conditioning(codes.shape[0], context)
        if local is not None and local.shape[1] != codes.shape[1]:
            raise ValueError(f"context: expected {codes.shape[1]} steps like the codes, got {local.shape[1]}")
        width = self.config["width"]
        x = embed(F.pad(codes, (width, 0), value=-1)[:, : codes.shape[1] + width - 1], self.embedding)
        _, skip = wavenet_stack(
            x, self.weight, bias, *self._stack()[2:], self.dilations, context=local, context_weight=self.local_weight
        )
        a = F.relu(F.linear(F.relu(skip), self.hidden_weight, self.hidden_bias))
        return F.linear(a, self.output_weight, self.output_bias)

    def _stack(self) -> tuple[Tensor, ...]:
        return (
            self.weight, self.bias, self.residual_weight, self.residual_bias, self.skip_weight, self.skip_bias
        )  # fmt: skip

    def _codes(self, codes: Tensor) -> Tensor:
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise TypeError(f"codes: expected integers, got {codes.dtype}: mu_law_encode makes them of audio")
        if codes.dim() != 2:
            raise ValueError(f"codes: expected [B, T], got {list(codes.shape)}")
        if codes.is_cuda or torch.compiler.is_compiling():  # to look at their values would stop the device, the trace
            return codes.long()
        if codes.numel() and not (0 <= codes.min() and codes.max() < self.levels):
            raise ValueError(f"codes: expected 0 to {self.levels - 1}, got {codes.min()} to {codes.max()}")
        return codes.long()

    def _conditioning(self, n: int, context: Context | None) -> tuple[Tensor | None, Tensor]:
        """(local context [B, T, Cc], bias of the gates [L, 2D], with a global context [L, B, 2D])"""
        wanted = [name for name in ("local", "global") if getattr(self, f"{name}_weight") is not None]
        given = context if isinstance(context, (tuple, list)) else () if context is None else (context,)
        if len(given) != len(wanted):
            raise ValueError(f"context: expected {' and '.join(wanted) or 'none'} for this model, got {len(given)}")
        parts = dict(zip(wanted, given, strict=True))
        local, bias = parts.get("local"), self.bias
        if local is not None:
            if local.dim() != 3 or local.shape[:2] != (n, self.config["local_features"]):
                expected = f"[{n}, {self.config['local_features']}, T]"
                raise ValueError(f"context: expected a local one {expected}, got {list(local.shape)}")
            local = local.to(self.bias.dtype).transpose(1, 2)
        if "global" in parts:
            features = parts["global"]
            if self.classes is not None:
                if features.is_floating_point() or features.shape != (n,):
                    came = f"{list(features.shape)} of {features.dtype}"
                    raise ValueError(f"context: expected a global one of labels [{n}], got {came}")
                features = self.classes(features)
            if features.shape != (n, self.global_weight.shape[2]):
                expected = [n, self.global_weight.shape[2]]
                raise ValueError(f"context: expected a global one {expected}, got {list(features.shape)}")
            bias = bias[:, None] + features.to(bias.dtype) @ self.global_weight.transpose(1, 2)
        return local, bias

    # --- generation -----------------------------------------------------------------------------------

    def stream(self, n: int = 1, context: Tensor | None = None) -> Stream:
        """``n`` streams at their beginning, with the weights of now and the global context given here."""
        return Stream(self, n, context)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Context | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        length: int | None = None,
    ) -> Tensor:
        """n samples [n, length] of codes; as long as a local context where nothing is said. :class:`Stream` goes on."""
        local = None
        if self.local_weight is not None:
            local, context = context if isinstance(context, (tuple, list)) else (context, None)
            if local is None:
                raise ValueError("context: expected a local one for this model, got none")
            length = local.shape[2] if length is None else length
        length = self.config["length"] if length is None else length
        return self.stream(n, context).generate(length, local, temperature=temperature, generator=generator)

    def initialize(self, batch: Tensor, context: Context | None = None) -> None:
        """Nothing here initialises from data."""


class Stream:
    """Streams of codes that go on: what the layers need of the past, in ``past`` and ``recent``, and ``position``.

    It has a snapshot of the model's weights. ``state_dict`` and ``load_state_dict`` save and restore where it stands.
    """

    def __init__(self, model: WaveNet, n: int, context: Tensor | None = None) -> None:
        with torch.no_grad():
            if model.local_weight is not None:  # comes with every call
                nothing = model.bias.new_empty(n, model.config["local_features"], 0)
                context = nothing if model.global_weight is None else (nothing, context)
            _, bias = model._conditioning(n, context)
            weight, _, *rest = model._stack()
            head = (model.hidden_weight, model.hidden_bias, model.output_weight, model.output_bias)
            self.weights = wavenet_weights(
                model.embedding, (weight, bias, *rest), head, model.dilations, model.local_weight
            )
        embedding = self.weights.embedding
        self.past = embedding.new_zeros(n, self.weights.rows, embedding.shape[2])
        self.recent = torch.full((n, len(embedding)), -1, device=embedding.device)
        self.position = 0

    def feed(self, codes: Tensor, local: Tensor | None = None) -> Tensor:
        """Goes on with given codes [n, T], all at once; what each was predicted to be, the logits [n, T, levels]."""
        if codes.is_floating_point():
            raise TypeError(f"codes: expected integers, got {codes.dtype}: mu_law_encode makes them of audio")
        logits = wavenet_feed(
            self.weights, self.past, self.recent, codes.long(), position=self.position, context=_rows(local)
        )
        self.position += codes.shape[1]
        return logits

    def generate(
        self,
        steps: int,
        local: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        return_logits: bool = False,
    ) -> Any:
        """Draws the next codes [n, steps]; ``return_logits``: (codes, what they were drawn from).

        Two calls draw what one would have drawn. ``local`` is the local context [n, Cc, steps] of these steps.
        """
        uniforms = torch.rand(
            steps, len(self.past), generator=generator, dtype=torch.float64, device=self.past.device
        ).t()
        made = wavenet_generate(
            self.weights,
            self.past,
            self.recent,
            uniforms,
            position=self.position,
            temperature=temperature,
            context=_rows(local),
            return_logits=return_logits,
        )
        self.position += steps
        return made

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of where the streams stand."""
        return {"past": self.past.clone(), "recent": self.recent.clone(), "position": torch.tensor(self.position)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes back to where a stream of this model and size stood."""
        for name in ("past", "recent"):
            if state[name].shape != getattr(self, name).shape:
                expected, came = list(getattr(self, name).shape), list(state[name].shape)
                raise ValueError(f"{name}: expected {expected} like this stream's, got {came}")
            getattr(self, name).copy_(state[name])
        self.position = int(state["position"])


def _rows(local: Tensor | None) -> Tensor | None:
    return None if local is None else local.transpose(1, 2)
