"""Options of the reward stage: from scores to advantages."""

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
