"""Rewards to advantages: what a completion is worth beside the others of its prompt.

Pure, in float64.  Rewards are [N, F], a column per source; NaN says that the source did not score
the row.  Groups are contiguous.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gmpo.reward.check import check_rewards, check_weights
from gmpo.reward.settings import RewardSettings
from gmpo.types import Statistics

FLOOR = 1e-4  # added to every standard deviation that divides


@dataclass(frozen=True, slots=True)
class Advantages:
    """Worth of each row of a collection."""

    # [N] float32, finite; 0 for rows that no source scored and in groups without signal
    advantages: Tensor
    # [N] float64, the weighted sum over the sources that scored the row; NaN if none did
    rewards: Tensor
    zero_signal: Tensor  # [N] bool, the scored rewards of the row's group are exactly equal


def group_advantages(rewards: Tensor, group_size: int, settings: RewardSettings) -> Advantages:
    """Return the reward of each row relative to its group.

    A row that no source scored gets 0 and leaves the statistics of its group.  A source of weight 0
    is there to be logged and changes no advantage.  A group of one has no baseline and gets 0.

    Args:
        rewards: [N, F], of all ranks; NaN where a source did not score.
        group_size: Rows per prompt.
        settings: `reward_weights` [F].  `multi_objective_aggregation`: "sum_then_normalize" weighs
            and adds the sources, then normalises in the group; "normalize_then_sum" normalises each
            source in its group, weighs and adds, then normalises over all rows.  `scale_rewards`,
            of the former: divide by the sample standard deviation + 1e-4 of the "group", of the
            whole "batch", or by nothing ("none").

    Raises:
        ValueError: If settings or weights do not fit, the groups do not divide the rows, or a
            reward is infinite.

    Example:
        rewards [[1], [0], [0], [3]], group_size 2, scale_rewards "none" -> [0.5, -0.5, -1.5, 1.5]

    Source: arXiv:2402.03300, section 4.1.2; scale_rewards="none" is arXiv:2503.20783;
    "normalize_then_sum" is GDPO, arXiv:2601.05242.
    """
    _check(rewards, group_size, settings)
    num_rows, num_sources = rewards.shape
    weights = rewards.new_tensor(
        settings.reward_weights or [1.0] * num_sources, dtype=torch.float64
    )
    scores = rewards.double().reshape(num_rows // group_size, group_size, num_sources)
    scores = torch.where(weights == 0, torch.nan, scores)  # [N/G, G, F]

    aggregate = _AGGREGATIONS[settings.multi_objective_aggregation]
    scale = _SCALES[settings.scale_rewards]
    relative, flat = aggregate(scores, weights, scale)  # [N/G, G], [N/G, 1]
    return Advantages(
        advantages=torch.where(flat | relative.isnan(), 0.0, relative).float().flatten(),
        rewards=_weighted_sum(scores, weights).flatten(),
        zero_signal=flat.expand_as(relative).flatten(),
    )


def reward_statistics(names: Sequence[str], rewards: Tensor, result: Advantages) -> Statistics:
    """Return what the log says about the rewards of one collection.

    Means and shares are (sum, count) over the rows that were scored, so they stay exact over many
    collections.  A standard deviation is one figure per collection, counted once: the log shows the
    mean of the collections' standard deviations.  Every rank gets the same figures from the same
    gathered rows, so a reduction over ranks that adds sums and counts leaves them as they are.

    Args:
        names: [F] of the sources.
        rewards: [N, F], the gathered rewards that `result` was made from.

    Returns:
        rewards/{name}/mean and /std, reward, reward_std (of the weighted sums over all rows),
        frac_reward_zero_std (share of rows in groups without signal).  Where nothing was scored,
        there is no figure.
    """
    statistics = Statistics()
    for name, scores in zip(names, rewards.double().unbind(-1), strict=True):
        _add_mean_and_std(statistics, f"rewards/{name}/mean", f"rewards/{name}/std", scores)
    _add_mean_and_std(statistics, "reward", "reward_std", result.rewards)
    if len(rewards):
        statistics.means["frac_reward_zero_std"] = (
            float(result.zero_signal.sum()),
            float(len(rewards)),
        )
    return statistics


def _sum_then_normalize(
    scores: Tensor, weights: Tensor, scale: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    total = _weighted_sum(scores, weights)  # [N/G, G]
    return (total - _mean(total, 1)) / scale(total), _flat(total)


def _normalize_then_sum(
    scores: Tensor, weights: Tensor, scale: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    normalized = (scores - _mean(scores, 1)) / (_deviation(scores, 1) + FLOOR)  # [N/G, G, F]
    flat = _flat(scores)  # [N/G, 1, F]
    normalized = torch.where(flat & ~scores.isnan(), 0.0, normalized)
    total = _weighted_sum(normalized, weights)  # [N/G, G]
    return (total - _mean(total, (0, 1))) / (_deviation(total, (0, 1)) + FLOOR), flat.all(-1)


_AGGREGATIONS = {
    "sum_then_normalize": _sum_then_normalize,
    "normalize_then_sum": _normalize_then_sum,
}
_SCALES = {
    "group": lambda total: _deviation(total, 1) + FLOOR,
    "batch": lambda total: _deviation(total, (0, 1)) + FLOOR,
    "none": torch.ones_like,
}


def _weighted_sum(scores: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over the last axis of what was scored; NaN where nothing was."""
    scored = ~scores.isnan()
    # One source after another: every row is rounded alike, and equal rows stay exactly equal.
    total = sum(
        (torch.where(scored, scores, 0.0) * weights).unbind(-1),
        start=scores.new_zeros(scores.shape[:-1]),
    )
    return torch.where(scored.any(-1), total, torch.nan)


def _mean(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return the mean of what is not NaN, with the axes kept; NaN where there is nothing."""
    return values.nanmean(dim, keepdim=True)


def _deviation(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return the sample standard deviation (Bessel) of what is not NaN, with the axes kept.

    It is 0 for fewer than two values.
    """
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - _mean(values, dim)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def _flat(values: Tensor) -> Tensor:
    """Return where the values along axis 1 that are not NaN are equal, with the axis kept."""
    missing = values.isnan()
    smallest = torch.where(missing, torch.inf, values).amin(1, keepdim=True)
    return smallest >= torch.where(missing, -torch.inf, values).amax(1, keepdim=True)


def _add_mean_and_std(statistics: Statistics, mean: str, std: str, values: Tensor) -> None:
    scored = values[~values.isnan()]
    if len(scored):
        statistics.means[mean] = (float(scored.sum()), float(len(scored)))
        statistics.means[std] = (float(_deviation(scored, 0)), 1.0)


def _check(rewards: Tensor, group_size: int, settings: RewardSettings) -> None:
    check_rewards(settings)
    check_weights(settings.reward_weights, rewards.shape[1])
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rows do not hold whole groups of {group_size}.")
    if rewards.isinf().any():
        raise ValueError(
            "A reward is infinite. Only finite rewards (or NaN: not scored) have advantages."
        )
