"""What flows between the stages: prompts, rollouts, batches, scores and statistics.  Read this file first.

Four policies meet in a training step.  Their log-probs are in nats, of the distribution that is sampled from: scaled by
the temperature and, with `logps_support="sampled"`, cut and penalised as the sampler did (`Batch.support`):

    logps           the policy being trained, now
    old_logps       the same weights when this collection began
    ref_logps       the frozen reference (only with beta > 0)
    sampler_logps   what the engine reported while it sampled

Axes: B rows, T completion tokens, P prompt tokens, G group, F reward sources, V vocabulary, H hidden.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Messages = list[dict[str, Any]]


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


@dataclass(slots=True)
class Prompt:
    """One prompt, ready for an engine.  The rows of a group share one object."""

    ids: list[int]  # tokens, with special tokens, at least one
    source: str | Messages  # what the dataset holds


@dataclass(slots=True)
class Rollout:
    """One sampled completion, ragged, on the CPU."""

    prompt: Prompt
    ids: list[
        int
    ]  # completion tokens; includes the end-of-sequence token where the policy wrote one; may be empty
    finish_reason: Literal["stop", "length"]  # "length": the token budget ended it
    sampler_logps: list[float] | None = (
        None  # one per token of ids; None: the engine does not report them
    )
    support: TokenSets | None = (
        None  # [len(ids)], the tokens that each was drawn from; None: always all
    )
    trained: list[bool] | None = (
        None  # one per token of ids, false where an environment wrote; None: all true
    )
    policy_version: int = 0  # of the weights that wrote it
    completion: str | Messages = (
        ""  # decoded, in the form of the prompt: text, or a list of messages
    )

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(slots=True)
class Batch:
    """Rows that one update (or a part of it) trains on.  Per-token fields are right-padded over completion tokens."""

    prompt_ids: list[
        Tensor
    ]  # B of int64 [P_i], ragged; rows of a group hold the same tensor object
    completion_ids: Tensor  # [B, T] int64, 0 on padding
    lengths: Tensor  # [B] int64, completion tokens of each row, trained or not
    mask: Tensor  # [B, T] bool, true where the policy wrote the token and it may be trained on
    num_written: (
        Tensor  # [B] int64, tokens the policy wrote: what denominators count, trained on or not
    )
    advantages: Tensor  # [B] float32
    group: Tensor  # [B] int64, index of the row's prompt within the collection
    old_logps: Tensor | None = (
        None  # [B, T]; None: the policy has not moved since sampling, use sg(logps)
    )
    ref_logps: Tensor | None = None  # [B, T]
    sampler_logps: Tensor | None = None  # [B, T]
    support: TokenSets | None = (
        None  # [B, T], the tokens that each was drawn from; None: always all
    )
    policy_version: int = 0

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def rows(self, index: Tensor) -> "Batch":
        """The rows `index` ([b] int64), with T cut to the longest of them."""
        width = max(1, int(self.lengths[index].max())) if len(index) else 1
        chosen: dict[str, Any] = {"prompt_ids": [self.prompt_ids[i] for i in index.tolist()]}
        for name, value in self._tensors().items():
            index_here = index.to(value.device)
            chosen[name] = value[index_here] if value.dim() == 1 else value[index_here, :width]
        if self.support is not None:
            chosen["support"] = self.support[index.to(self.support.size.device), :width]
        return dataclasses.replace(self, **chosen)

    def to(self, device: torch.device | str) -> "Batch":
        moved = {
            id(ids): ids.to(device) for ids in self.prompt_ids
        }  # one tensor per prompt stays one tensor
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in self._tensors().items()
        }
        if self.support is not None:
            tensors["support"] = self.support.to(device)
        return dataclasses.replace(
            self, prompt_ids=[moved[id(ids)] for ids in self.prompt_ids], **tensors
        )

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(slots=True)
class Scores:
    """What the policy says of the completion tokens of a batch.  Values under the padding are 0."""

    logps: Tensor  # [B, T] float32 or wider
    entropy: Tensor  # [B, T] nats, of the distribution of `logps`; carries a gradient only where asked for
    router_loss: Tensor | None = (
        None  # scalar load-balancing loss of mixture-of-experts models, not yet weighted
    )


@dataclass(slots=True)
class Statistics:
    """Local figures on their way to the log; `report/metrics.py` reduces them over the ranks, once."""

    means: dict[str, tuple[Any, Any]] = field(
        default_factory=dict
    )  # name -> (sum, count), logged as sum / count
    minima: dict[str, Any] = field(default_factory=dict)
    maxima: dict[str, Any] = field(default_factory=dict)

    def update(self, other: "Statistics") -> None:
        """Add `other` to this."""
        for name, (total, count) in other.means.items():
            old_total, old_count = self.means.get(name, (0.0, 0.0))
            self.means[name] = (old_total + total, old_count + count)
        for mine, theirs, choose in (
            (self.minima, other.minima, torch.minimum),
            (self.maxima, other.maxima, torch.maximum),
        ):
            for name, value in theirs.items():
                value = torch.as_tensor(value)
                mine[name] = (
                    choose(torch.as_tensor(mine[name], device=value.device), value)
                    if name in mine
                    else value
                )
