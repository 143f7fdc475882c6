"""GRPOTrainer and GMPOTrainer: what `transformers.Trainer` asks, answered in the order in which it asks.

The Trainer carries the loop, optimizer, schedule, checkpoints, DeepSpeed, FSDP, hub and callbacks.  gmpo differs from
supervised training in two places: an optimizer step first sees that there are completions to train on
(`get_batch_samples`), and a micro-batch's gradient is taken chunk by chunk (`training_step`).
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    set_seed,
)

from gmpo import distributed
from gmpo.arguments import check_workers, known_arguments_only, refuse_later_arguments
from gmpo.checkpoint import Stateful, last_whole_checkpoint, load_state, save_state
from gmpo.collect import Collection, Collector
from gmpo.config import GMPOConfig, GRPOConfig
from gmpo.data.micro_batches import (
    carries_signal,
    carrying_together,
    mixed_seed,
    split_into_micro_batches,
)
from gmpo.data.resample import SpareRows
from gmpo.data.sampler import (
    CollectionPlan,
    CollectionSampler,
    EvalSampler,
    KeyedRows,
    Rows,
    StreamedRows,
    as_rows,
)
from gmpo.learn import Learner, MicroBatch
from gmpo.objective.entropy_bonus import EntropyController
from gmpo.objective.objective import objective_from
from gmpo.objective.types import Denominators
from gmpo.policy.load import check_path, is_adapted, load_policy, load_tokenizer
from gmpo.policy.logprobs import Scorer
from gmpo.policy.moe import is_mixture
from gmpo.policy.reference import FrozenCopy, ReferenceSync, make_reference, prepared_reference
from gmpo.report.completions import CompletionLog, ScoredCompletions
from gmpo.report.jsonl import JsonlCallback
from gmpo.report.metrics import Metrics, Mode, Stopwatch
from gmpo.report.model_card import model_card
from gmpo.report.rollouts import rollout_statistics
from gmpo.report.tables import set_tensorboard_folder
from gmpo.reward.advantages import reward_statistics
from gmpo.reward.reward_model import ModelOptions
from gmpo.reward.sources import FunctionReward, build_sources
from gmpo.rollout.build import build_engine
from gmpo.rollout.local.sampler import sampling_from
from gmpo.rollout.prompts.dataset import check_dataset
from gmpo.rollout.prompts.encoder import PromptEncoder
from gmpo.rollout.weights.version import PolicyVersion
from gmpo.types import Batch, Statistics


class GRPOTrainer(Trainer):
    """Trains a language model by group-relative policy optimization.

    Args:
        model: Name or path, or a `PreTrainedModel`, or a `PeftModel`.
        reward_funcs: A function (sync or async), a reward model (name, path or object), or a list of them.  A function
            is called with the keywords `prompts`, `completions`, `completion_ids`, every further dataset column,
            `trainer_state`, `log_extra` and `log_metric`, and returns a float or None for each completion.
        args: The options; None takes the defaults and the folder "{model}-{GRPO or GMPO}".
        train_dataset: Rows with a `prompt`, as text or as messages; map-style or iterable.
        eval_dataset: The same, or a dict of them.
        processing_class: The tokenizer (or a processor that holds one); None loads the model's.
        reward_processing_classes: Tokenizers of the reward models; None loads them.
        callbacks: Added to the Trainer's own.
        optimizers: (optimizer, scheduler); None builds them from `args`.
        quantization_config: For a model given by name or path.
        peft_config: Adapters to train instead of the whole model.
        compute_metrics: Gets the completions of an evaluation set (token ids, -100 on padding) as `predictions` and
            their rewards [N, F] as `label_ids`, and gives figures to log.

    Raises:
        ValueError, TypeError: For arguments that can't work, before any weight is loaded where it can be known.
    """

    args: Any  # a GRPOConfig, whose sizes and folders are settled
    config_class: type[GRPOConfig] = GRPOConfig
    algorithm_name = "GRPO"
    _tag_names = ("gmpo", "grpo")
    loss_is_scaled_for_ga = True  # denominators are those of the whole optimizer batch already

    @known_arguments_only
    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    ):
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        if not isinstance(model, str | nn.Module):
            raise TypeError(
                f"model={model!r} ({type(model).__name__}) is neither a name or path nor a model."
            )
        config: Any = self._checked_args(args, model)
        refuse_later_arguments(
            tools=tools, rollout_func=rollout_func, environment_factory=environment_factory
        )
        set_seed(config.seed)
        if isinstance(model, str):
            check_path(model)
        tokenizer = processing_class or tokenizer_of(model, config)
        self.encoder = PromptEncoder.build(tokenizer, model, config)
        check_dataset(train_dataset, self.encoder.form, name="train_dataset")
        check_workers(train_dataset, config.dataloader_num_workers)
        for name, rows in named_datasets(eval_dataset).items():
            check_dataset(rows, self.encoder.form, name=name)
        options = ModelOptions(
            init_kwargs=config.model_init_kwargs,
            trust_remote_code=config.trust_remote_code,
            chat_template_kwargs=config.chat_template_kwargs,
            device=config.device,
        )
        self.reward_sources = build_sources(
            reward_funcs, reward_processing_classes, settings=config, model_options=options
        )
        columns = getattr(self._kept_columns(train_dataset, config), "column_names", None)
        for source in self.reward_sources:
            if columns is not None and isinstance(source, FunctionReward):
                source.check_columns(columns)
        self.plan = CollectionPlan(
            config.num_generations, config.generation_batch_size, config.micro_steps_per_collection
        )
        if hasattr(train_dataset, "__len__"):
            self.plan.require(len(train_dataset))
        elif train_dataset is not None and config.zero_signal_groups == "resample":
            raise ValueError(
                "zero_signal_groups='resample' draws other prompts, which an iterable train_dataset can't give. "
                "Use a map-style dataset, or zero_signal_groups='skip'."
            )
        policy = load_policy(
            model, config, quantization_config=quantization_config, peft_config=peft_config
        )
        self.reference: Any = make_reference(policy, config.beta, sync=config.sync_ref_model)
        super().__init__(
            model=policy,
            args=config,
            data_collator=cast(Any, as_rows),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
        )
        if config.fsdp and not self.is_fsdp_enabled:
            warnings.warn(
                f"fsdp={config.fsdp!r} does nothing here: accelerate shards among several processes with accelerators, "
                f"and this is {config.world_size} on {config.device.type}. Each process holds the whole model.",
                stacklevel=3,  # past the check of the arguments
            )
        self._build_stages()

    @classmethod
    def _checked_args(cls, args: Any, model: Any) -> Any:
        if args is None:
            name = (
                model
                if isinstance(model, str)
                else getattr(model.config, "_name_or_path", "") or "model"
            )
            return cls.config_class(f"{name.rstrip('/').split('/')[-1]}-{cls.algorithm_name}")
        if not isinstance(args, cls.config_class):
            why = " Their clip windows don't mean the same." if isinstance(args, GRPOConfig) else ""
            raise TypeError(
                f"{cls.__name__} needs a {cls.config_class.__name__}, got a {type(args).__name__}.{why}"
            )
        if args.clip_window_is_inert and args.algorithm == "gmpo":
            warnings.warn(
                f"Each collection makes a single optimizer step (steps_per_generation={args.steps_per_generation}, "
                f"num_iterations={args.num_iterations}, "
                f"gradient_accumulation_steps={args.gradient_accumulation_steps}): the policy still is the one that "
                "sampled, every log-ratio is 0, and GMPO equals GRPO. For GMPO's clip window to act, set "
                "steps_per_generation to several times gradient_accumulation_steps.",
                stacklevel=4,  # past the check of the arguments
            )
        return args

    def _build_stages(self) -> None:
        args = self.args
        self.objective = objective_from(args, algorithm=args.algorithm)
        self.entropy_bonus = EntropyController(args)
        self.policy_version = PolicyVersion()
        self.sampling = sampling_from(args)
        self.metrics = Metrics()
        self.stopwatch = Stopwatch()
        self.scorer = Scorer(
            args,
            temperature=self.sampling.scored_temperature,
            repetition_penalty=self.sampling.scored_penalty,
        )
        if isinstance(self.reference, FrozenCopy):
            self.reference.model = prepared_reference(
                self.reference.model, self.accelerator, rows=args.per_device_train_batch_size
            )
        self.reference_sync = (
            ReferenceSync(
                self.reference, alpha=args.ref_model_mixup_alpha, steps=args.ref_model_sync_steps
            )
            if args.sync_ref_model
            else None
        )
        # the Trainer's own context of mixed precision is empty: accelerate puts it around the forward pass
        autocast: Any = self.accelerator.autocast
        self.engine = build_engine(args, self.unwrapped_policy, self.encoder, autocast=autocast)
        self.completion_log = CompletionLog(
            args,
            args.output_dir,
            trackers=args.report_to,
            callbacks=lambda: self.callback_handler.callbacks,
            seed=args.seed,
        )
        self.collector = Collector(
            engine=self.engine,
            encoder=self.encoder,
            sources=self.reward_sources,
            scorer=self.scorer,
            reward_settings=args,
            mask_truncated=args.mask_truncated_completions,
            stopwatch=self.stopwatch,
            precision=self.compute_loss_context_manager,
            rows_per_forward=args.per_device_train_batch_size,
            max_tokens_per_chunk=args.max_tokens_per_chunk,
            trainer_state=self.state,
        )
        self.learner = Learner(
            args,
            self.accelerator,
            objective=self.objective,
            entropy_bonus=self.entropy_bonus,
            scorer=self.scorer,
            metrics=self.metrics,
            entropy=self.collector.entropy,
            precision=self.compute_loss_context_manager,
            backward=self._backward,
            progress=lambda: self.state.global_step / max(1, self.state.max_steps),
            routed=args.router_aux_loss_coef > 0.0 and is_mixture(self.unwrapped_policy()),
        )
        self._num_parameters = sum(p.numel() for p in self.unwrapped_policy().parameters())
        self.spare_rows = (
            SpareRows(self._training_rows()) if args.zero_signal_groups == "resample" else None
        )
        self._pending: list[
            Batch
        ] = []  # micro-batches of the current collection, in the order of their micro-steps
        self._steps_at_last_log = 0
        set_tensorboard_folder(self.callback_handler.callbacks, args.logging_dir)
        self.add_callback(JsonlCallback)
        self.add_callback(BetweenSteps(self))

    def create_accelerator_and_postprocess(self) -> None:
        """With logits and sums of gradients in float32, which FSDP2 would round to what the layers compute in."""
        super().create_accelerator_and_postprocess()
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.accelerator.is_fsdp2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
            )

    def unwrapped_policy(self) -> Any:
        """The policy without DDP, DeepSpeed or compile around it."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)

    # -- data ---------------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt", "image", "images"]

    def get_train_dataloader(self) -> DataLoader:
        """This rank's share of a collection, once per micro-step."""
        args = self.args
        if self.train_dataset is None:
            raise ValueError("Training needs a train_dataset. Pass one to the trainer.")
        dataset = self._training_rows()
        seed = args.seed if args.data_seed is None else args.data_seed
        loader = self._loader_options()
        if hasattr(dataset, "__len__"):
            sampler = CollectionSampler(
                len(dataset),
                self.plan,
                ranks=args.world_size,
                seed=seed,
                shuffle=bool(args.shuffle_dataset),
            )
            self._epoch_listener = sampler
            loader |= {"dataset": KeyedRows(dataset), "batch_sampler": sampler}
        else:
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=seed)
            stream = StreamedRows(dataset, self.plan, ranks=args.world_size)
            self._epoch_listener = stream
            self.accelerator.dataloader_config.dispatch_batches = (
                False  # rows are dicts, not tensors to cut
            )
            loader |= {"dataset": stream, "batch_size": args.rows_per_rank, "drop_last": True}
        return self.accelerator.prepare(DataLoader(**loader))

    def _training_rows(self) -> Any:
        return self._kept_columns(self.train_dataset, self.args)

    @staticmethod
    def _kept_columns(dataset: Any, args: Any) -> Any:
        """`dataset` without the columns that gmpo does not read, where those are not wanted."""
        if not args.remove_unused_columns or dataset is None:
            return dataset
        return dataset.select_columns(
            [c for c in ("prompt", "image", "images") if c in dataset.column_names]
        )

    def _loader_options(self) -> dict[str, Any]:
        args = self.args
        return {
            "collate_fn": as_rows,
            "num_workers": args.dataloader_num_workers,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
            "pin_memory": False,  # rows hold no tensors
        }

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Every prompt of the evaluation set once, `eval_group_size` times in a row."""
        args = self.args
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset  # pyright: ignore
        if dataset is None:
            raise ValueError(
                "Evaluation needs an eval_dataset. Pass one to the trainer or to evaluate()."
            )
        rows = args.per_device_eval_batch_size * args.world_size
        plan = CollectionPlan(
            args.eval_group_size, max(rows - rows % args.eval_group_size, args.eval_group_size), 1
        )
        if not hasattr(dataset, "__len__"):
            dataset = list(dataset)
        sampler = EvalSampler(
            len(dataset),
            plan,
            rank=args.process_index,
            ranks=args.world_size,
            drop_last=args.dataloader_drop_last,
        )
        return DataLoader(KeyedRows(dataset), batch_sampler=sampler, **self._loader_options())

    # -- one optimizer step -------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Rows], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], None]:
        """The micro-batches of one optimizer step; makes a collection wherever one begins, or where none is at hand."""
        self.learner.begin_step()
        batches: list[Batch] = []
        collections = 0
        for number in range(num_batches):
            rows = next(epoch_iterator, None)
            if rows is None:
                break
            if rows.position == 0 or not self._pending:
                self._collect(rows, number=collections, remaining=num_batches - number)
                collections += 1
            batches.append(self._pending.pop(0))
        denominators = self._denominators(batches)
        return [MicroBatch(batch, d) for batch, d in zip(batches, denominators, strict=True)], None

    def _collect(self, rows: Rows, *, number: int, remaining: int) -> None:
        """Make a collection and cut it into micro-batches.

        Args:
            number: Of the collection within this optimizer step; with the step it names all of its random numbers.
            remaining: How many of its micro-batches belong to this optimizer step.
        """
        args = self.args
        seed = mixed_seed(args.seed, self.state.global_step, number)
        collection = self.collector.collect(
            rows,
            sampling=self.sampling,
            group_size=args.num_generations,
            seed=seed,
            version=self.policy_version.current,
            spare=self.spare_rows,
            max_resamples=args.max_resamples,
        )
        self._report(collection, mode="train")
        batch = collection.batch.to(args.device)
        slices = split_into_micro_batches(
            collection.batch.group,
            rows=args.per_device_train_batch_size,
            passes=args.num_iterations,
            seed=seed,
        )[rows.position :]
        slices = self._carrying_together(slices, batch, first=remaining)
        if self.reference is not None:
            self.collector.add_reference(self.reference, self.model_wrapped, batch)
        moved = slices[remaining:]
        if moved:
            later = torch.unique(torch.cat(moved))
            alone = distributed.world_size() == 1  # else ranks must run the model equally often
            if alone and self.learner.skips_silent_rows:
                later = later[carries_signal(batch)[later]]
            self.collector.add_old(self.model_wrapped, batch, later)
        parts = [batch.rows(index) for index in slices]
        for part in parts[:remaining]:
            part.old_logps = (
                None  # the policy has not moved yet: its own log-probs are the old ones
            )
        self._pending = parts

    def _carrying_together(self, slices: list[Tensor], batch: Batch, *, first: int) -> list[Tensor]:
        """Micro-batches without a row to skip, where that is exact, and others with nothing to do.

        It is not where a micro-batch has a denominator or a threshold of its own.
        """
        args = self.args
        own = args.top_entropy_quantile < 1.0 or (
            args.algorithm == "grpo" and args.loss_type == "bnpo"
        )
        if own or not self.learner.skips_silent_rows:
            return slices
        return carrying_together(
            slices, carries_signal(batch), first=first, window=args.gradient_accumulation_steps
        )

    def _denominators(self, batches: list[Batch]) -> list[Denominators]:
        counts = torch.tensor(
            [
                sum(len(b) for b in batches),
                sum(int(b.num_written.sum()) for b in batches),
                len(batches),
            ],
            dtype=torch.float64,
        )
        rows, tokens, micro_batches = distributed.reduced(counts).tolist()
        return [
            Denominators(
                rows=rows,
                tokens=tokens,
                micro_batch_tokens=float(b.num_written.sum()),
                micro_batches=micro_batches,
                max_completion_length=self.args.max_completion_length,
            )
            for b in batches
        ]

    def training_step(
        self, model: nn.Module, inputs: MicroBatch, num_items_in_batch: Any = None
    ) -> Tensor:
        """Add the gradient of one micro-batch.

        Returns:
            This rank's share of the loss of the optimizer batch, times the number of ranks (which are averaged over).
        """
        model.train()
        if callable(prepare := getattr(self.optimizer, "train", None)):  # a schedule-free optimizer
            prepare()
        with self.stopwatch.timed("learn"):
            total = self.learner.add_gradient(model, inputs)
            self.stopwatch.count_tokens("learn", int(inputs.batch.num_written.sum()))
        self._release_cache()
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The differentiable share of `inputs` in the loss of its optimizer batch, a scalar."""
        if return_outputs:
            raise ValueError(
                "gmpo's loss has no model outputs to return: call compute_loss with return_outputs=False."
            )
        loss, statistics = self.learner.loss(
            model, inputs, self.learner.select(model, inputs.batch)
        )
        if inputs.mode is not None:
            self.metrics.add(statistics, mode=inputs.mode)
        return loss

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

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Rows,
        prediction_loss_only: bool = True,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Generate and score one evaluation batch.  Its loss goes into the metrics, as an exact mean over rows.

        Returns:
            The loss of the batch; and, if there is a `compute_metrics` to get them, completion ids [n, T] (-100 on
            padding) as predictions and rewards [n, F] as labels.
        """
        args = self.args
        collection = self.collector.collect(
            inputs,
            sampling=self.sampling,
            group_size=args.eval_group_size,
            seed=mixed_seed(args.seed, -1, inputs.position),
            version=self.policy_version.current,
        )
        self._report(collection, mode="eval")
        batch = collection.batch.to(args.device)
        if self.reference is not None:
            self.collector.add_reference(self.reference, model, batch)
        (denominators,) = self._denominators([batch])
        total, seen = self.learner.value(model, MicroBatch(batch, denominators))
        seen.means["loss"] = (float(total) * denominators.rows, float(len(batch)))
        self.metrics.add(seen, mode="eval")
        loss = total.to(args.device)
        if prediction_loss_only or self.compute_metrics is None:
            return loss, None, None
        prompts = [torch.tensor(rollout.prompt.ids) for rollout in collection.rollouts]
        inputs.encoded[self.unwrapped_policy().main_input_name] = nn.utils.rnn.pad_sequence(
            prompts, True, -100, "left"
        )
        inside = (
            torch.arange(batch.mask.shape[1], device=batch.lengths.device) < batch.lengths[:, None]
        )
        predictions = batch.completion_ids.masked_fill(~inside, -100)
        return loss, predictions, collection.scored.rewards.to(args.device, torch.float32)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's loop, with our metrics among its own, so that `metric_for_best_model` can name any of them."""
        self.gather_function = (
            gathered_as_objects if self.args.eval_use_gather_object else distributed.gathered
        )
        with self.stopwatch.paused():
            output: Any = super().evaluation_loop(
                *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
            output.metrics.update(self.metrics.reduce(mode="eval", prefix=metric_key_prefix))
            self.completion_log.write(
                step=self.state.global_step, mode="eval", label=metric_key_prefix
            )
        return output

    # -- reports ------------------------------------------------------------------------------------------------------

    def _report(self, collection: Collection, *, mode: Mode) -> None:
        statistics = rollout_statistics(collection.rollouts)
        names = [source.name for source in self.reward_sources]
        statistics.update(reward_statistics(names, collection.all_rewards, collection.advantages))
        statistics.update(Statistics(means=collection.scored.metrics))
        if mode == "train":
            written = [*collection.rollouts, *collection.dropped]
            tokens = sum(len(rollout.prompt.ids) + len(rollout.ids) for rollout in written)
            self.state.num_input_tokens_seen += int(distributed.reduced(torch.tensor(tokens)))
            statistics.maxima["num_tokens"] = float(self.state.num_input_tokens_seen)
            if self.spare_rows is not None:
                statistics.means["signal/dropped"] = (
                    float(len(collection.dropped)),
                    float(len(written)),
                )
        self.metrics.add(statistics, mode=mode)
        self.completion_log.add(
            scored_completions(collection, names), step=self.state.global_step, mode=mode
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with everything that gmpo counted since the last time.  Every rank must call."""
        if "loss" in logs:
            self.metrics.add(
                self.stopwatch.drain(steps=self.state.global_step - self._steps_at_last_log)
            )
            self._steps_at_last_log = self.state.global_step
            logs.update(self.metrics.reduce(mode="train"))
            self.completion_log.write(step=self.state.global_step, mode="train")
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Six per parameter and token, as for every model; tokens are those of prompts and completions of each row."""
        if not isinstance(inputs, MicroBatch):
            return super().floating_point_ops(inputs)
        tokens = sum(len(ids) for ids in inputs.batch.prompt_ids) + int(inputs.batch.lengths.sum())
        return 6 * tokens * self._num_parameters

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Nothing: `_report` counts them, with or without `include_num_input_tokens_seen`."""

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write output_dir/README.md: what was trained, by which method, on which data."""
        if not self.is_world_process_zero():
            return
        text = model_card(
            algorithm=self.algorithm_name,
            base_model=getattr(self.unwrapped_policy().config, "_name_or_path", None),
            model_name=model_name
            or self.args.hub_model_id
            or os.path.basename(os.path.abspath(self.args.output_dir)),
            dataset_name=dataset_name or kwargs.get("dataset"),
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            args=self.args,
            log_history=self.state.log_history,
            adapter=is_adapted(self.unwrapped_policy()),
        )
        os.makedirs(self.args.output_dir, exist_ok=True)
        with open(os.path.join(self.args.output_dir, "README.md"), "w", encoding="utf-8") as file:
            file.write(text)

    # -- a run's life -------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train.  If something fails on the way, what was learned so far is left as a checkpoint in `output_dir`.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the last whole one in `output_dir`.
            trial: A hyper-parameter search's trial, or its parameters.
            ignore_keys_for_eval: As in `transformers.Trainer.train`.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except (Exception, KeyboardInterrupt) as error:
            self._save_what_was_learned(error)
            raise

    def _save_what_was_learned(self, error: BaseException) -> None:
        steps = self.state.global_step
        everybody_is_here = distributed.world_size() == 1 or getattr(
            error, "raised_on_every_rank", False
        )
        if not everybody_is_here or steps == 0 or self.optimizer is None:
            return
        folder = os.path.join(self.args.output_dir, f"checkpoint-{steps}")
        if not os.path.exists(os.path.join(folder, "trainer_state.json")):
            self._save_checkpoint(cast(nn.Module, self.model_wrapped), trial=None)
        error.add_note(
            f"What was learned in {steps} steps is in {folder}; train(resume_from_checkpoint=True) goes on."
        )

    @property
    def _stateful_parts(self) -> dict[str, Stateful]:
        """What holds state of its own between steps, the same on all ranks."""
        parts: dict[str, Stateful | None] = {
            "entropy_bonus": self.entropy_bonus,
            "layouts": self.scorer,
            "reference": self.reference_sync,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _save_rng_state(self, output_dir: str) -> None:
        """With the rest of what is saved before trainer_state.json, which tells that a checkpoint is whole."""
        super()._save_rng_state(output_dir)
        save_state(self._stateful_parts, output_dir, write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(self._stateful_parts, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.policy_version.moved()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.policy_version.moved()


class GMPOTrainer(GRPOTrainer):
    """Trains a language model by Geometric-Mean Policy Optimization (arXiv:2507.20673).

    Takes what `GRPOTrainer` takes, with a `GMPOConfig`, whose clip window is in log space.
    """

    config_class = GMPOConfig
    algorithm_name = "GMPO"
    _tag_names = ("gmpo",)


class BetweenSteps(TrainerCallback):
    """What has to happen between the Trainer's steps."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._steps_at_last_log = state.global_step
        self.trainer.collector.trainer_state = (
            state  # the Trainer makes a new one for each training
        )
        self.trainer.completion_log.begin(state.global_step)
        self.trainer.stopwatch.restart()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer's own set_epoch does not reach a sampler behind accelerate's skipping one after a resume.
        self.trainer._epoch_listener.set_epoch(int(state.epoch or 0))
        self.trainer._pending = []

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer.policy_version.moved()
        trainer.learner.end_step()
        if trainer.reference_sync is not None:
            trainer.reference_sync.after_step(trainer.unwrapped_policy(), state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._pending = []
        self.trainer.completion_log.close()


def scored_completions(collection: Collection, names: list[str]) -> ScoredCompletions:
    """This rank's rows of a collection, for the completion log."""
    rows = range(len(collection.rollouts))
    return ScoredCompletions(
        prompts=[rollout.prompt.source for rollout in collection.rollouts],
        completions=[rollout.completion for rollout in collection.rollouts],
        rewards={
            name: [float(collection.scored.rewards[i, f]) for i in rows]
            for f, name in enumerate(names)
        },
        advantages=collection.batch.advantages.tolist(),
        extras=collection.scored.extra,
    )


def tokenizer_of(model: Any, args: GRPOConfig) -> Any:
    """The tokenizer that belongs to a model given by name, path or object."""
    name = (
        model
        if isinstance(model, str)
        else getattr(getattr(model, "config", None), "_name_or_path", "")
    )
    if not name:
        raise ValueError(
            "The model does not say where its tokenizer is. Pass processing_class=AutoTokenizer...."
        )
    revision = (args.model_init_kwargs or {}).get("revision")  # pyright: ignore
    return load_tokenizer(name, trust_remote_code=args.trust_remote_code, revision=revision)


def named_datasets(eval_dataset: Any) -> dict[str, Any]:
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": rows for name, rows in eval_dataset.items()}
    return {"eval_dataset": eval_dataset}


def gathered_as_objects(values: Tensor) -> Tensor:
    return torch.cat(
        [part.to(values.device) for part in distributed.gathered_objects(values.cpu())]
    )
