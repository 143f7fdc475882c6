"""Figures of a chunk, for the log.

Means are (sum, count).  A minimum or maximum over no token is +inf or -inf, the neutral element
when chunks are put together; the report leaves out what is still infinite in the end.
"""

import torch
from torch import Tensor

from gmpo.objective.aggregate import row_mean, total
from gmpo.objective.correction import Correction, sampler_difference
from gmpo.objective.types import ObjectiveInputs, Surrogate, SurrogateInputs
from gmpo.types import Statistics


def mean(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over the counted values, and their number."""
    return total(values, counted), counted.sum()


def smallest(values: Tensor, counted: Tensor) -> Tensor:
    """Return the smallest counted value; +inf if there is none."""
    return torch.where(counted, values, torch.inf).amin()


def largest(values: Tensor, counted: Tensor) -> Tensor:
    """Return the largest counted value; -inf if there is none."""
    return torch.where(counted, values, -torch.inf).amax()


@torch.no_grad()
def statistics(
    x: ObjectiveInputs,
    terms: SurrogateInputs,
    surrogate: Surrogate,
    kl: Tensor | None,
    correction: Correction | None,
) -> Statistics:
    """Return all figures of a chunk.

    Args:
        x: Inputs of the objective.
        terms: Inputs of the surrogate.
        surrogate: Its result.
        kl: [B, T]; None without a reference.
        correction: None if it is off; the difference to a reporting sampler is shown all the same.
    """
    figures = Statistics()
    for name, values in (("entropy", x.entropy), ("kl", kl)):
        if values is not None:
            figures.means[name] = mean(values, x.mask)

    figures.minima["log_ratio/min"] = smallest(terms.log_ratio, x.mask)
    figures.maxima["log_ratio/max"] = largest(terms.log_ratio, x.mask)
    figures.update(clip_statistics(surrogate, terms.select))
    figures.update(ratio_statistics(surrogate, terms))
    if x.sampler_logps is not None:
        figures.update(sampling_statistics(x, correction))
    return figures


def clip_statistics(surrogate: Surrogate, select: Tensor) -> Statistics:
    """Return the shares of selected tokens that are capped, and the extremes of rows' shares."""
    low, high = surrogate.capped_low, surrogate.capped_high
    rows = select.any(-1, keepdim=True)
    return Statistics(
        means={
            "clip_ratio/low_mean": mean(low.float(), select),
            "clip_ratio/high_mean": mean(high.float(), select),
            "clip_ratio/region_mean": mean((low | high).float(), select),
        },
        minima={"clip_ratio/low_min": smallest(row_mean(low.float(), select), rows)},
        maxima={"clip_ratio/high_max": largest(row_mean(high.float(), select), rows)},
    )


def ratio_statistics(surrogate: Surrogate, terms: SurrogateInputs) -> Statistics:
    """Return the factors of positive and of negative advantages, over rows with selected tokens."""
    advantage = row_mean(terms.advantages, terms.select)  # [B, 1]
    figures = Statistics()
    for sign, rows in (("positive", advantage > 0), ("negative", advantage < 0)):
        figures.means[f"rho/{sign}/mean"] = mean(surrogate.ratio, rows)
        figures.maxima[f"rho/{sign}/max"] = largest(surrogate.ratio, rows)
    return figures


def sampling_statistics(x: ObjectiveInputs, correction: Correction | None) -> Statistics:
    """Return the distance of sampler and trainer, in nats per token, and the unbounded ratio."""
    difference = sampler_difference(x.old_logps, x.sampler_logps, x.mask)
    name = "sampling/sampling_logp_difference"
    figures = Statistics(
        means={f"{name}/mean": mean(difference.abs(), x.mask)},
        maxima={f"{name}/max": largest(difference.abs(), x.mask)},
    )
    if correction is None:
        return figures

    # One ratio per token, or one per row that has any.
    name = "sampling/importance_sampling_ratio"
    ratio = correction.ratio(difference, x.mask)
    counted = x.mask if ratio.shape == x.mask.shape else x.mask.any(-1, keepdim=True)
    figures.minima[f"{name}/min"] = smallest(ratio, counted)
    figures.means[f"{name}/mean"] = mean(ratio, counted)
    figures.maxima[f"{name}/max"] = largest(ratio, counted)

    outside = correction.outside(ratio).to(ratio.dtype)
    outcome = "masked" if correction.masks else "truncated"
    figures.means[f"{name}/{outcome}"] = mean(outside, counted)
    return figures
