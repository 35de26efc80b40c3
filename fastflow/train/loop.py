"""The training loop: one process, or one of several under torchrun.

What happens in step k is a function of the settings and k alone: the order of the samples, the
noise on them and the seed of the model's own random numbers come from hashes (`noise.py`).
So a resumed run repeats the run that did not stop bit for bit, and two ranks see the global batch
that one process would see.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import noise
from .config import TrainConfig
from .data import Dataset
from .errors import SolverError, UserError
from .interrupt import stop_on_signal
from .metrics import append_metrics, in_words, truncate_metrics
from .parallel import rank, total, world, wrap
from .progress import Progress
from .state import State, average, copy_buffers, diverged, judge, restore, save, shuffled, start, training_batch

_SETTLE_EVERY = 10  # steps between the moments at which the host waits for the device


@dataclass(frozen=True)
class Result:
    """What `train` hands back: steps done, last held-out figure in the data's unit, whether it was interrupted, and
    the seconds it took, those before a resumption included."""

    step: int
    held_out: float | None
    interrupted: bool
    seconds: float = 0.0


def train(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
) -> Result:
    """Trains a model by maximum likelihood, on the device its parameters are on.

    Args:
        model: `forward(x)` gives log p(x), or a lower bound of it, [B] in nats; `initialize(x)` takes the first
            batch; `config` has the arguments it was constructed from. It may have a loss of its own,
            `loss(x, progress)` in nats, [B] or its mean, with `progress` in [0, 1) the part of the run that is over
            (for a warm-up); evaluations use `forward`, or `evaluate(x)` [B] where the data are forecast. `metrics(x)`,
            if it has them, are more figures by name, [B] each, such as squared errors: sums like the log-likelihood.
            `evaluations`, if it has it, is how often the last call evaluated its dynamics, and goes to the metrics.
        data: from `load_data`.
        config: the settings; a resumed run may change only how long it goes on.
        out: a folder that receives `metrics.jsonl` and `checkpoint/`.
        resume: go on from the checkpoint in `out`, bit-identical to not having stopped.
        progress: show a bar (with tqdm, on a terminal) and a line for every evaluation.

    Under an initialised process group every rank takes its share of each batch. Ctrl-C and SIGTERM
    finish the current step and write a checkpoint.

    Raises `NonFiniteLoss` naming step and learning rate when the loss, the norm of the gradient, a
    held-out figure or what would go into a checkpoint is not finite, or when a differential equation cannot
    be solved; `UserError` when settings, data, folder and checkpoint do not fit together.
    """
    out = Path(out)
    if config.batch_size % world():
        raise UserError(f"batch_size: expected a multiple of the {world()} ranks, got {config.batch_size}")
    if not resume and out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: expected an empty folder for a new run; --resume continues one")
    per_epoch, steps = config.steps_per_epoch(len(data.train)), config.total_steps(len(data.train))
    state = restore(model, data, config, out / "checkpoint") if resume else (start(model, data, config))
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        truncate_metrics(out / "metrics.jsonl", state.step)
    objective = wrap(_Objective(model))
    device = next(model.parameters()).device
    bar = Progress(steps, state.step, progress and rank() == 0, data.unit)
    pending: list[tuple[float, Tensor, Tensor]] = []  # of the steps since the last settling
    stopped, begun = False, time.monotonic() - state.seconds
    own_rng = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with stop_on_signal(insist=world() == 1) as stop, own_rng, bar:
        while state.step < steps and not stopped and not state.lapsed(config):
            x = _next_batch(data, config, state.step, per_epoch, device)
            torch.manual_seed(noise.key(config.seed, noise.STEP, state.step, rank()))
            lr = config.lr_at(state.step, steps, per_epoch)
            with _solved(state, state.step + 1, lr):
                pending.append((lr, *_update(objective, state, x, state.step / steps, data, config, lr)))
            state.step += 1
            evaluating = _due(state.step, config.eval_every or per_epoch, steps)
            saving = _due(state.step, config.checkpoint_every or per_epoch, steps)
            alone = world() == 1 and stop.is_set()  # several ranks first agree, in a settling
            if not (evaluating or saving or alone or state.step % _SETTLE_EVERY == 0):
                continue
            records, stopped = _settle(pending, state, per_epoch, stop.is_set())
            solves = {}
            if hasattr(model, "evaluations"):
                records[-1] |= (solves := {"evaluations": model.evaluations})
            bar.advance(len(pending), records[-1]["train"])
            pending.clear()
            if evaluating:
                with _solved(state):
                    more = _evaluate(state, data, config)
                records.append({"step": state.step, "epoch": records[-1]["epoch"], "held_out": state.held_out, **more})
                bar.say(
                    f"step {state.step:6d}   epoch {state.step / per_epoch:6.2f}   "
                    f"train {records[-2]['train']:.3f}{in_words(solves)}   "
                    f"held-out {state.held_out:.3f} {data.unit}{in_words(more)}"
                )
            if rank() == 0:
                append_metrics(out / "metrics.jsonl", records)
            if saving or stopped or state.lapsed(config):
                state.seconds = time.monotonic() - begun
                if rank() == 0:
                    save(state, data, config, out / "checkpoint")
                state.saved = state.step
        if state.lapsed(config):
            bar.say(f"no better than {state.best:.3f} {data.unit} in {state.stale} evaluations: ended")
        if stopped:
            bar.say(f"stopped after step {state.step}; --resume goes on from {out / 'checkpoint'}")
    return Result(state.step, state.held_out, stopped, state.seconds)


def evaluate(
    model: nn.Module,
    data: Dataset,
    *,
    batch_size: int = 256,
    seed: int = 0,
    part: Tensor | None = None,
    score: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Cost of `model` on `data.held_out`, or another `part` of the data, in the data's unit and in full precision.

    The same noise every time, so that two evaluations differ by the model alone. Under a process
    group every rank takes a share, and all return the result. `score` replaces the model's `forward`.
    """
    score = score or model
    return _means(model, data, lambda x: {"cost": data.cost(score(x).double())}, batch_size, seed, part)["cost"]


