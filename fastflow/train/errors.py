"""The errors that the training commands answer with one line instead of a traceback."""

import importlib
from types import ModuleType


class UserError(ValueError):
    """A mistake of the caller, said in one line; the command line prints it and exits with 2."""


class MissingPackage(UserError, ImportError):
    """An optional package that this step needs is not installed."""


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient became infinite or NaN; the last checkpoint is intact."""


def need(module: str, package: str) -> ModuleType:
    """Imports an optional `module`; raises `MissingPackage` naming the `package` and the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(f"this needs {package}, which is not installed: pip install 'fastflow[train]'") from error
