"""Requests in, rollouts out."""

from collections.abc import Sequence

from gmpo.rollout.engine import Engine, Request, Sampling
from gmpo.rollout.prompts.encoder import PromptEncoder
from gmpo.types import Rollout


def roll_out(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    encoder: PromptEncoder,
    *,
    version: int,
) -> list[Rollout]:
    """Have the engine write the completions, with weights that were published.  Every rank must call.

    Args:
        version: Of the published weights.

    Returns:
        Groups contiguous, in the order of the requests.
    """
    groups = engine.generate(requests, sampling)
    return [
        Rollout(
            prompt=request.prompt,
            ids=completion.ids,
            finish_reason=completion.finish_reason,
            sampler_logps=completion.logps,
            support=completion.support,
            policy_version=version,
            completion=encoder.decode(request.prompt, completion.ids),
        )
        for request, completions in zip(requests, groups, strict=True)
        for completion in completions
    ]
