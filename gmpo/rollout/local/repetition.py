"""The repetition penalty: scores of tokens that a row holds already are made smaller."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gmpo.rollout.local.sequence import GrowingSequence


class SeenTokens:
    """The tokens that each row holds, prompt and completion, kept from step to step.

    A step adds a token to each row, which is one scatter; only rows that were not there in the step
    before are read whole.
    """

    def __init__(self) -> None:
        self.rows: list[GrowingSequence] = []  # of the step before; held, so that ids stay theirs
        self.lengths: list[int] = []
        self.seen: Tensor | None = None  # [rows, V] bool

    def of(self, rows: Sequence[GrowingSequence], like: Tensor) -> Tensor:
        """Return [R, V] bool, true for tokens that a row holds.

        Args:
            like: [R, V], of whose shape and device the answer is.
        """
        known = {id(row): place for place, row in enumerate(self.rows)}
        places = [known.get(id(row)) for row in rows]
        seen = self._carried(places, like)

        numbers: list[int] = []
        tokens: list[int] = []
        for number, (row, place) in enumerate(zip(rows, places, strict=True)):
            added = row.tokens_from(0 if place is None else self.lengths[place])
            tokens += added
            numbers += [number] * len(added)
        index = torch.tensor([numbers, tokens], dtype=torch.int64, device=like.device)
        seen[index[0], index[1]] = True

        self.rows, self.seen = list(rows), seen
        self.lengths = [row.length for row in rows]
        return seen

    def _carried(self, places: Sequence[int | None], like: Tensor) -> Tensor:
        """Return what rows held in the step before, by their places there; None for new rows."""
        if self.seen is not None and list(places) == list(range(len(self.rows))):
            return self.seen

        seen = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
        stayed = [(number, place) for number, place in enumerate(places) if place is not None]
        if stayed and self.seen is not None:
            now, before = torch.tensor(stayed, device=like.device).T
            seen[now] = self.seen[before]
        return seen


def penalised(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return scores where those of seen tokens are divided by the penalty, or multiplied below 0.

    Source: arXiv:1909.05858, section 4.1, as transformers and vLLM read it.

    Example:
        scores [2, -2, 3], seen [1, 1, 0], penalty 2 -> [1, -4, 3]
    """
    rows, tokens = seen.nonzero(as_tuple=True)
    chosen = scores[rows, tokens]
    answer = scores.clone()
    answer[rows, tokens] = torch.where(chosen < 0, chosen * penalty, chosen / penalty)
    return answer
