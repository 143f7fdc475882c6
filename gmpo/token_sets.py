"""Sets of tokens, ragged: what each token of a completion was drawn from."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenSets:
    """Sets of tokens, ragged, in an array of any shape [...].

    A set is given by a list of its members, or of all others, whichever is shorter.  The lists lie in one tensor, which
    parts of the array share.
    """

    ids: Tensor  # [K] int32
    start: Tensor  # [...] int64, where in `ids` the list of a set begins
    size: Tensor  # [...] int64, its length
    inverse: Tensor  # [...] bool, true where the list holds the tokens that are not in the set

    @classmethod
    def of(cls, lists: "Sequence[TokenList | None]") -> "TokenSets | None":
        """[N] sets; None in the place of a list stands for all tokens.  None if all sets are that."""
        if all(each is None for each in lists):
            return None
        whole: TokenList = (torch.zeros(0, dtype=torch.int32), True)
        ids, inverse = zip(*(whole if each is None else each for each in lists), strict=True)
        size = torch.tensor([len(each) for each in ids], dtype=torch.int64)
        return cls(
            torch.cat(ids), size.cumsum(0) - size, size, torch.tensor(inverse, dtype=torch.bool)
        )

    @classmethod
    def padded(
        cls, rows: "Sequence[TokenSets | None]", lengths: Sequence[int], width: int
    ) -> "TokenSets | None":
        """[B, T] sets out of rows of [lengths[i]] each, None for a row of all tokens.  All tokens on the padding."""
        if all(row is None for row in rows):
            return None
        start, size = torch.zeros(2, len(rows), width, dtype=torch.int64)
        inverse = torch.ones(len(rows), width, dtype=torch.bool)
        ids, before = [], 0
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if row is not None:
                start[i, :length], size[i, :length], inverse[i, :length] = (
                    row.start + before,
                    row.size,
                    row.inverse,
                )
                ids.append(row.ids)
                before += len(row.ids)
        return cls(torch.cat(ids), start, size, inverse)

    def __getitem__(self, key: Any) -> "TokenSets":
        """A part of the array."""
        return TokenSets(self.ids, self.start[key], self.size[key], self.inverse[key])

    def to(self, device: torch.device | str) -> "TokenSets":
        return TokenSets(
            *(getattr(self, field.name).to(device) for field in dataclasses.fields(self))
        )

    def members(self, vocabulary: int) -> Tensor:
        """[N, V] bool, of an array of shape [N]."""
        answer = self.inverse[:, None].repeat(1, vocabulary)
        row = torch.arange(len(self.size), device=self.size.device).repeat_interleave(self.size)
        tokens = self.ids[ranges(self.start, self.size)]
        answer.view(-1)[row * vocabulary + tokens] = ~self.inverse[row]
        return answer


TokenList = tuple[Tensor, bool]  # [n] int32 and whether the set holds the other tokens instead


def ranges(start: Tensor, length: Tensor) -> Tensor:
    """start[0], ..., start[0] + length[0] - 1, start[1], ..., one after another."""
    before = length.cumsum(0) - length
    steps = torch.arange(int(length.sum()), device=start.device)
    return (start - before).repeat_interleave(length) + steps
