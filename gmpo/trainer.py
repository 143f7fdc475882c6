"""GRPOTrainer and GMPOTrainer: what `transformers.Trainer` asks, answered in the order it asks.

The Trainer carries the loop, optimizer, schedule, DeepSpeed, FSDP, hub and callbacks;
`gmpo/run/resumable.py` carries checkpoints and signals.
gmpo differs from supervised training in two places: an optimizer step first sees that there are
completions to train on (`get_batch_samples`), and the gradient of a micro-batch is taken chunk by
chunk (`training_step`).
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    set_seed,
)

from gmpo import distributed
from gmpo.arguments import (
    check_datasets,
    check_reward_columns,
    check_tokens,
    checked_args,
    checked_model,
    known_arguments_only,
    refuse_later_arguments,
    reward_model_settings,
    tokenizer_of,
    usable_prompts,
    warn_if_nothing_is_sharded,
)
from gmpo.config import GMPOConfig, GRPOConfig
from gmpo.data.loaders import evaluation_dataset, evaluation_loader, kept_columns, training_loader
from gmpo.data.micro_batches import mixed_seed
from gmpo.data.resample import ReplacementPrompts
from gmpo.data.sampler import Rows, as_rows
from gmpo.hooks import refuse_unused_methods
from gmpo.learn import MicroBatch
from gmpo.policy.load import check_path, load_policy
from gmpo.policy.reference import make_reference
from gmpo.report.jsonl import JsonlCallback
from gmpo.report.model_card import write_model_card
from gmpo.report.tables import set_tensorboard_folder
from gmpo.reward.sources import build_sources
from gmpo.rollout.prompts.encoder import PromptEncoder
from gmpo.run.folder import refuse_folder_of_model
from gmpo.run.resumable import ResumableTrainer, WholeSteps
from gmpo.sharding import keep_sums_in_float32
from gmpo.stages import BetweenSteps, Stages
from gmpo.types import AnyDataset, Statistics
from gmpo.unwrap import is_adapted

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin


class GRPOTrainer(ResumableTrainer):
    """Trains a language model by group-relative policy optimization.

    Args:
        model: Name or path, or a `PreTrainedModel`, or a `PeftModel`.
        reward_funcs: A function (sync or async), a reward model (name, path or object), a built-in
            name, or a list of them.  A function is called with the keywords `prompts`,
            `completions`, `completion_ids`, every further dataset column, `trainer_state`,
            `log_extra` and `log_metric`, and returns a float or None for each completion.
        args: The options; None takes the defaults and the folder "{model}-{GRPO or GMPO}".
        train_dataset: Rows with a `prompt`, as text or as messages; map-style or iterable.
        eval_dataset: The same, or a dict of them.
        processing_class: The tokenizer, or a processor that holds one; None loads the model's.
        reward_processing_classes: Tokenizers of the reward models; None loads them.
        callbacks: Added to the Trainer's own.
        optimizers: (optimizer, scheduler); None builds them from `args`.
        quantization_config: For a model given by name or path.
        peft_config: Adapters to train instead of the whole model.
        compute_metrics: Gets the completions of an evaluation set (token ids, -100 on padding) as
            `predictions` and their rewards [N, F] as `label_ids`, and returns figures to log.

    A subclass may override the methods that `gmpo.hooks.HOOKS` lists, `compute_loss` among them.
    Methods that other trainers call and gmpo does not are refused when the class is defined.

    Raises:
        ValueError, TypeError: For arguments that can't work, before any weight is loaded where it
            can be known.
    """

    config_class: type[GRPOConfig] = GRPOConfig
    algorithm_name = "GRPO"
    _tag_names = ("gmpo", "grpo")
    loss_is_scaled_for_ga = True  # denominators are those of the whole optimizer batch already

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        refuse_unused_methods(cls, GRPOTrainer)

    @known_arguments_only
    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | Mapping[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: object = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: "QuantizationConfigMixin | dict[str, Any] | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: object = None,
        rollout_func: object = None,
        environment_factory: object = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    ):
        # Everything that can be wrong is checked before weights are loaded.
        model = checked_model(model)
        args = checked_args(args, self.config_class, model, trainer=type(self).__name__)
        refuse_later_arguments(
            tools=tools, rollout_func=rollout_func, environment_factory=environment_factory
        )
        refuse_folder_of_model(model, args.output_dir)
        set_seed(args.seed)
        if isinstance(model, str):
            check_path(model)

        tokenizer = tokenizer_of(processing_class, model, args)
        self.encoder = PromptEncoder.build(tokenizer, cast(PreTrainedModel, model), args)
        check_tokens(self.encoder)
        train_dataset, eval_dataset = usable_prompts(train_dataset, eval_dataset, self.encoder)
        self.collection_size = check_datasets(train_dataset, args)

        self.reward_sources = build_sources(
            reward_funcs,
            reward_processing_classes,
            settings=args,
            model_settings=reward_model_settings(args),
        )
        check_reward_columns(self.reward_sources, train_dataset, args)

        policy = load_policy(
            model,
            args,
            quantization_config=quantization_config,
            peft_config=peft_config,
            device=args.device,
        )
        self.reference = make_reference(policy, args.beta, sync=args.sync_ref_model)
        super().__init__(
            model=policy,
            args=args,
            data_collator=cast(Any, as_rows),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class or tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
        )
        warn_if_nothing_is_sharded(args, is_sharded=self.is_fsdp_enabled)
        self._build_stages()

    def _build_stages(self) -> None:
        replacements = None
        if self.args.zero_signal_groups == "resample":
            replacements = ReplacementPrompts(self._kept(self.train_dataset))

        self.stages = Stages(
            self.args,
            policy=self.unwrapped_policy,
            encoder=self.encoder,
            sources=self.reward_sources,
            reference=self.reference,
            accelerator=self.accelerator,
            backward=self._backward,
            replacements=replacements,
            callbacks=lambda: self.callback_handler.callbacks,
        )
        self.stages.collector.trainer_state = self.state
        self._num_parameters = sum(p.numel() for p in self.unwrapped_policy().parameters())

        set_tensorboard_folder(self.callback_handler.callbacks, self.args.logging_dir)
        self.add_callback(JsonlCallback)
        # First of all, so that what fails in another callback finds a whole step.
        self.callback_handler.callbacks[:0] = [BetweenSteps(self.stages), WholeSteps(self)]

    def create_accelerator_and_postprocess(self) -> None:
        """Keep logits and sums of gradients in float32, which FSDP2 would round."""
        super().create_accelerator_and_postprocess()
        keep_sums_in_float32(self.accelerator)

    def unwrapped_policy(self) -> PreTrainedModel:
        """Return the policy without DDP, DeepSpeed or compile around it; a PeftModel stays one."""
        model: Any = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        return model

    # -- data ------------------------------------------------------------------------------------

    def _kept(self, dataset: Any) -> Any:
        """Return a dataset with the columns that the options leave it."""
        return kept_columns(dataset, remove_unused=bool(self.args.remove_unused_columns))

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of this rank's share of each collection, once per micro-step."""
        if self.train_dataset is None:
            raise ValueError("Training needs a train_dataset. Pass one to the trainer.")
        loader, self.stages.epoch_listener = training_loader(
            self._kept(self.train_dataset),
            self.collection_size,
            self.args,
            shuffle=bool(self.args.shuffle_dataset),
        )
        # Rows of a stream are dicts, which accelerate can't cut for the ranks as it cuts tensors.
        if not hasattr(self.train_dataset, "__len__"):
            self.accelerator.dataloader_config.dispatch_batches = False
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return a loader of every prompt of a set, `eval_group_size` times in a row."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            _, eval_dataset = usable_prompts(None, eval_dataset, self.encoder)
        return evaluation_loader(
            self._kept(evaluation_dataset(eval_dataset, self.eval_dataset)),
            group_size=self.args.eval_group_size,
            rows_per_rank=self.args.per_device_eval_batch_size,
            args=self.args,
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return a loader of `test_dataset`, as of an evaluation set."""
        return self.get_eval_dataloader(test_dataset)

    # -- one optimizer step ----------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Rows], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], None]:
        """Return the micro-batches of one optimizer step; make a collection where one begins."""
        if self.is_finished:
            return [], None
        rows = self.with_random_state(epoch_iterator)
        with self.stop_signals.raising(at_once=distributed.world_size() == 1):
            batches = self.stages.optimizer_batches.next(
                cast(nn.Module, self.model_wrapped), rows, num_batches, step=self.state.global_step
            )
        return batches, None

    def training_step(  # pyright: ignore[reportIncompatibleMethodOverride] (a micro-batch is no dict)
        self, model: nn.Module, inputs: MicroBatch, num_items_in_batch: object = None
    ) -> Tensor:
        """Add the gradient of one micro-batch.

        Returns:
            This rank's share of the loss of the optimizer batch, times the number of ranks (which
            are averaged over).
        """
        model.train()
        if callable(prepare := getattr(self.optimizer, "train", None)):  # a schedule-free optimizer
            prepare()

        with self.stages.stopwatch.timed("learn"):
            if self._loss_is_overridden:
                total = self._overridden_loss(model, inputs) * distributed.world_size()
                self._backward(total)
                total = total.detach()
            else:
                total = self.stages.learner.add_gradient(model, inputs, progress=self._progress())
            num_tokens = int(inputs.batch.num_completion_tokens.sum())
            self.stages.stopwatch.count_tokens("learn", num_tokens)

        self._release_cache()
        return total

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | Tensor | None = None) -> Any:
        """Return the norm of the step's gradient, right before the optimizer's step.

        A step that is not finite ends the run here, or loses its gradient.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.stages.learner.is_finite(model, norm):
            return 0.0
        return norm

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride] (a micro-batch is no dict)
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: object = None,
    ) -> Tensor:
        """Return the differentiable share of `inputs` in the loss of its optimizer batch.

        Shares add up over micro-batches and ranks: `inputs.denominators` counts the optimizer
        batch.  An override is called once per micro-batch, in training and in evaluation, and may
        add to `super().compute_loss(model, inputs)`; then a micro-batch goes through the model as
        a whole, and not in chunks.
        """
        if return_outputs:
            raise ValueError(
                "gmpo's loss has no model outputs to return: call compute_loss with "
                "return_outputs=False."
            )
        learner = self.stages.learner
        inputs, select = learner.with_selection(model, inputs)
        loss, statistics = learner.loss(model, inputs, select, progress=self._progress())
        if inputs.mode is not None:
            learner.count(model, inputs, len(inputs.batch), statistics)
        return loss

    @property
    def _loss_is_overridden(self) -> bool:
        function = getattr(self.compute_loss, "__func__", self.compute_loss)
        return function is not GRPOTrainer.compute_loss

    def _overridden_loss(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        loss = self.compute_loss(model, inputs)
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            got = (
                f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            )
            raise TypeError(f"compute_loss returned {got}. Return the loss, a scalar tensor.")
        return loss

    def _progress(self) -> float:
        """Return the share of the training that is done, in [0, 1]."""
        return self.state.global_step / max(1, self.state.max_steps)

    def _backward(self, loss: Tensor) -> None:
        options: dict[str, Any] = {}
        if self.is_deepspeed_enabled:
            options["scale_wrt_gas"] = False
        if self.args.optim in ("lomo", "adalomo"):
            options["learning_rate"] = self._get_learning_rate()
        self.accelerator.backward(loss, **options)

    def _release_cache(self) -> None:
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0 and torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- evaluation ------------------------------------------------------------------------------

    def prediction_step(  # pyright: ignore[reportIncompatibleMethodOverride] (rows are no dict)
        self,
        model: nn.Module,
        inputs: Rows,
        prediction_loss_only: bool = True,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Generate and score one evaluation batch; its loss counts by rows in the metrics.

        Returns:
            The loss of the batch; and, unless only that is wanted, completion ids [n, T] (-100 on
            padding) as predictions and rewards [n, F] as labels.
        """
        collection = self.stages.collector.collect(
            inputs,
            group_size=self.args.eval_group_size,
            seed=mixed_seed(self.args.seed, -1, inputs.micro_step),
            version=self.stages.policy_version.current,
        )
        self.stages.report(collection, mode="eval")

        batch = collection.batch.to(self.args.device)
        self.stages.optimizer_batches.add_reference(model, batch)
        (denominators,) = self.stages.optimizer_batches.denominators([batch])
        total = self._evaluation_loss(model, MicroBatch(batch, denominators, mode="eval"))
        loss = total.to(self.args.device)
        if prediction_loss_only:
            return loss, None, None

        # The Trainer looks for the prompts among the inputs, under the model's name for them.
        inputs.encoded[self.unwrapped_policy().main_input_name] = collection.prompts_for_metrics()
        predictions = collection.predictions_for_metrics().to(self.args.device)
        return loss, predictions, collection.scored.rewards.to(self.args.device, torch.float32)

    @torch.no_grad()
    def _evaluation_loss(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        """Return the loss of an evaluation batch, a scalar, and count it for the log."""
        seen = Statistics()
        if not self._loss_is_overridden:
            learner = self.stages.learner
            total, seen = learner.value(model, inputs, progress=self._progress())
        elif len(inputs.batch):
            total = self._overridden_loss(model, inputs)
        else:  # another rank has the last rows
            total = torch.zeros(())

        rows = float(len(inputs.batch))
        seen.means["loss"] = (float(total) * inputs.denominators.num_rows, rows)
        self.stages.metrics.add(seen, mode="eval")
        return total

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Run the Trainer's loop, and put our metrics among its own for `metric_for_best_model`."""
        self.gather_function = distributed.all_gather
        if self.args.eval_use_gather_object:
            self.gather_function = distributed.all_gather_as_objects

        with self.stages.stopwatch.paused():
            output: Any = super().evaluation_loop(
                *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
            output.metrics.update(self.stages.metrics.reduce(mode="eval", prefix=metric_key_prefix))
            step = self.state.global_step
            self.stages.completion_log.write(step=step, mode="eval", label=metric_key_prefix)
        return output

    # -- reports ---------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with everything that gmpo counted since the last time.  Every rank must call."""
        if "loss" in logs:
            logs.update(self.stages.figures_since_last_log(self.state.global_step))
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: MicroBatch | dict[str, Any]) -> int:
        """Count six per parameter and token, over prompts and completions of all rows."""
        if not isinstance(inputs, MicroBatch):
            return super().floating_point_ops(inputs)
        batch = inputs.batch
        tokens = sum(len(ids) for ids in batch.prompt_ids) + int(batch.lengths.sum())
        return 6 * tokens * self._num_parameters

    def _track_num_input_tokens(self, inputs: object) -> None:
        """Do nothing: `Stages.report` counts them, whatever `include_num_input_tokens_seen` is."""

    def create_model_card(  # pyright: ignore[reportIncompatibleMethodOverride] (as other RL trainers do)
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write output_dir/README.md: what was trained, by which method, on which data."""
        if not self.is_world_process_zero():
            return
        policy = self.unwrapped_policy()
        write_model_card(
            self.args.output_dir,
            algorithm=self.algorithm_name,
            base_model=getattr(policy.config, "_name_or_path", None),
            model_name=model_name or self.args.hub_model_id,
            dataset_name=dataset_name or kwargs.get("dataset"),
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            args=self.args,
            log_history=self.state.log_history,
            adapter=is_adapted(policy),
        )


class GMPOTrainer(GRPOTrainer):
    """Trains a language model by Geometric-Mean Policy Optimization (arXiv:2507.20673).

    Takes what `GRPOTrainer` takes, with a `GMPOConfig`, whose clip window is in log space.
    """

    config_class = GMPOConfig
    algorithm_name = "GMPO"
    _tag_names = ("gmpo",)
