"""What goes wrong between a trainer and vLLM, and how all ranks come to hear of it."""


class VllmError(RuntimeError):
    """vLLM did not do what was asked of it.

    Args:
        message: What was asked, what happened, what to do.
        lost: Whether the engine may be gone, or have forgotten the weights, so that a new publication may help.
    """

    tells_what_to_do = True  # the command line shows it without a traceback

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost
