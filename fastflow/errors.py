"""What the commands answer with one line instead of a traceback."""

import importlib
from types import ModuleType


class UserError(ValueError):
    """A mistake of the caller, said in one line; the command line prints it and exits with 2."""


class MissingPackage(UserError, ImportError):
    """An optional package that this step needs is not installed."""


def need(module: str, package: str, extra: str = "train") -> ModuleType:
    """Imports an optional `module`; raises `MissingPackage` naming the `package` and the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(
            f"this needs {package}, which is not installed: pip install 'fastflow[{extra}]'"
        ) from error
