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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gmpo.token_sets import TokenSets

Messages = list[dict[str, Any]]


class DatasetRow(dict[str, Any]):
    """One row of a dataset, which knows its number there."""

    def __init__(self, row: Mapping[str, Any], number: int) -> None:
        super().__init__(row)
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make it again in another process, where a loader's workers send it."""
        return DatasetRow, (dict(self), self.number)


@dataclass(slots=True)
class Prompt:
    """One prompt, ready for an engine.  The rows of a group share one object."""

    ids: list[int]  # tokens, with special tokens, at least one
    source: str | Messages  # what the dataset holds
    opened: str = ""  # text at the prompt's end that the completion continues, such as "<think>\n"


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
    num_completion_tokens: (
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
class TokenLogProbs:
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
