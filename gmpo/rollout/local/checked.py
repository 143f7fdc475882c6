"""The shared-prefix engine with a way out: `generate`, where the model is none that the prefix cache can serve."""

import logging
from collections.abc import Sequence

import torch

from gmpo.rollout.engine import Completion, Engine, Request, Sampling
from gmpo.rollout.local.hf_generate import GenerateEngine
from gmpo.rollout.local.shared_prefix import SharedPrefixEngine, unsupported_reason
from gmpo.unwrap import without_adapter

logger = logging.getLogger(__name__)

# Largest mean distance of log-probs, in nats, between the shared-prefix engine and the plain model.  A mean over tokens
# and, by probability, over the vocabulary: one logit that rounding has moved far does not weigh.  In bfloat16 rounding
# makes 0.06 on a model of 135M; faults that are not larger are found in float32 alone.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 0.1


class CheckedEngine:
    """The shared-prefix engine, once it has shown on the first prompt that it computes what the model computes.

    Args:
        shared: The engine to check.
        otherwise: What generates if it fails; None: that is an error.
    """

    def __init__(self, shared: SharedPrefixEngine, *, otherwise: GenerateEngine | None) -> None:
        self.shared = shared
        self.otherwise = otherwise
        self._chosen: Engine | None = None

    def publish(self, version: int) -> None:
        """Nothing to do: the module is the trainer's own."""

    def close(self) -> None:
        """Nothing to do."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Every rank must call where the policy is sharded, be it with nothing to do."""
        if self._chosen is None:
            self._chosen = self._choose(requests, sampling)
        return self._chosen.generate(requests, sampling)

    def _choose(self, requests: Sequence[Request], sampling: Sampling) -> Engine:
        prompt = requests[0].prompt.ids if requests else self.shared.eos
        reason = unsupported_reason(
            self.shared.policy(), sampling, gather=self.shared.gather
        ) or self._failure(prompt)
        if reason is None:
            return self.shared
        if self.otherwise is None:
            raise ValueError(
                f"generation_engine='shared_prefix' can't serve this model: {reason}. Set generation_engine to "
                "'generate' or 'auto'."
            )
        logger.warning(
            "Generating with transformers' generate, not with the faster shared-prefix engine: %s.",
            reason,
        )
        return self.otherwise

    def _failure(self, prompt: Sequence[int]) -> str | None:
        dtype = without_adapter(self.shared.policy()).dtype
        tolerance = (
            HALF_TOLERANCE
            if self.shared.autocast is not None
            else TOLERANCE.get(dtype, HALF_TOLERANCE)
        )
        try:
            deviation = self.shared.deviation(prompt)
        except Exception as error:
            return (
                f"its forward pass fails over the shared prefix ({type(error).__name__}: {error})"
            )
        if not deviation <= tolerance:
            return f"its log-probs deviate by {deviation:.2g} nats from the plain model's, more than {tolerance:g}"
        return None