def own_metrics(
    model: nn.Module, data: Dataset, *, batch_size: int = 256, seed: int = 0, part: Tensor | None = None
) -> dict[str, float]:
    """Means of the model's `metrics(x)`, on the samples and over the same things as in `evaluate`; none for a model
    without."""
    if not hasattr(model, "metrics"):
        return {}
    return _means(model, data, lambda x: {n: v.double() for n, v in model.metrics(x).items()}, batch_size, seed, part)


def final_figure(model: nn.Module, data: Dataset, config: TrainConfig) -> float:
    """The cost on `data.test` (`held_out` where there is none), by the model's `evaluate(x)` [B] in nats if it has one,
    such as an importance-sampled likelihood where `forward` is a bound."""
    part = data.final[: config.final]
    return evaluate(model, data, batch_size=100, seed=config.seed, part=part, score=getattr(model, "evaluate", None))


@torch.no_grad()
def _means(
    model: nn.Module,
    data: Dataset,
    measure: Callable[[Tensor], dict[str, Tensor]],
    batch_size: int,
    seed: int,
    part: Tensor | None,
) -> dict[str, float]:
    """Means over `part` of what `measure` gives for its samples, [B] by name: over samples, or what is in them."""
    device, training = next(model.parameters()).device, model.training
    part = data.held_out if part is None else part
    model.eval()
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), dtype=torch.float64, device=device)
    key = noise.key(seed, noise.HELD_OUT)
    for number, index in enumerate(torch.arange(rank(), len(part), world()).split(batch_size)):
        x = data.inputs(part[index].to(device), index.to(device), key)
        with noise.own_generator(device, seed, noise.HELD_OUT, number, rank()):
            for name, value in measure(x).items():
                sums[name] = sums.get(name, 0) + value.sum()
        counts = data.counts(x)
        count += len(x) if counts is None else counts.sum()
    model.train(training)
    count = total(count).item()
    return {name: total(value).item() / count for name, value in sums.items()}


@contextmanager
def _solved(state: State, step: int | None = None, lr: float | None = None) -> Iterator[None]:
    """A differential equation that cannot be solved is how a continuous model diverges."""
    try:
        yield
    except SolverError as error:
        raise diverged(str(error), state, step, lr) from error


def _due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps


class _Objective(nn.Module):
    """What is maximised, as a module: DistributedDataParallel wraps a `forward`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, progress: float) -> Tensor:
        return -self.model.loss(x, progress) if hasattr(self.model, "loss") else self.model(x)


def _next_batch(data: Dataset, config: TrainConfig, step: int, per_epoch: int, device: torch.device) -> Tensor:
    """This rank's share of the batch that follows `step` finished steps."""
    epoch, position = divmod(step, per_epoch)
    share = config.batch_size // world()
    first = position * config.batch_size + rank() * share
    index = shuffled(config.seed, epoch, len(data.train))[first : first + share]
    return training_batch(data, index, config.seed, epoch, device)


def _update(
    objective: Callable[[Tensor, float], Tensor],
    state: State,
    x: Tensor,
    progress: float,
    data: Dataset,
    config: TrainConfig,
    lr: float,
) -> tuple[Tensor, Tensor]:
    """One optimiser step on `x`: (mean loss, norm of its gradient), both still on the device."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.bf16):
        log_prob = objective(x, progress)
    loss = data.cost(log_prob).mean() / data.usual
    state.optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip or math.inf)
    state.optimizer.step()
    average(state, config.ema)
    return loss.detach(), norm.detach()


def _settle(
    pending: list[tuple[float, Tensor, Tensor]], state: State, per_epoch: int, stop: bool
) -> tuple[list[dict[str, Any]], bool]:
    """Metrics of the pending steps, averaged over the ranks, and whether any rank asks to stop.

    The only place between evaluations where the host waits for the device or for other ranks.
    """
    figures = torch.stack([torch.stack(pair).double() for _, *pair in pending])
    asks = figures.new_tensor([[float(stop), 0.0]])
    *figures, asks = (total(torch.cat((figures, asks))) / world()).tolist()
    records = []
    first = state.step - len(pending)
    for step, (lr, *_), (loss, norm) in zip(count(first), pending, figures, strict=False):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise diverged(f"loss {loss} and gradient norm {norm}", state, step + 1, lr)
        records.append({"step": step + 1, "epoch": step // per_epoch, "train": loss, "grad_norm": norm, "lr": lr})
    return records, asks[0] > 0


def _evaluate(state: State, data: Dataset, config: TrainConfig) -> dict[str, float]:
    """Takes the held-out figure; the model's own `metrics`."""
    copy_buffers(state)
    score = getattr(state.ema, "evaluate", None) if data.forecasts else None
    state.held_out = evaluate(state.ema, data, seed=config.seed, score=score)
    more = own_metrics(state.ema, data, seed=config.seed)
    for name, value in {f"held-out {data.unit}": state.held_out, **more}.items():
        if not math.isfinite(value):
            raise diverged(f"{name} {value}", state)
    judge(state, config.patience)
    return more
