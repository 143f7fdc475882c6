"""GRPOConfig and GMPOConfig: the settings of every stage plus `transformers.TrainingArguments`.

An option that a user sets acts, or it is refused here with an error that names it and says why.
"""

import functools
import math
import os
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from gmpo.data.settings import DataSettings, Resolved, given_size
from gmpo.inherited_options import check_device, check_inherited, check_useless_options
from gmpo.objective.check import check_objective
from gmpo.objective.settings import CORRECTION_MODES, ObjectiveSettings
from gmpo.option import advice, check_options, option, parse_dicts
from gmpo.policy.settings import PolicySettings
from gmpo.report.settings import ReportSettings
from gmpo.reward.check import check_rewards
from gmpo.reward.settings import RewardSettings
from gmpo.rollout.check import check_rollout
from gmpo.rollout.settings import RolloutSettings

Config = TypeVar("Config", bound=type)

STAGE_SETTINGS = (
    DataSettings,
    RolloutSettings,
    RewardSettings,
    PolicySettings,
    ObjectiveSettings,
    ReportSettings,
)


def _suggest_unknown(cls: Config) -> Config:
    """Make the constructor of `cls` name the closest option for one that does not exist."""
    generated: Any = cls.__init__

    @functools.wraps(generated)
    def init(self: object, *args: object, **kwargs: object) -> None:
        known = {f.name for f in fields(cls)}
        for name in kwargs.keys() - known:
            raise ValueError(f"{cls.__name__} has no option {name!r}.{advice(name, known)}")
        generated(self, *args, **kwargs)

    cls.__init__ = init
    return cls


