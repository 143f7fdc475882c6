"""Inputs and outputs of objectives and surrogates."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ObjectiveInputs:
    """Everything that a policy-gradient objective may look at.

    Log-probs are in nats.  Where `mask` is false, fields may hold anything.
    """

    logps: Tensor  # [B, T] current policy; only this and `entropy` carry gradients
    old_logps: Tensor  # [B, T] when the collection began
    advantages: Tensor  # [B, 1] (or [B, T])
    mask: Tensor  # [B, T] bool, true where the policy wrote the token and it may be trained on
    select: Tensor  # [B, T] bool, subset of mask that may receive policy gradient
    sampler_logps: Tensor | None = None  # [B, T] from the engine; NaN where it reported none
    ref_logps: Tensor | None = None  # [B, T] the reference, with beta > 0
    entropy: Tensor | None = None  # [B, T]


@dataclass(frozen=True, slots=True)
class Denominators:
    """Counts of the whole optimizer batch, over ranks and micro-batches.

    They make the update the same however the batch is cut.  Two are of a micro-batch instead:
    `micro_batch_tokens` and `micro_batch_selected` count the chunk's own, on this rank.
    """

    num_rows: float  # rows of the optimizer batch
    tokens: float  # counted tokens (mask) of the optimizer batch
    micro_batch_tokens: float  # counted tokens of this chunk's micro-batch, on this rank
    micro_batches: float  # micro-batches of the optimizer batch, over all ranks
    max_completion_length: int
    # Tokens of this chunk's micro-batch, on this rank, that a selection by entropy has kept
    micro_batch_selected: float = 0.0


@dataclass(frozen=True, slots=True)
class SurrogateInputs:
    """Inputs of a surrogate: `ObjectiveInputs` after row masks, selection and correction."""

    logps: Tensor  # [B, T] 0 outside the mask
    log_ratio: Tensor  # [B, T] logps - old_logps, with its gradient; 0 outside the mask
    advantages: Tensor  # [B, 1] (or [B, T])
    mask: Tensor  # [B, T] bool
    select: Tensor  # [B, T] bool, without dropped rows and tokens whose correction is 0
    correction: Tensor  # [1, 1], [B, 1] or [B, T] sampler/trainer weight, no gradient


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The cost of ratios, before averaging."""

    loss: Tensor  # [B, 1] per row or [B, T] per token; 0 where nothing counts
    capped_low: Tensor  # [B, T] bool, raised to the lower bound, so without gradient
    capped_high: Tensor  # [B, T] bool, lowered to the upper bound; false on a bound itself
    ratio: Tensor  # [B, 1] factor of the row's advantage (rho for GMPO), no gradient
