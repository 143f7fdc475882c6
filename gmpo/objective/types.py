"""What goes into an objective and what comes out."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ObjectiveInputs:
    """What a policy-gradient objective may look at.  Log-probs in nats; where `mask` is false they may be anything."""

    logps: Tensor  # [B, T] current policy; with `entropy`, the only field that carries a gradient
    old_logps: Tensor  # [B, T] when the collection began
    advantages: Tensor  # [B, 1] (or [B, T])
    mask: Tensor  # [B, T] bool, true where the policy wrote the token
    select: Tensor  # [B, T] bool, subset of mask that may receive policy gradient
    sampler_logps: Tensor | None = None  # [B, T] the engine's report; NaN: none for this token
    ref_logps: Tensor | None = None  # [B, T] the reference, with beta > 0
    entropy: Tensor | None = None  # [B, T]


@dataclass(frozen=True, slots=True)
class Denominators:
    """Counts of the whole optimizer batch, over ranks and micro-batches, so that cutting it changes nothing."""

    rows: float  # rows of the optimizer batch
    tokens: float  # counted tokens (mask) of the optimizer batch
    micro_batch_tokens: (
        float  # counted tokens of the micro-batch that this chunk belongs to, on this rank
    )
    micro_batches: float  # micro-batches of the optimizer batch, over all ranks
    max_completion_length: int


@dataclass(frozen=True, slots=True)
class SurrogateInputs:
    """What a surrogate looks at: `ObjectiveInputs` after the row masks, the selection and the correction."""

    logps: Tensor  # [B, T] 0 outside of the mask
    log_ratio: Tensor  # [B, T] logps - old_logps, with its gradient; 0 outside of the mask
    advantages: Tensor  # [B, 1] (or [B, T])
    mask: Tensor  # [B, T] bool
    select: Tensor  # [B, T] bool, without dropped rows and without tokens whose correction is 0
    correction: Tensor  # [1, 1], [B, 1] or [B, T] sampler/trainer weight, no gradient


@dataclass(frozen=True, slots=True)
class Surrogate:
    """A ratio's cost, before averaging."""

    loss: Tensor  # [B, 1] per row or [B, T] per token; 0 where nothing counts
    capped_low: Tensor  # [B, T] bool, raised to the lower bound, hence without a gradient; on the bound: false
    capped_high: Tensor  # [B, T] bool, lowered to the upper bound
    ratio: Tensor  # [B, 1] what multiplies the row's advantage (rho for GMPO), no gradient
