"""The count of the states that the policy's weights have been in."""


class PolicyVersion:
    """Counts the states that the policy's weights have been in.

    The trainer calls `moved` after every optimizer step and every load of weights, and gives
    `current` to `Engine.publish` and to the rollouts.  An engine that shares the trainer's module
    has the new weights already.  One that holds a copy fetches them when it is given another number
    than it has seen.
    """

    def __init__(self, current: int = 0) -> None:
        self.current = current

    def moved(self) -> None:
        self.current += 1

    def state_dict(self) -> dict[str, int]:
        """Return the count."""
        return {"current": self.current}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a count, but never to a number that an engine has seen for other weights."""
        self.current = max(self.current + 1, state["current"])
