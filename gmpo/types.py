"""Everything that flows between the stages: prompts, rollouts, batches, log-probs and statistics.

Read this file first.  Four policies meet in a training step.  Their log-probs are in nats, of the
distribution that is sampled from: scaled by the temperature and, with `logps_support="sampled"`,
cut and penalised as the sampler did (`Batch.support`):

    logps           the policy being trained, now
    old_logps       the same weights when this collection began
    ref_logps       the frozen reference (only with beta > 0)
    sampler_logps   as the engine reported them while it sampled

Axes: B rows, T completion tokens, P prompt tokens, G group, F reward sources, V vocabulary,
H hidden.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from gmpo.token_sets import TokenSets

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Messages = list[dict[str, Any]]
Number = float | Tensor  # a plain number or a scalar tensor, on any device


class MapStyleDataset(Protocol):
    """A dataset with a length and rows by number: a `datasets.Dataset`, a list of dicts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


# A dataset as the trainers take it: map-style, or a stream that can be read again and again.
AnyDataset = MapStyleDataset | Iterable[Mapping[str, Any]]


def is_map_style(dataset: object) -> "TypeIs[MapStyleDataset]":
    """Return whether a dataset is map-style; a stream has no length."""
    return hasattr(dataset, "__len__")


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
    source: str | Messages  # as the dataset holds it
    opened: str = ""  # text at the prompt's end that the completion continues, such as "<think>\n"


@dataclass(slots=True)
class Rollout:
    """One sampled completion, ragged, on the CPU."""

    prompt: Prompt
    # Completion tokens, with the end-of-sequence token where the policy wrote one; may be empty.
    ids: list[int]
    finish_reason: Literal["stop", "length"]  # "length" if the token budget ended it
    # One per token of ids; None if the engine does not report them.
    sampler_logps: list[float] | None = None
    # [len(ids)], the tokens that each was drawn from; None if always all.
    support: TokenSets | None = None
    # One per token of ids, false where an environment wrote; None until tools are there: all true.
    trained: list[bool] | None = None
    # Decoded, in the form of the prompt: text, or a list of messages.
    completion: str | Messages = ""

    @property
    def truncated(self) -> bool:
        """True if the token budget ended it."""
        return self.finish_reason == "length"


@dataclass(slots=True)
class Batch:
    """Rows that one update (or a part of it) trains on.

    Fields per token are right-padded over completion tokens.

    Example:
        prompts [5, 6] and [7], completions [8, 9, 2] and [4]
        completion_ids [[8, 9, 2], [4, 0, 0]], lengths [3, 1], mask [[1, 1, 1], [1, 0, 0]]
        rows(tensor([1])) has completion_ids [[4]]
    """

    prompt_ids: list[Tensor]  # B of int64 [P_i]; rows of a group hold the same tensor object
    completion_ids: Tensor  # [B, T] int64, 0 on padding
    lengths: Tensor  # [B] int64, completion tokens of each row, trained or not
    mask: Tensor  # [B, T] bool, true where the policy wrote the token and it may be trained on
    # [B] int64, tokens that the policy wrote, trained on or not
    num_completion_tokens: Tensor
    advantages: Tensor  # [B] float32
    group: Tensor  # [B] int64, index of the row's prompt within the collection
    # [B, T]; None if the policy has not moved since sampling: logps.detach() are the old ones
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None  # [B, T]
    sampler_logps: Tensor | None = None  # [B, T]
    # [B, T], the tokens that each was drawn from; None if always all
    support: TokenSets | None = None
    # [B] int64, number of the row in the dataset, -1 if unknown; None if all are
    dataset_rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def rows(self, index: Tensor) -> "Batch":
        """Return the rows `index` ([b] int64), with T cut to the longest of them."""
        width = max(1, int(self.lengths[index].max())) if len(index) else 1
        chosen: dict[str, Any] = {"prompt_ids": [self.prompt_ids[i] for i in index.tolist()]}

        for name, value in self._tensors().items():
            index_here = index.to(value.device)
            chosen[name] = value[index_here] if value.dim() == 1 else value[index_here, :width]
        if self.support is not None:
            chosen["support"] = self.support[index.to(self.support.size.device), :width]
        return dataclasses.replace(self, **chosen)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on `device`.  One tensor per prompt stays one tensor."""
        moved = {id(ids): ids.to(device) for ids in self.prompt_ids}
        fields: dict[str, Any] = {name: value.to(device) for name, value in self._tensors().items()}
        fields["prompt_ids"] = [moved[id(ids)] for ids in self.prompt_ids]
        if self.support is not None:
            fields["support"] = self.support.to(device)
        return dataclasses.replace(self, **fields)

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(slots=True)
class TokenLogProbs:
    """The policy's log-probs of the completion tokens of a batch.  Values on the padding are 0."""

    logps: Tensor  # [B, T] float32 or wider
    # [B, T] nats, of the distribution of `logps`; carries a gradient only where asked for
    entropy: Tensor
    # Scalar load-balancing loss of mixture-of-experts models, not yet weighted
    router_loss: Tensor | None = None


# Names of logged figures that are gmpo's or the Trainer's, ...
RESERVED_NAMES = {
    # the Trainer's
    "step", "epoch", "time", "runtime", "total_flos", "num_input_tokens_seen",
    "loss", "grad_norm", "learning_rate",
    # gmpo's
    "num_tokens", "step_time", "nonfinite_steps",
    "reward", "reward_std", "frac_reward_zero_std",
    "entropy", "entropy_coef", "kl", "policy_loss", "aux_loss",
}  # fmt: skip
# ... and how others of them begin and end.
RESERVED_PATTERN = re.compile(
    r"(completions|clip_ratio|log_ratio|rho|sampling|signal|time|tokens_per_second|memory|entropy)/"
    r"|(eval|train|test)_|rewards/.*/(mean|std)$"
)


def is_reserved_figure(name: str) -> bool:
    """Return whether a logged figure is gmpo's or the Trainer's, so that no reward may take it."""
    return name in RESERVED_NAMES or RESERVED_PATTERN.match(name) is not None


@dataclass(slots=True)
class Statistics:
    """Local figures on their way to the log; `report/metrics.py` reduces them over the ranks, once.

    Example:
        means {"kl": (3.0, 2)} updated with {"kl": (1.0, 2)} -> {"kl": (4.0, 4)}, logged as 1.0
    """

    # name -> (sum, count), logged as sum / count
    means: dict[str, tuple[Number, Number]] = field(default_factory=dict)
    minima: dict[str, Number] = field(default_factory=dict)
    maxima: dict[str, Number] = field(default_factory=dict)

    def update(self, other: "Statistics") -> None:
        """Add `other` to this."""
        for name, (total, count) in other.means.items():
            old_total, old_count = self.means.get(name, (0.0, 0.0))
            self.means[name] = (old_total + total, old_count + count)
        _keep_extremes(self.minima, other.minima, torch.minimum)
        _keep_extremes(self.maxima, other.maxima, torch.maximum)


def _keep_extremes(
    mine: dict[str, Number],
    theirs: dict[str, Number],
    choose: Callable[[Tensor, Tensor], Tensor],
) -> None:
    for name, value in theirs.items():
        value = torch.as_tensor(value)
        if name in mine:
            value = choose(torch.as_tensor(mine[name], device=value.device), value)
        mine[name] = value
