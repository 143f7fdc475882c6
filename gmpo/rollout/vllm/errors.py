"""The error of everything that vLLM did not do."""


class VllmError(RuntimeError):
    """vLLM did not do what was asked of it.

    Args:
        message: What was asked, what happened, what to do.
        lost: The engine may be gone, or have forgotten the weights: a new publication may help.
    """

    tells_what_to_do = True  # the command line shows it without a traceback

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost
