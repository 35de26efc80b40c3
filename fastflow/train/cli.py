"""`fastflow train` and `fastflow sample`: arguments, and what they run."""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastflow.errors import SolverError

from .checkpoint import has_checkpoint, load_checkpoint
from .config import TrainConfig
from .data import BUNDLED, NAMES, Dataset, load_data
from .errors import MissingPackage, NonFiniteLoss, UserError
from .figures import draw_curve
from .loop import Result, final_figure, own_metrics, train
from .metrics import in_words
from .over_time import draw_over_time
from .parallel import choose_device, process_group, rank
from .recipe import Recipe, build_model, find_recipe, load_model, model_config
from .recipes import RECIPES
from .record import write_result
from .sampling import default_name, write_samples

_TEMPERATURES = (0.5, 0.7, 0.9, 1.0)
_SETTINGS = ("epochs", "steps", "batch_size", "lr", "seed", "bf16", "eval_every", "checkpoint_every")

INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastflow train`; those left out are the recipe's."""
    parser.add_argument("model", metavar="MODEL", help=f"what to train: {', '.join(RECIPES)}")
    parser.add_argument(
        "--data",
        metavar="NAME",
        required=True,
        help=f"data set: {', '.join(NAMES)} ({', '.join(BUNDLED)} need no files)",
    )
    parser.add_argument("--root", metavar="PATH", type=Path, help="the folder or file of the data set")
    parser.add_argument(
        "--published", action="store_true", default=False, help="the recipe of the paper, instead of the short one"
    )
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an argument of the model other than the recipe's; VALUE is JSON or a word; may be repeated",
    )
    parser.add_argument(
        "--load",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an option of the data other than the recipe's, such as form=static, valid=5000, drop=[-1]",
    )
    parser.add_argument("--size", type=int, metavar="N", help="centre-crop images and resize them to N x N")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder for checkpoint, metrics and figures"
    )
    parser.add_argument(
        "--resume", action="store_true", default=False, help="go on from the checkpoint in --out, as if never stopped"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the training samples")
    parser.add_argument("--steps", type=int, metavar="N", help="optimiser steps, instead of epochs")
    parser.add_argument("--batch-size", type=int, metavar="N", help="samples in a step, over all ranks together")
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
        metavar="FILE",
        type=Path,
        help="file to write: .png for images and points, .csv or .npz for rows, .wav for audio, "
        ".png for forecasts of held-out series and .csv for new ones (default: samples.*, forecast.png)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        metavar="T",
        default=list(_TEMPERATURES),
        help="factor on the standard deviation of the noise, so many samples for each (default: 0.5 0.7 0.9 1)",
    )
    parser.add_argument(
        "--n", type=int, metavar="N", help="samples (default: 12 images, 2000 points, 1000 rows, 4 clips, 4 series)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the noise, the same at every temperature (default: %(default)s)",
    )
    parser.add_argument(
        "--over-time",
        metavar="FILE",
        type=Path,
        help="instead: how the flow takes its base to the data, for points in the plane; .png (a strip) or .gif",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if any)")


def run_train(args: argparse.Namespace) -> int:
    """Trains, then draws samples and the curve; 0, 1 when the loss diverged, 130 when interrupted.

    Raises `UserError` for a mistake in the arguments, the files they name or the folder `out`.
    """
    with _one_line():
        device = choose_device(args.device)
        recipe = find_recipe(args.model, args.data, args.published)
        recipe = replace(recipe, data={**recipe.data, **_pairs("--load", args.load)})
        data = load_data(args.data, args.root, size=args.size, **recipe.data)
        model, config = _prepare(args, recipe, data, device)
    with process_group(device):
        first = rank() == 0
        try:
            result = train(model, data, config, args.out, resume=args.resume)
        except (NonFiniteLoss, SolverError) as error:
            if first:
                print(f"fastflow: {error}", file=sys.stderr)
            return 1
    if result.interrupted:
        return INTERRUPTED
    if first:
        _summarise(args, recipe, data, config, result, device)
    return 0


def run_sample(args: argparse.Namespace) -> int:
    """Writes samples from a checkpoint, in the form of the data it was trained on; 0.

    Raises `UserError` for a mistake in the arguments or a checkpoint that cannot be used.
    """
    if (args.n is not None and args.n < 1) or any(not t >= 0 for t in args.temperature):
        raise UserError(
            f"expected --n of at least 1 and temperatures of at least 0, got {args.n} and {args.temperature}"
        )
    with _one_line():
        model, meta = load_model(args.checkpoint, choose_device(args.device))
        if args.over_time is not None:
            pictures = draw_over_time(model, args.over_time, args.n or 2000, args.temperature[-1], args.seed)
            print(f"wrote {args.over_time}: the flow from its base to the data in {pictures} pictures")
            return 0
        out = args.out or Path(default_name(meta["data"]))
        n = write_samples(model, meta["data"], out, args.temperature, args.n, args.seed)
    if meta["data"].get("kind") == "series" and out.suffix == ".png":
        print(f"wrote {out}: forecasts of {n} held-out series")
    else:
        print(f"wrote {out}: {n} samples at temperature {', '.join(f'{t:g}' for t in args.temperature)}")
    return 0


def _prepare(
    args: argparse.Namespace, recipe: Recipe, data: Dataset, device: torch.device
) -> tuple[nn.Module, TrainConfig]:
    """The model and the settings: from the recipe, or from the checkpoint to resume."""
    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    changes = _pairs("--set", args.set)
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
        for key, value in changes.items():
            if arguments.get(key) != value:
                raise UserError(f"--set {key}: {value!r}, but the run to resume has {arguments.get(key)!r}")
    else:
        name, arguments = recipe.model, model_config(recipe, data, changes)
        base = recipe.train
    if "epochs" in given:
        base = replace(base, steps=None)
    config = replace(base, **given)
    torch.manual_seed(config.seed)
    try:
        return build_model(name, arguments).to(device), config
    except TypeError as error:
        if not changes:
            raise
        raise UserError(f"--set: {name} cannot be made of {changes} ({error})") from error


def _pairs(option: str, given: list[str]) -> dict[str, Any]:
    """What an option NAME=VALUE was given, VALUE as JSON if it is."""
    pairs = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{option} {text}: expected NAME=VALUE")
        try:
            pairs[name] = json.loads(value)
        except ValueError:
            pairs[name] = value
    return pairs


def _summarise(
    args: argparse.Namespace, recipe: Recipe, data: Dataset, config: TrainConfig, result: Result, device: torch.device
) -> None:
    """What the run reached: printed, recorded, drawn."""
    out = args.out
    model, meta = load_model(out, device)
    naive = data.baseline()
    figure = final_figure(model, data, config)
    more = own_metrics(model, data, seed=config.seed, part=data.final[: config.final])
    part = "held-out" if data.test is None else "test"
    count = min(len(data.final), config.final or len(data.final))
    print(
        f"step {result.step}: {figure:.4f} {data.unit}{in_words(more)} on {count} {part} samples "
        f"({naive[1]}: {naive[0]:.4f})"
    )
    write_result(
        out,
        command=_command(args, recipe, data, model, config),
        root=args.root and args.root.name,
        model=model,
        data=meta["data"],
        config=config,
        result=result,
        figure=(figure, f"{count} {part}"),
        metrics=more,
        unit=data.unit,
        naive=naive,
        published=recipe.published(model.config) if callable(recipe.published) else recipe.published,
    )
    try:
        draw_curve(out / "metrics.jsonl", out / "curve.png", naive, data.unit)
        samples = out / default_name(meta["data"])
        write_samples(model, meta["data"], samples, _TEMPERATURES)
    except (MissingPackage, UserError) as error:  # the run itself has succeeded
        print(f"fastflow: figures left out: {error}", file=sys.stderr)
    else:
        print(f"wrote {out}: checkpoint/, metrics.jsonl, result.json, curve.png, {samples.name}")


def _command(args: argparse.Namespace, recipe: Recipe, data: Dataset, model: nn.Module, config: TrainConfig) -> str:
    """The command that repeats this run, however it came about; of paths only the last part."""
    words = ["fastflow", "train", args.model, "--data", args.data]
    if args.root is not None:
        words += ["--root", args.root.name]
    if args.size is not None:
        words += ["--size", str(args.size)]
    words += ["--published"] * args.published
    for text in args.load:
        words += ["--load", text]
    usual = build_model(recipe.model, model_config(recipe, data)).config
    for name, value in model.config.items():
        if value != usual[name]:
            words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    for name in _SETTINGS:
        value = getattr(config, name)
        if name == "epochs":
            usual = config.steps or not recipe.train.steps and value == recipe.train.epochs
        else:
            usual = value is None or value == getattr(recipe.train, name)
        if usual:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if not isinstance(value, bool):
            words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return shlex.join(words)


@contextmanager
def _one_line() -> Iterator[None]:
    """What is wrong with the user's files and arguments, as a `UserError` in one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, SolverError) as error:
        raise UserError(" ".join(str(error).split())) from error
