"""What goes wrong between a trainer and vLLM, and how all ranks come to hear of it."""

from collections.abc import Callable
from typing import Any

from gmpo.distributed import any_rank


class VllmFault(RuntimeError):
    """vLLM did not do what was asked of it.

    Args:
        message: What was asked, what happened, what to do.
        lost: Whether the engine may be gone, or have forgotten the weights, so that a new publication may help.
    """

    tells_what_to_do = True  # the command line shows it without a traceback

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


class FirstFailure:
    """Runs steps until one fails, and none after it."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def run(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """What the step returns; None if it failed, or one before it did."""
        if self.error is None:
            try:
                return step(*arguments)
            except Exception as error:
                self.error = error
        return None

    def note(self, error: Exception) -> None:
        """Count a failure that happened elsewhere."""
        if self.error is None:
            self.error = error


def raise_together(error: Exception | None, what: str) -> None:
    """Raise on every rank if `error` is not None on any.  Every rank must call.

    Raises:
        Exception: `error`, or a VllmFault that points to another rank's.  It is `lost` on all ranks or on none.
    """
    lost = isinstance(error, VllmFault) and error.lost
    if not any_rank(error is not None):
        return
    all_lost = not any_rank(error is not None and not lost)
    if error is None:
        error = VllmFault(f"Another rank failed to {what}; its own error tells why.")
    error.lost = all_lost  # pyright: ignore[reportAttributeAccessIssue]
    error.raised_on_every_rank = True  # pyright: ignore[reportAttributeAccessIssue]
    raise error
