"""Small inputs to objectives, spelled out the way a hand calculation starts: log-ratios, advantages, lengths."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gmpo.objective.objective import Objective, objective_from
from gmpo.objective.settings import ObjectiveSettings
from gmpo.objective.types import Denominators, ObjectiveInputs, Surrogate

log = math.log


def objective(algorithm: str = "grpo", **options: Any) -> Objective:
    return objective_from(ObjectiveSettings(**options), algorithm=algorithm)


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def inputs(
    log_ratio: Sequence[Any], advantages: Sequence[Any], mask: Any = None, **fields: Any
) -> ObjectiveInputs:
    """Rows whose current log-probs are -1, -1.25, -1.5, ... along the tokens, and the old ones `log_ratio` less.

    fields: As `ObjectiveInputs` takes them; the selection is the mask unless given.  `sampler` gives the sampler's
        log-probs by how far they are below the old ones, `reference` the reference's by how far above the current ones.
    """
    ratios = double(log_ratio)
    logps = (-1 - 0.25 * torch.arange(ratios.shape[1], dtype=torch.float64)).expand_as(ratios)
    counted = (
        torch.ones_like(ratios, dtype=torch.bool)
        if mask is None
        else torch.tensor(mask, dtype=torch.bool)
    )
    fields.setdefault("select", counted)
    if "sampler" in fields:
        fields["sampler_logps"] = logps - ratios - double(fields.pop("sampler"))
    if "reference" in fields:
        fields["ref_logps"] = logps + double(fields.pop("reference"))
    return ObjectiveInputs(
        logps=logps.clone().requires_grad_(),
        old_logps=logps - ratios,
        advantages=double(advantages).reshape(len(ratios), -1),
        mask=counted,
        **fields,
    )


def counts(x: ObjectiveInputs, *, max_completion_length: int = 8) -> Denominators:
    """The counts of an optimizer batch that consists of `x` alone."""
    tokens = float(x.mask.sum())
    return Denominators(float(len(x.mask)), tokens, tokens, 1.0, max_completion_length)


def loss_and_gradient(
    objective: Objective,
    x: ObjectiveInputs,
    denominators: Denominators | None = None,
    **keywords: float,
) -> tuple[Tensor, Tensor]:
    """The loss of an optimizer batch, of `x` alone unless its counts are given, and its gradient in the log-probs."""
    loss, _ = objective.loss(x, denominators or counts(x), **keywords)
    (gradient,) = torch.autograd.grad(loss, x.logps)
    return loss.detach(), gradient


def surrogate_of(objective: Objective, x: ObjectiveInputs) -> Surrogate:
    return objective.member.surrogate(objective.terms(x), **objective.options)


def equal(actual: Tensor, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance
    )
