"""Check that an engine computes what is trained.

An engine writes, and the trainer's own plain forward pass scores.  Where the two say different
log-probs of the same tokens, an engine leaves out a layer, attends to padding, or reads positions
or weights that are not the policy's, and every ratio of the training is off.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmpo.distributed import raise_on_all_ranks
from gmpo.rollout.engine import Completion, Engine, Request, Sampling, ServingEngine, Work
from gmpo.rollout.generation_mode import Autocast, generating
from gmpo.rollout.vllm.errors import VllmError
from gmpo.types import Prompt
from gmpo.unwrap import without_adapter

logger = logging.getLogger(__name__)

Policy = Callable[[], PreTrainedModel]
Score = Callable[[list[int]], list[float]]

# Largest mean distance, in nats, between an engine's log-probs of some tokens and the trainer's.
# In 16 bits two implementations of one forward pass differ by 0.04 to 0.06 on a model of 135M, and
# so does one of them from itself in float32; a layer that was left out makes nats.
TOLERANCES = {
    torch.float64: 1e-3,
    torch.float32: 1e-3,
    torch.bfloat16: 0.15,
    torch.float16: 0.15,
}
PROBE = (
    "The quick brown fox jumps over the lazy dog. 3 + 4 = 7, 12 * 12 = 144. "
    "Once upon a time there was a king who"
)
PROMPT_LENGTHS = (12, 5, 3)  # of the prompts that an engine of this process is tried on
SAMPLES = 2  # completions of each
BUDGET = 12  # tokens of each


def tolerance(*dtypes: torch.dtype) -> float:
    """Return the distance that two computations in these precisions may have, in nats."""
    return max(TOLERANCES.get(dtype, max(TOLERANCES.values())) for dtype in dtypes)


def plain_logps(model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Return the log-probs of `ids` behind `prompt`, by one pass without a cache.

    An adapter may put virtual tokens in front, so that places are counted from the end.

    Returns:
        [len(ids)] float32, on the CPU.
    """
    tokens = torch.tensor([[*prompt, *ids]], device=model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[0, -len(ids) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, tokens[0, -len(ids) :, None])[:, 0].cpu()


def computing_dtype(policy: PreTrainedModel, autocast: Autocast | None) -> torch.dtype:
    """Return what the trainer's matrix products are computed in."""
    model = without_adapter(policy)
    device = model.device.type
    with (autocast or nullcontext)():
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return model.dtype


# -- engines of this process ---------------------------------------------------------------------


class LocalEngine(ServingEngine, Protocol):
    """An engine around the trainer's own module."""

    name: str  # for messages

    def unsupported_reason(self, sampling: Sampling) -> str | None:
        """Return why the model or the options can't be served; None if they can, as far as seen."""
        ...


class CheckedEngine:
    """The first of some engines that serves the model and has shown that it computes the same.

    The check is made at the first generation: each engine writes short completions of a prompt's
    beginnings, of unlike lengths together, and a plain forward pass scores them.

    Args:
        engines: In the order of preference.
        policy: Gives the trainer's model as it is now.
        eos: Tokens to try the engine on where a rank has no prompt.
        autocast: Makes the context of mixed precision.
        gather: Make sharded parameters whole while generating.
        remedy: What to do if no engine will do.  Without one the last engine that runs at all is
            taken, with a warning.
    """

    overlaps = False  # it is the trainer's own module that writes

    def __init__(
        self,
        engines: Sequence[LocalEngine],
        policy: Policy,
        *,
        eos: Sequence[int],
        autocast: Autocast | None = None,
        gather: bool = True,
        remedy: str | None = None,
    ) -> None:
        self.engines = engines
        self.policy = policy
        self.eos = tuple(eos)
        self.autocast = autocast
        self.gather = gather
        self.remedy = remedy
        self.chosen: LocalEngine | None = None

    def publish(self, version: int) -> None:
        """Do nothing: the module is the trainer's own."""

    def close(self) -> None:
        """Do nothing."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Write completions.

        Every rank must call where the policy is sharded, even with nothing to do.
        """
        if self.chosen is None:
            self.chosen = self._choose(requests, sampling)
        return self.chosen.generate(requests, sampling)

    def serve(self, work: Work, sampling: Sampling) -> None:
        """Serve until there is no more work."""
        if self.chosen is None:
            self.chosen = self._choose((), sampling)
        self.chosen.serve(work, sampling)

    def _choose(self, requests: Sequence[Request], sampling: Sampling) -> LocalEngine:
        prompt = requests[0].prompt.ids if requests else list(self.eos)
        for number, engine in enumerate(self.engines):
            reason = engine.unsupported_reason(sampling) or self._failure(engine, prompt)
            if reason is None:
                return engine
            self._tell(number, engine, reason)
        return self.engines[-1]

    def _tell(self, number: int, engine: LocalEngine, reason: str) -> None:
        """Warn that an engine does not do, or raise if there is no other one and a remedy."""
        if number + 1 < len(self.engines):
            following = self.engines[number + 1].name
            logger.warning("Generating with %s, not with %s: %s.", following, engine.name, reason)
        elif self.remedy is not None:
            raise ValueError(f"{engine.name} can't serve this model: {reason}. {self.remedy}")
        else:
            logger.warning(
                "Completions come from %s although %s. Log-ratios then hold this difference, too; "
                "sampling/sampling_logp_difference in the log says how much.",
                engine.name,
                reason,
            )

    def _failure(self, engine: LocalEngine, prompt: Sequence[int]) -> str | None:
        """Return what an engine gets wrong; None if it computes what the policy computes."""
        try:
            found = self.deviation(engine, prompt)
        except Exception as error:  # whatever the model raises, another engine may do
            return f"its forward pass fails ({type(error).__name__}: {error})"

        allowed = tolerance(computing_dtype(self.policy(), self.autocast))
        if not found <= allowed:
            return (
                f"its log-probs deviate by {found:.2g} nats from the plain model's, more than "
                f"{allowed:g}"
            )
        return None

    def deviation(self, engine: Engine, prompt: Sequence[int]) -> float:
        """Return how far an engine's log-probs are from the plain model's, in nats.

        The engine writes short completions of some prompts.  Of each prompt the mean distance over
        all tokens is taken, and the largest of these.
        """
        longest = max(PROMPT_LENGTHS)
        tokens = (list(prompt) * longest)[:longest]
        asked = [
            Request(Prompt(tokens[:length], ""), SAMPLES, seed=length) for length in PROMPT_LENGTHS
        ]
        groups = engine.generate(asked, Sampling(BUDGET, logps_support="full"))

        policy = self.policy()
        distances: list[float] = []
        with generating(policy, autocast=self.autocast, gather=self.gather):
            model = without_adapter(policy)
            for request, group in zip(asked, groups, strict=True):
                expected = [plain_logps(model, request.prompt.ids, each.ids) for each in group]
                got = [logp for each in group for logp in each.logps or ()]
                distances.append(float((torch.tensor(got) - torch.cat(expected)).abs().mean()))
        return max(distances, key=lambda each: (math.isnan(each), each))


# -- engines that hold a copy of the weights -----------------------------------------------------


class ExactnessCheck:
    """Compares log-probs of a fixed text under the trainer and under engines.

    Args:
        policy: Gives the trainer's model as it is now.
        tokenizer: Of the text.
        autocast: Makes the context of mixed precision.
        longest: Tokens to compare, at most.
        tolerance: Largest mean distance in nats; None for the precisions' own.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        *,
        autocast: Autocast | None,
        longest: int,
        tolerance: float | None = None,
    ) -> None:
        self.policy = policy
        # With the token that begins every text: without it some models are far from any text, where
        # kernels of 16 bits differ most.
        self.ids: list[int] = list(tokenizer(PROBE)["input_ids"])[:longest]
        self.autocast = autocast
        self.tolerance = tolerance

    def run(self, scores: Sequence[Score], engine_dtype: torch.dtype) -> float:
        """Return the largest mean distance of the engines, in nats.  Every rank must call.

        Args:
            scores: Give an engine's log-probs of tokens 1, 2, ... given those before them; empty on
                ranks without an engine.

        Raises:
            VllmError: On every rank, if a distance is beyond the tolerance, or NaN.
        """
        mine = self.trainer_logps()
        with raise_on_all_ranks("check the published weights"):
            distances = [self._distance(score, mine, engine_dtype) for score in scores]
        return max(distances, default=0.0)

    def trainer_logps(self) -> Tensor:
        """Return the trainer's log-probs of the text, [len(ids) - 1] float32, on the CPU."""
        policy = self.policy()
        with generating(policy, autocast=self.autocast, gather=False):
            return plain_logps(without_adapter(policy), self.ids[:1], self.ids[1:])

    def _distance(self, score: Score, mine: Tensor, engine_dtype: torch.dtype) -> float:
        distance = float((torch.tensor(score(self.ids), dtype=mine.dtype) - mine).abs().mean())
        allowed = self.tolerance
        if allowed is None:
            allowed = tolerance(engine_dtype, computing_dtype(self.policy(), self.autocast))
        if not distance <= allowed:
            raise VllmError(
                "After the weights were published, vLLM's log-probs of a fixed text are "
                f"{distance:.3g} nats from the trainer's on average, more than {allowed:g}: vLLM "
                "does not compute what is trained. If this model's implementations differ that "
                "much by nature, set vllm_publication_tolerance."
            )
        return distance


def prompt_logps(
    prompt_logprobs: Sequence[Any], ids: Sequence[Any], of: Callable[[Any], float]
) -> list[float]:
    """Return the log-probs of `ids[1:]` among what vLLM reports of a prompt.

    Args:
        prompt_logprobs: A dict from token to report for each position.
        of: Gives the log-prob of a report.
    """
    return [
        of(reported[token]) for reported, token in zip(prompt_logprobs[1:], ids[1:], strict=True)
    ]
