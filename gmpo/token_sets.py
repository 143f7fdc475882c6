"""Sets of tokens, ragged: the tokens that each token of a completion was drawn from."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Index = int | slice | Tensor | tuple[int | slice | Tensor, ...]


@dataclass(frozen=True, slots=True)
class TokenSets:
    """Sets of tokens, ragged, in an array of any shape [...].

    A set is given by a list of its members, or of all other tokens, whichever is shorter.  The
    lists lie in one tensor, which parts of the array share.

    Example:
        {4, 7}, all tokens, all but 2, in an array of shape [3]
        ids [4, 7, 2], start [0, 2, 2], size [2, 0, 1], inverse [false, true, true]
    """

    ids: Tensor  # [K] int32
    start: Tensor  # [...] int64, where in `ids` the list of a set begins
    size: Tensor  # [...] int64, its length
    inverse: Tensor  # [...] bool, true where the list holds the tokens that are not in the set

    @classmethod
    def of(cls, lists: "Sequence[TokenList | None]") -> "TokenSets | None":
        """Return [N] sets; None if all of them hold all tokens.

        Args:
            lists: One per set; None for all tokens.
        """
        if all(each is None for each in lists):
            return None

        whole: TokenList = (torch.zeros(0, dtype=torch.int32), True)
        given = [whole if each is None else each for each in lists]
        ids = [tokens for tokens, _ in given]
        size = torch.tensor([len(tokens) for tokens in ids], dtype=torch.int64)
        return cls(
            ids=torch.cat(ids),
            start=size.cumsum(0) - size,
            size=size,
            inverse=torch.tensor([inverse for _, inverse in given], dtype=torch.bool),
        )

    @classmethod
    def padded(
        cls, rows: "Sequence[TokenSets | None]", lengths: Sequence[int], width: int
    ) -> "TokenSets | None":
        """Return [B, T] sets out of B rows; None if all of them hold all tokens.

        On the padding a set holds all tokens.

        Args:
            rows: [lengths[i]] each; None for a row whose sets hold all tokens.
            lengths: Tokens of each row.
            width: T.
        """
        if all(row is None for row in rows):
            return None

        start, size = torch.zeros(2, len(rows), width, dtype=torch.int64)
        inverse = torch.ones(len(rows), width, dtype=torch.bool)
        ids, num_before = [], 0
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if row is None:
                continue
            start[i, :length] = row.start + num_before
            size[i, :length] = row.size
            inverse[i, :length] = row.inverse
            ids.append(row.ids)
            num_before += len(row.ids)
        return cls(torch.cat(ids), start, size, inverse)

    def __getitem__(self, key: Index) -> "TokenSets":
        """Return a part of the array."""
        return TokenSets(self.ids, self.start[key], self.size[key], self.inverse[key])

    def to(self, device: torch.device | str) -> "TokenSets":
        """Return the sets on `device`."""
        tensors = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return TokenSets(*[tensor.to(device) for tensor in tensors])

    def members(self, vocabulary: int) -> Tensor:
        """Return [N, V] bool, true for the members of each set of an array of shape [N].

        Example:
            {1, 2} and all but 0, vocabulary 3 -> [[0, 1, 1], [0, 1, 1]]
        """
        answer = self.inverse[:, None].repeat(1, vocabulary)
        row = torch.arange(len(self.size), device=self.size.device).repeat_interleave(self.size)
        tokens = self.ids[ranges(self.start, self.size)]
        answer.view(-1)[row * vocabulary + tokens] = ~self.inverse[row]
        return answer


TokenList = tuple[Tensor, bool]  # [n] int32, and true if the set holds the other tokens instead


def ranges(start: Tensor, length: Tensor) -> Tensor:
    """Return start[0], ..., start[0] + length[0] - 1, start[1], ..., one after another.

    Example:
        start [5, 9], length [2, 3] -> [5, 6, 9, 10, 11]
    """
    before = length.cumsum(0) - length
    steps = torch.arange(int(length.sum()), device=start.device)
    return (start - before).repeat_interleave(length) + steps
