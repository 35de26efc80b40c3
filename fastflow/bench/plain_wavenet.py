"""WaveNet in plain PyTorch, the way one writes it: convolutions channels first, and generation from cached inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.models import WaveNet

__all__ = ["Generator", "log_prob"]


def log_prob(model: WaveNet, codes: Tensor) -> Tensor:
    """log p(codes) [B] of an unconditional model."""
    width = model.config["width"]
    h, total = 0, 0
    for i, table in enumerate(model.embedding):
        h = h + F.pad(F.embedding(codes, table), (0, 0, width - i, 0))[:, : codes.shape[1]]
    h = h.transpose(1, 2)
    for i, d in enumerate(model.dilations):
        a = F.conv1d(F.pad(h, ((width - 1) * d, 0)), model.weight[i], model.bias[i], dilation=d)
        f, g = a.chunk(2, 1)
        z = torch.tanh(f) * torch.sigmoid(g)
        total = total + F.conv1d(z, model.skip_weight[i].unsqueeze(2), model.skip_bias[i])
        h = h + F.conv1d(z, model.residual_weight[i].unsqueeze(2), model.residual_bias[i])
    a = F.relu(F.conv1d(F.relu(total), model.hidden_weight.unsqueeze(2), model.hidden_bias))
    logits = F.conv1d(a, model.output_weight.unsqueeze(2), model.output_bias)
    return -F.cross_entropy(logits, codes, reduction="none").sum(1)


class Generator:
    """Fast WaveNet: a ring of past inputs for every layer, one product for its taps and one for what leaves it."""

    def __init__(self, model: WaveNet, n: int) -> None:
        self.model, self.n = model, n
        with torch.no_grad():
            self.taps = [w.permute(0, 2, 1).flatten(1).t().contiguous() for w in model.weight]  # [w R, 2D]
            leaving = zip(model.residual_weight, model.skip_weight, strict=True)
            self.leaving = [torch.cat(both).t().contiguous() for both in leaving]  # [D, R + S]
            biases = zip(model.residual_bias, model.skip_bias, strict=True)
            self.biases = [torch.cat(both) for both in biases]
            self.bias = list(model.bias)
            self.head = model.hidden_weight.t().contiguous(), model.output_weight.t().contiguous()

    @torch.no_grad()
    def __call__(self, uniforms: Tensor) -> Tensor:
        """Codes [n, steps] from the beginning, for uniforms of the same shape."""
        m, n = self.model, self.n
        residual, skip, gated, width = (m.config[k] for k in ("residual", "skip", "dilation", "width"))
        rings = [m.bias.new_zeros((width - 1) * d, n, residual) for d in m.dilations]
        before = [m.bias.new_zeros(n, residual)] * width  # what the last codes add to the first layer's input
        codes = []
        for t, u in enumerate(uniforms.unbind(1)):
            h, total = sum(before[1:], before[0]), m.bias.new_zeros(n, skip)
            for i, d in enumerate(m.dilations):
                ring, rows = rings[i], (width - 1) * d
                past = [ring[(t + k * d) % rows] for k in range(width - 1)]
                a = torch.addmm(self.bias[i], torch.cat([*past, h], 1), self.taps[i])
                ring[t % rows] = h
                z = torch.tanh(a[:, :gated]) * torch.sigmoid(a[:, gated:])
                out = torch.addmm(self.biases[i], z, self.leaving[i])
                h, total = h + out[:, :residual], total.add_(out[:, residual:])
            a = F.relu(torch.addmm(m.hidden_bias, F.relu(total), self.head[0]))
            sums = torch.softmax(torch.addmm(m.output_bias, a, self.head[1]), 1).double().cumsum(1)
            code = torch.searchsorted(sums, (u * sums[:, -1])[:, None], right=True)[:, 0].clamp_(max=m.levels - 1)
            codes.append(code)
            before = [m.embedding[k, codes[t - width + 1 + k]] if t - width + 1 + k >= 0 else before[0] * 0
                      for k in range(width)]  # fmt: skip
        return torch.stack(codes, 1)
