"""The stages of a run, built in the order of a step, and what moves between steps."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from gmpo import distributed
from gmpo.collect import Collection, Collector
from gmpo.config import GRPOConfig
from gmpo.data.loaders import EpochListener
from gmpo.data.resample import ReplacementPrompts
from gmpo.learn import Learner
from gmpo.nonfinite import NonFiniteSteps
from gmpo.objective.entropy_bonus import EntropyController
from gmpo.objective.objective import objective_from
from gmpo.optimizer_batches import OptimizerBatches
from gmpo.policy.logprobs import LogProbs
from gmpo.policy.memory import ChunkMemory
from gmpo.policy.reference import (
    AdapterCopy,
    FrozenCopy,
    Reference,
    ReferenceState,
    ReferenceSync,
    prepared_reference,
)
from gmpo.report.completions import CompletionLog
from gmpo.report.metrics import Metrics, Mode, Stopwatch
from gmpo.reward.types import RewardSource
from gmpo.rollout.build import build_engine
from gmpo.rollout.prompts.encoder import PromptEncoder
from gmpo.rollout.sampling import sampling_from
from gmpo.rollout.weights.version import PolicyVersion
from gmpo.run.checkpoint import Stateful


class Stages:
    """The stages of a run, and what is counted between its steps.

    Args:
        args: The config.
        policy: Returns the policy as it is now, without DDP, DeepSpeed or compile around it.
        encoder: Turns dataset rows into prompts.
        sources: What scores the completions.
        reference: The frozen policy of the KL term; None without one.
        accelerator: The Trainer's own.
        backward: Runs the backward pass of a loss.
        replacements: Prompts for groups without signal, if they are to be replaced.
        callbacks: Returns the Trainer's callbacks.
    """

    def __init__(
        self,
        args: GRPOConfig,
        *,
        policy: Callable[[], PreTrainedModel],
        encoder: PromptEncoder,
        sources: Sequence[RewardSource],
        reference: Reference | None,
        accelerator: Accelerator,
        backward: Callable[[Tensor], None],
        replacements: ReplacementPrompts | None,
        callbacks: Callable[[], Sequence[TrainerCallback]],
    ) -> None:
        self.args = args
        self.policy = policy
        self.policy_version = PolicyVersion()
        self.metrics = Metrics()
        self.stopwatch = Stopwatch()
        self.steps_at_last_log = 0
        self.epoch_listener: EpochListener | None = None

        self.engine = build_engine(
            args,
            policy,
            encoder,
            autocast=lambda: accelerator.autocast(),
            seed=args.seed,
            trust_remote_code=args.trust_remote_code,
            float32_head=args.cast_lm_head_to_fp32,
        )
        self.collector = Collector(
            engine=self.engine,
            encoder=encoder,
            sources=sources,
            sampling=sampling_from(args),
            reward_settings=args,
            mask_truncated=args.mask_truncated_completions,
            stopwatch=self.stopwatch,
            replacements=replacements,
            max_resamples=args.max_resamples,
        )

        self.logprobs = LogProbs(
            args,
            temperature=self.collector.sampling.scored_temperature,
            repetition_penalty=self.collector.sampling.scored_penalty,
            rows_per_pass=args.per_device_train_batch_size,
            memory=ChunkMemory(
                args.max_tokens_per_chunk,
                deepspeed=accelerator.distributed_type.value == "DEEPSPEED",
            ),
        )
        self.reference_sync = None
        self.reference_state = None
        if isinstance(reference, FrozenCopy):
            reference.model = prepared_reference(
                reference.model, accelerator, rows=args.per_device_train_batch_size
            )
        if args.sync_ref_model and isinstance(reference, FrozenCopy | AdapterCopy):
            self.reference_sync = ReferenceSync(
                reference, alpha=args.ref_model_mixup_alpha, steps=args.ref_model_sync_steps
            )
        # Tensors that a resumed run could not rebuild from the model that it is given.
        if isinstance(reference, AdapterCopy) or self.reference_sync is not None:
            assert isinstance(reference, FrozenCopy | AdapterCopy)
            self.reference_state = ReferenceState(reference, keep=args.should_save)

        self.objective = objective_from(args, algorithm=args.algorithm)
        self.entropy_bonus = EntropyController(args)
        self.learner = Learner(
            args,
            accelerator,
            objective=self.objective,
            entropy_bonus=self.entropy_bonus,
            logprobs=self.logprobs,
            metrics=self.metrics,
            stopwatch=self.stopwatch,
            nonfinite_steps=NonFiniteSteps(
                skip=args.nonfinite_steps == "skip",
                decode=cast(Callable[[list[int]], str], encoder.tokenizer.decode),
            ),
            backward=backward,
        )
        self.optimizer_batches = OptimizerBatches(
            args,
            collector=self.collector,
            learner=self.learner,
            logprobs=self.logprobs,
            reference=reference,
            policy_version=self.policy_version,
            report=self.report,
        )
        self.completion_log = CompletionLog(
            args,
            args.output_dir,
            trackers=args.report_to or (),
            callbacks=callbacks,
            seed=args.seed,
        )

    @property
    def stateful_parts(self) -> dict[str, Stateful]:
        """Parts that hold state between steps, the same on all ranks."""
        parts: dict[str, Stateful] = {
            "entropy_bonus": self.entropy_bonus,
            "layouts": self.logprobs,
            "learner": self.learner,
            "policy_version": self.policy_version,
        }
        if self.reference_state is not None:
            parts["reference"] = self.reference_state
        return parts

    @property
    def stateful_parts_of_rank(self) -> dict[str, Stateful]:
        """Parts that hold state between steps, which differs from rank to rank."""
        return {
            "optimizer_batches": self.optimizer_batches,
            "metrics": self.metrics,
            "completions": self.completion_log,
        }

    def reset(self) -> None:
        """Forget what an interrupted training left behind."""
        self.optimizer_batches.reset()
        self.metrics.load_state_dict({})
        self.completion_log.reset()

    def report(self, collection: Collection, mode: Mode = "train") -> None:
        """Take the figures and completions of a collection into the logs.  Every rank must call."""
        names = [source.name for source in self.collector.sources]
        state = self.collector.trainer_state
        with distributed.raise_on_all_ranks("report the completions"):
            statistics = collection.statistics(names)
            records = collection.records(names)

        if mode == "train":
            written = [*collection.rollouts, *collection.dropped]
            tokens = sum(len(rollout.prompt.ids) + len(rollout.ids) for rollout in written)
            state.num_input_tokens_seen += int(distributed.all_reduce(torch.tensor(tokens)))
            statistics.maxima["num_tokens"] = float(state.num_input_tokens_seen)
            if self.collector.replacements is not None:
                dropped = (float(len(collection.dropped)), float(len(written)))
                statistics.means["signal/dropped"] = dropped

        self.metrics.add(statistics, mode=mode)
        self.completion_log.add(records, step=state.global_step, mode=mode)

    def figures_since_last_log(self, step: int) -> dict[str, float]:
        """Return what was counted since the last call, and write its completions.

        Every rank must call.
        """
        self.metrics.add(self.stopwatch.drain(steps=step - self.steps_at_last_log))
        self.steps_at_last_log = step
        figures = self.metrics.reduce(mode="train")
        self.completion_log.write(step=step, mode="train")
        return figures


class BetweenSteps(TrainerCallback):
    """A callback that moves, between steps, the state that the Trainer does not know of."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count from here."""
        self.stages.steps_at_last_log = state.global_step
        self.stages.collector.trainer_state = state  # the Trainer makes a new one for each training
        self.stages.completion_log.begin(state.global_step)
        self.stages.stopwatch.restart()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Order the rows of the epoch."""
        # The Trainer's own set_epoch does not reach a sampler behind accelerate's skipping one
        # after a resume.
        assert self.stages.epoch_listener is not None
        self.stages.epoch_listener.set_epoch(int(state.epoch or 0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell all parts that the policy has moved, and have the last step logged."""
        self.stages.policy_version.moved()
        self.stages.learner.end_step()
        if self.stages.reference_sync is not None:
            self.stages.reference_sync.after_step(self.stages.policy(), state.global_step)
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Release completions and close files."""
        self.stages.optimizer_batches.reset()
        self.stages.completion_log.close()
