"""The command line: ``fastflow`` or ``python -m fastflow``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import fastflow

INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


class Command(NamedTuple):
    """Where a command lives; its module is imported when it is chosen."""

    module: str
    add_arguments: str
    run: str
    help: str


COMMANDS = {
    "info": Command("fastflow.info", "add_arguments", "run", "what is installed and which backends can run here"),
    "verify": Command("fastflow.testing.cli", "add_arguments", "run", "check every kernel on this machine"),
    "bench": Command("fastflow.bench.cli", "add_arguments", "run", "measure every kernel on this machine"),
    "train": Command("fastflow.train.cli", "add_train_arguments", "run_train", "train a model"),
    "sample": Command("fastflow.train.cli", "add_sample_arguments", "run_sample", "draw samples from a trained model"),
}


class Parser(argparse.ArgumentParser):
    """Answers a mistake in one line, and points to the help."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help)\n")


def parser(chosen: str | None) -> Parser:
    """The parser, with the arguments of the command ``chosen``."""
    top = Parser("fastflow", description="Normalizing flows on fused kernels for PyTorch.")
    top.add_argument("--version", action="version", version=f"fastflow {fastflow.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.help, description=f"{command.help.capitalize()}.")
        if name == chosen:
            module = importlib.import_module(command.module)
            getattr(module, command.add_arguments)(one)
            one.set_defaults(run=getattr(module, command.run))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 well, 1 a check or a run failed, 2 a mistake of the user, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    arguments = parser(chosen).parse_args(argv)
    from fastflow.errors import UserError

    try:
        return arguments.run(arguments)
    except (UserError, fastflow.BackendError) as error:
        print(f"fastflow {chosen}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