@_suggest_unknown
@dataclass
class GRPOConfig(
    DataSettings,
    RolloutSettings,
    RewardSettings,
    PolicySettings,
    ObjectiveSettings,
    ReportSettings,
    TrainingArguments,
):
    """Every option of GRPOTrainer.  `docs/configuration.md` lists them with defaults and meanings.

    Of generation_batch_size and steps_per_generation, one that was not given follows from the rest,
    and does so again in a copy made by `dataclasses.replace`.

    Raises:
        ValueError: For an unknown option, an illegal value, or sizes that do not divide.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 (TrainingArguments' own protocol for JSON strings)
        *TrainingArguments._VALID_DICT_FIELDS,
    ]

    learning_rate: float = option(1e-6, "Initial learning rate.")
    logging_steps: float = option(
        10, "Optimizer steps between two logs; below 1: a share of all steps."
    )
    gradient_checkpointing: bool = option(
        True, "Recompute activations in the backward pass: less memory, more time."
    )
    remove_unused_columns: bool | None = option(  # pyright: ignore[reportIncompatibleVariableOverride] (None is accepted here)
        False,
        "Drop the dataset columns that gmpo itself does not read, in training and in evaluation; "
        "reward functions then don't get them.",
    )
    bf16: bool | None = option(
        None, "Mixed precision with bfloat16. None: on where an accelerator has it and fp16 is off."
    )
    warmup_ratio: float | None = option(
        None,
        "Share of all steps with a rising learning rate; the older name of a warmup_steps below 1.",
        low=0.0,
        high=1.0,
    )
    output_dir: str = option(  # pyright: ignore[reportIncompatibleVariableOverride] (never None here)
        "trainer_output", "Folder of the run: checkpoints, metrics, completions."
    )
    logging_dir: str | None = option(None, "Folder of the trackers' local files (tensorboard).")

    algorithm = "grpo"

    def __post_init__(self):
        # The values as they were given: read, checked one by one, and settled.
        self._resolve_paths()
        parse_dicts(self)
        check_inherited(self)
        self._resolve_defaults()
        check_options(self)
        self._resolve_old_names()

        # Options that do not go together.
        check_objective(self, algorithm=self.algorithm)
        check_rewards(self)
        check_rollout(self)
        check_useless_options(self)
        self._check_combinations()

        # The Trainer's own checks; from here on the device and the ranks are known.
        super().__post_init__()
        check_device(self)
        self._check_output_dir()
        self._resolve_sizes()

    # -- names and defaults that stand for something else ----------------------------------------

    def _resolve_paths(self) -> None:
        """Take folders given as `Path` as text."""
        for name in ("output_dir", "logging_dir", "resume_from_checkpoint"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))

    def _resolve_defaults(self) -> None:
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        if self.warmup_ratio is not None and self.warmup_steps:
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio} and warmup_steps={self.warmup_steps} are both "
                "set. Keep one of them."
            )
        if self.bf16 is None:
            on = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
            self.bf16 = on  # pyright: ignore[reportIncompatibleVariableOverride] (as declared)
        self._resolve_best_metric()

    def _resolve_best_metric(self) -> None:
        """Rank models by reward where no metric is given.

        The Trainer would take the loss, which is near 0 by construction: its noise would choose.
        """
        plateau = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)) in (
            "reduce_lr_on_plateau",
            "greedy",
        )
        best = self.save_strategy == "best" or self.load_best_model_at_end
        if self.metric_for_best_model is not None or not (plateau or best):
            return

        self.metric_for_best_model = "reward"
        if self.greater_is_better is None:
            self.greater_is_better = True
        if plateau and isinstance(self.lr_scheduler_kwargs, dict | None):
            self.lr_scheduler_kwargs = {"mode": "max", **(self.lr_scheduler_kwargs or {})}

    def _resolve_old_names(self) -> None:
        if self.use_transformers_paged:
            self.use_transformers_continuous_batching = True
            self.use_transformers_paged = False
        if self.vllm_importance_sampling_cap is not None:
            self.vllm_importance_sampling_clip_max = self.vllm_importance_sampling_cap
            self.vllm_importance_sampling_cap = None

    # -- checks that need options of several stages ----------------------------------------------

    def _check_combinations(self) -> None:
        if self.max_resamples != 3 and self.zero_signal_groups != "resample":
            raise ValueError(
                f"max_resamples={self.max_resamples} would do nothing with zero_signal_groups="
                f"{self.zero_signal_groups!r}. Set zero_signal_groups='resample', or leave "
                "max_resamples out."
            )

        if self.nonfinite_steps == "skip" and self.deepspeed is not None:
            raise ValueError(
                "nonfinite_steps='skip' has no effect with deepspeed, which makes the optimizer's "
                "step within the backward pass. Use nonfinite_steps='stop'."
            )

        if self.sync_ref_model and self.beta == 0.0:
            raise ValueError(
                "sync_ref_model=True needs a reference. Set beta above 0, or leave sync_ref_model "
                "off."
            )

    def _check_output_dir(self) -> None:
        # Absolute at once: a reward may change the working directory.
        folder = os.path.abspath(os.path.expanduser(self.output_dir))
        self.output_dir = folder  # pyright: ignore[reportIncompatibleVariableOverride] (as declared)
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)

        if not os.path.isdir(folder):
            raise ValueError(
                f"output_dir={self.output_dir!r} can't be a folder: {folder!r} is a file. Choose "
                "another one."
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(
                f"output_dir={self.output_dir!r} can't be written: no permission in {folder!r}."
            )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the optimizer steps with a rising learning rate.

        A warmup_ratio of 1.0 is all of them, where a warmup_steps of 1.0 is one.
        """
        if self.warmup_ratio is not None:
            return math.ceil(num_training_steps * self.warmup_ratio)
        return super().get_warmup_steps(num_training_steps)

    # -- batch arithmetic ------------------------------------------------------------------------

    def _resolve_sizes(self) -> None:
        """Settle generation_batch_size and steps_per_generation, and check that sizes divide."""
        per_step = self.per_device_train_batch_size * self.world_size
        rows = given_size(self.generation_batch_size, self.steps_per_generation)
        steps = given_size(self.steps_per_generation, self.generation_batch_size)
        if rows is not None:
            self._check_rows(rows, steps, per_step=per_step)

        if rows is not None and steps is None:
            self.generation_batch_size, self.steps_per_generation = rows, Resolved(rows // per_step)
        else:
            self.steps_per_generation = steps or Resolved(self.gradient_accumulation_steps)
            self.generation_batch_size = Resolved(per_step * self.steps_per_generation)

        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"A collection of generation_batch_size={self.generation_batch_size} rows "
                f"(per_device_train_batch_size={self.per_device_train_batch_size} x "
                f"{self.world_size} process(es) x "
                f"steps_per_generation={self.steps_per_generation}) does not hold whole groups of "
                f"num_generations={self.num_generations}. Make it a multiple of "
                f"{self.num_generations}: "
                f"{nearest_multiples(self.generation_batch_size, self.num_generations)}."
            )
        self._check_eval_sizes()

    def _check_rows(self, rows: int, steps: int | None, *, per_step: int) -> None:
        """Raise a ValueError unless `rows` per collection are whole micro-batches.

        Args:
            steps: How many micro-batches they must be, if that is given too.
            per_step: Rows of a micro-batch over all ranks.
        """
        shares = (
            f"per_device_train_batch_size={self.per_device_train_batch_size} on "
            f"{self.world_size} process(es)"
        )
        if steps is not None and rows != steps * per_step:
            raise ValueError(
                f"generation_batch_size={rows} and steps_per_generation={steps} contradict each "
                f"other: {steps} micro-batches of {per_step} rows ({shares}) are "
                f"{steps * per_step}. Keep one of them."
            )
        if rows % per_step:
            raise ValueError(
                f"generation_batch_size={rows} can't be cut into micro-batches of {per_step} rows "
                f"({shares}). Use a multiple of {per_step}: {nearest_multiples(rows, per_step)}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return what `TrainingArguments.to_dict` does, with sizes as plain numbers."""
        values = super().to_dict()
        for name, value in values.items():
            if isinstance(value, Resolved):
                values[name] = int(value)
        return values

    def _check_eval_sizes(self) -> None:
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            return
        rows = self.per_device_eval_batch_size * self.world_size
        if rows % self.eval_group_size:
            raise ValueError(
                f"per_device_eval_batch_size={self.per_device_eval_batch_size} on "
                f"{self.world_size} process(es) is {rows} rows, which does not hold whole groups "
                f"of {self.eval_group_size} completions. Use "
                f"{nearest_multiples(rows, self.eval_group_size)} rows, or set "
                "num_generations_eval."
            )

    @property
    def eval_group_size(self) -> int:
        """Return the completions per prompt in evaluation."""
        return self.num_generations_eval or self.num_generations

    @property
    def prompts_per_collection(self) -> int:
        """Return the distinct prompts of one collection, over all ranks."""
        return self.rows_per_collection // self.num_generations

    @property
    def rows_per_collection(self) -> int:
        """Return the completions of one collection over all ranks."""
        assert self.generation_batch_size is not None
        return self.generation_batch_size

    @property
    def rows_per_rank(self) -> int:
        """Return the completions of one collection on each rank."""
        return self.rows_per_collection // self.world_size

    @property
    def micro_steps_per_collection(self) -> int:
        """Return the micro-batches that each rank trains on before the next collection."""
        assert self.steps_per_generation is not None
        return self.steps_per_generation * self.num_iterations

    @property
    def clip_window_is_inert(self) -> bool:
        """Return whether each collection makes a single optimizer step.

        Then every log-ratio is 0 and nothing is clipped.
        """
        return self.micro_steps_per_collection <= self.gradient_accumulation_steps


@_suggest_unknown
@dataclass
class GMPOConfig(GRPOConfig):
    """Every option of GMPOTrainer: as GRPOConfig, with GMPO's window in log space."""

    epsilon: float = option(
        0.4,
        "Lower clip bound of the log-ratio, in nats: tokens of completions with a negative "
        "advantage are capped below -epsilon. 0.4 is the paper's window, ratios in (0.67, 1.49).",
        low=0.0,
        low_open=True,
        infinite=True,
    )
    vllm_importance_sampling_mode: str = option(
        "geometric_mask",
        "Level (token, sequence, geometric mean) at which the ratio of trainer to sampler is "
        "taken, and whether it is clamped ('truncate') or dropped ('mask') outside its bounds. "
        "GMPO's own ratio is a geometric mean, and so is its correction: a product over a long "
        "completion would multiply the rounding noise of all its tokens ('sequence_mask', "
        "GRPOConfig's default, drops rows for it).",
        choices=CORRECTION_MODES,
    )

    algorithm = "gmpo"


def nearest_multiples(size: int, divisor: int) -> str:
    """Return the multiples of `divisor` on both sides of `size`, in words."""
    below = size // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


def changed_options(config: GRPOConfig) -> dict[str, Any]:
    """Return the options of `config` that are not at their default, by name, as resolved."""
    plain = type(config)(output_dir=config.output_dir)
    return {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if getattr(config, f.name) != getattr(plain, f.name)
    }
