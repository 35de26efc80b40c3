"""`fastflow train` and `fastflow sample`: arguments, and what they run."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .checkpoint import has_checkpoint, load_checkpoint
from .config import TrainConfig
from .data import NAMES, Images, load_data
from .errors import MissingPackage, NonFiniteLoss, UserError
from .figures import draw_curve, draw_samples
from .loop import Result, train
from .parallel import choose_device, process_group, rank
from .pixels import histogram_bits, quantize
from .recipes import RECIPES, build_model, find_recipe, load_model, model_config

_TEMPERATURES = (0.5, 0.7, 0.9, 1.0)
_SETTINGS = ("epochs", "steps", "batch_size", "lr", "seed", "bf16", "eval_every", "checkpoint_every")

INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastflow train`; those left out are the recipe's."""
    parser.add_argument("model", metavar="MODEL", help=f"what to train: {', '.join(RECIPES)}")
    parser.add_argument(
        "--data", metavar="NAME", required=True, help=f"data set: {', '.join(NAMES)} (digits needs no files)"
    )
    parser.add_argument("--root", metavar="PATH", type=Path, help="folder of the IDX files or images, or the .npz file")
    parser.add_argument("--size", type=int, metavar="N", help="centre-crop images and resize them to N x N")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder for checkpoint, metrics and figures"
    )
    parser.add_argument(
        "--resume", action="store_true", default=False, help="go on from the checkpoint in --out, as if never stopped"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the training images")
    parser.add_argument("--steps", type=int, metavar="N", help="optimiser steps, instead of epochs")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images in a step, over all ranks together")
    parser.add_argument("--lr", type=float, metavar="X", help="learning rate after warm-up")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of weights, order and noise")
    parser.add_argument("--bf16", action="store_true", default=None, help="train under bfloat16 autocast")
    parser.add_argument("--eval-every", type=int, metavar="STEPS", help="steps between evaluations (default: an epoch)")
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help="steps between checkpoints (default: the recipe's, or an epoch)",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if any)")


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastflow sample`."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="the --out folder of a training run, or its checkpoint folder",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.png",
        type=Path,
        default=Path("samples.png"),
        help="picture to write (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        metavar="T",
        default=list(_TEMPERATURES),
        help="factor on the standard deviation of the noise, one row of samples for each (default: 0.5 0.7 0.9 1)",
    )
    parser.add_argument("--n", type=int, default=12, metavar="N", help="samples in a row (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the noise, the same in every row (default: %(default)s)",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if any)")


def run_train(args: argparse.Namespace) -> int:
    """Trains, then draws samples and the curve; 0, 1 when the loss diverged, 130 when interrupted.

    Raises `UserError` for a mistake in the arguments, the files they name or the folder `out`.
    """
    with _one_line():
        device = choose_device(args.device)
        data = load_data(args.data, args.root, size=args.size)
        model, config = _prepare(args, data, device)
    with process_group(device):
        first = rank() == 0
        try:
            result = train(model, data, config, args.out, resume=args.resume)
        except NonFiniteLoss as error:
            if first:
                print(f"fastflow: {error}", file=sys.stderr)
            return 1
    if result.interrupted:
        return INTERRUPTED
    if first:
        _summarise(args.out, data, result)
    return 0


def run_sample(args: argparse.Namespace) -> int:
    """Writes a picture of samples from a checkpoint; 0.

    Raises `UserError` for a mistake in the arguments or a checkpoint that cannot be used.
    """
    if args.n < 1 or any(not t >= 0 for t in args.temperature):
        raise UserError(
            f"expected --n of at least 1 and temperatures of at least 0, got {args.n} and {args.temperature}"
        )
    with _one_line():
        model, meta = load_model(args.checkpoint, choose_device(args.device))
        _draw(model, meta["data"]["levels"], args.temperature, args.n, args.seed, args.out)
    print(f"wrote {args.out}: {args.n} samples at temperature {', '.join(f'{t:g}' for t in args.temperature)}")
    return 0


def _prepare(args: argparse.Namespace, data: Images, device: torch.device) -> tuple[nn.Module, TrainConfig]:
    """The model and the settings: from the recipe, or from the checkpoint to resume."""
    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    recipe = find_recipe(args.model, args.data)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: expected a folder, found a file")
    if args.resume:
        if not has_checkpoint(args.out / "checkpoint"):
            raise UserError(f"--resume: {args.out} holds no checkpoint to go on from")
        meta, _ = load_checkpoint(args.out / "checkpoint")
        name, arguments = meta["model"]["name"], meta["model"]["config"]
        if name != recipe.model:
            raise UserError(f"--resume: {args.out} holds a {name}, not a {recipe.model}")
        base = TrainConfig(**meta["config"])
        if "epochs" in given:
            base = replace(base, steps=None)
    else:
        name, arguments = recipe.model, model_config(recipe, data.shape)
        base = recipe.train
    config = replace(base, **given)
    torch.manual_seed(config.seed)
    return build_model(name, arguments).to(device), config


def _summarise(out: Path, data: Images, result: Result) -> None:
    baseline = histogram_bits(data.train, data.held_out, data.levels)
    print(f"step {result.step}: {result.held_out:.4f} bits/dim held out (per-pixel histogram: {baseline:.4f})")
    try:
        draw_curve(out / "metrics.jsonl", out / "curve.png", baseline)
        model, _ = load_model(out)
        _draw(model, data.levels, _TEMPERATURES, 12, 0, out / "samples.png")
    except (MissingPackage, ValueError) as error:  # the run itself is safe in its checkpoint
        print(f"fastflow: figures left out: {error}", file=sys.stderr)
    else:
        print(f"wrote {out}: checkpoint/, metrics.jsonl, curve.png, samples.png")


def _draw(model: nn.Module, levels: int, temperatures: list[float], n: int, seed: int, path: Path) -> None:
    """The same noise at every temperature, so that a column shows one sample cooling down."""
    device, rows = next(model.parameters()).device, []
    for temperature in temperatures:
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            x = model.sample(n, temperature=temperature, generator=generator)
        rows.append(quantize(x, levels).cpu())
    draw_samples(rows, temperatures, levels, path)


@contextmanager
def _one_line() -> Iterator[None]:
    """What is wrong with the user's files and arguments, as a `UserError` in one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
