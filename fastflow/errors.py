"""What the commands answer with one line instead of a traceback."""

import importlib
from types import ModuleType


class UserError(ValueError):
    """A mistake of the caller, said in one line; the command line prints it and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class MissingPackage(UserError, ImportError):
    """An optional package that this step needs is not installed."""


class SolverError(RuntimeError):
    """A differential equation that could not be integrated: where, at which step and for which sample."""


def need(module: str, package: str) -> ModuleType:
    """Imports an optional `module` of the extra `train`; raises `MissingPackage` naming the `package`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(f"this needs {package}, which is not installed: pip install 'fastflow[train]'") from error
