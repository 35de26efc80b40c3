"""The errors of a training run; those of every command are in `fastflow.errors`."""

from fastflow.errors import MissingPackage, SolverError, UserError, need

__all__ = ["MissingPackage", "NonFiniteLoss", "SolverError", "UserError", "need"]


class NonFiniteLoss(RuntimeError):
    """The loss, its gradient or a weight became infinite or NaN; the last checkpoint is intact."""
