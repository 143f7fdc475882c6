"""Does an engine compute what is trained?"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gmpo.distributed import raise_on_all_ranks
from gmpo.rollout.generation_mode import Autocast, generating
from gmpo.rollout.vllm.errors import VllmError
from gmpo.unwrap import without_adapter

Score = Callable[[list[int]], list[float]]

PROBE = "The quick brown fox jumps over the lazy dog. 3 + 4 = 7, 12 * 12 = 144. Once upon a time there was a king who"
# Mean distance, in nats, of the log-probs of one text under the trainer and under an engine with the same weights.  In
# bfloat16 two implementations of one forward pass differ by 0.04 on a model of 135M, and so does one of them from
# itself in float32; a layer that was left out makes nats.
TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 0.15


class ExactnessCheck:
    """Compares log-probs of a fixed text under the trainer and under engines.

    Args:
        policy: Gives the trainer's model as it is now.
        tokenizer: Of the text.
        autocast: Makes the context of mixed precision.
        longest: Tokens to compare, at most.
        tolerance: Largest mean distance in nats; None: by the precision of both sides.
    """

    def __init__(
        self,
        policy: Callable[[], Any],
        tokenizer: Any,
        *,
        autocast: Autocast | None,
        longest: int,
        tolerance: float | None = None,
    ) -> None:
        self.policy = policy
        self.ids: list[int] = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])[
            :longest
        ]
        self.autocast = autocast
        self.tolerance = tolerance

    def run(self, scores: Sequence[Score], engine_dtype: torch.dtype) -> float:
        """The largest mean distance of the engines, in nats.  Every rank must call.

        Args:
            scores: Give an engine's log-probs of tokens 1, 2, ... given those before them; none on ranks without one.

        Raises:
            VllmError: On every rank, if a distance is beyond the tolerance, or NaN.
        """
        mine = self.trainer_logps()
        with raise_on_all_ranks("check the published weights"):
            distances = [self._distance(score, mine, engine_dtype) for score in scores]
        return max(distances, default=0.0)

    def trainer_logps(self) -> Tensor:
        """[len(ids) - 1] float32, on the CPU."""
        model = without_adapter(self.policy())
        ids = torch.tensor([self.ids], device=model.device)
        with generating(self.policy(), autocast=self.autocast, gather=False):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].cpu()

    def _distance(self, score: Score, mine: Tensor, engine_dtype: torch.dtype) -> float:
        distance = float((torch.tensor(score(self.ids), dtype=mine.dtype) - mine).abs().mean())
        dtypes = {engine_dtype, computing_dtype(self.policy(), self.autocast)}
        tolerance = self.tolerance
        if tolerance is None:
            tolerance = max(TOLERANCE.get(dtype, HALF_TOLERANCE) for dtype in dtypes)
        if not distance <= tolerance:
            raise VllmError(
                f"After the weights were published, vLLM's log-probs of a fixed text are {distance:.3g} nats from the "
                f"trainer's on average, more than {tolerance:g}: vLLM does not compute what is trained. If this "
                "model's implementations differ that much by nature, set vllm_publication_tolerance."
            )
        return distance


def computing_dtype(policy: Any, autocast: Autocast | None) -> torch.dtype:
    """What the trainer's matrix products are computed in."""
    model = without_adapter(policy)
    device = model.device.type
    with (autocast or nullcontext)():
        return (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
        )


def prompt_logps(
    prompt_logprobs: Sequence[Any], ids: Sequence[Any], of: Callable[[Any], float]
) -> list[float]:
    """The log-probs of `ids[1:]` among what vLLM reports of a prompt, one dict from token to report per position."""
    return [
        of(reported[token]) for reported, token in zip(prompt_logprobs[1:], ids[1:], strict=True)
    ]
