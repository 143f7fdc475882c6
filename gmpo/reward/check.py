"""Rules between the options of the reward stage."""

from collections.abc import Sequence

from gmpo.reward.settings import RewardSettings


def check_rewards(settings: RewardSettings) -> None:
    """Raise a ValueError if the options, each legal, do not go together."""
    if (
        settings.multi_objective_aggregation == "normalize_then_sum"
        and settings.scale_rewards != "group"
    ):
        raise ValueError(
            f"scale_rewards={settings.scale_rewards!r} has no effect with "
            "multi_objective_aggregation='normalize_then_sum', which normalises in the group and "
            "then over all rows. Leave it at 'group'."
        )
    if settings.reward_memory_limit != 8.0 and not settings.reward_workers:
        raise ValueError(
            f"reward_memory_limit={settings.reward_memory_limit:g} has no effect with "
            "reward_workers=0. Set reward_workers to 1 or more, or leave reward_memory_limit out."
        )


def check_weights(reward_weights: Sequence[float] | None, num_sources: int) -> None:
    """Raise a ValueError unless there is one weight per source (or none at all)."""
    if reward_weights is not None and len(reward_weights) != num_sources:
        raise ValueError(
            f"reward_weights={list(reward_weights)!r} has {len(reward_weights)} weights for "
            f"{num_sources} reward source(s): the numbers must match. Give one weight per reward "
            "function."
        )
