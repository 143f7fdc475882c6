"""Options of the reward stage: from scores to advantages."""

from collections.abc import Sequence
from dataclasses import dataclass

from gmpo.option import option


@dataclass
class RewardSettings:
    reward_weights: list[float] | None = option(
        None, "Weight of each reward source; None weighs all of them 1."
    )
    multi_objective_aggregation: str = option(
        "sum_then_normalize",
        "'sum_then_normalize' weighs and adds the sources, then takes the advantage in the group; "
        "'normalize_then_sum' normalises each source in its group first (GDPO).",
        choices=("sum_then_normalize", "normalize_then_sum"),
    )
    scale_rewards: str = option(
        "group",
        "Divide the centred rewards by the standard deviation of the 'group' or of the 'batch', or "
        "by nothing ('none', as in Dr. GRPO). True means 'group', False 'none'.",
        choices=("group", "batch", "none"),
    )
    reward_workers: int = option(
        0,
        "Processes that call the (sync) reward functions, one completion at a time and all at "
        "once; a process that breaks a limit is killed and replaced, and its completion not "
        "scored. 0 calls them in the training process.",
        low=0,
    )
    reward_timeout: float | None = option(
        None,
        "Seconds for one call of a reward function: of one in a worker process (None: 60), and of "
        "an async one (None: as long as it takes). What has not answered by then is not scored.",
        low=0,
        low_open=True,
    )
    reward_memory_limit: float = option(
        8.0,
        "GiB that a worker process, with what it started, may hold in main memory. Acts with "
        "reward_workers.",
        low=0,
        low_open=True,
    )


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
