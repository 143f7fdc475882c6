"""field -> how it is seen to act, or to be refused.  One row for every option."""

from typing import Any

from tests.options import checks
from tests.options import observables as o
from tests.options.rows import Acts, Checked, Refused, Row

MOVED = {"epsilon": 0.01}  # a window that log-ratios leave in the second step
COSINE = {"lr_scheduler_type": "cosine_with_min_lr"}
SGD = {"optim": "sgd"}
PADDED = {"batch_layout": "padded"}
KL = {"beta": 0.1}
SYNCED = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}
ADAPTIVE = {"entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": 5.0}
TRUNCATE = {"vllm_importance_sampling_mode": "token_truncate"}
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 0.1,
}
WITHOUT_VLLM = "would do nothing. Set use_vllm=True"
EXCEPTIONS = {  # field -> (a value, why nothing can be felt of it); only what no Trainer reads belongs here
    "do_train": (
        True,
        "for the user's own script: no Trainer reads it, and the config keeps it for the script",
    ),
    "do_eval": (
        True,
        "for the user's own script: the Trainer evaluates by eval_strategy, which sets it",
    ),
    "do_predict": (
        True,
        "for the user's own script: no Trainer reads it, and the config keeps it for the script",
    ),
    "local_rank": (
        0,
        "old launchers put it on the command line; the rank itself is taken from the environment",
    ),
}


def draws(run: Any) -> int:
    """How often completions were scored."""
    return len(run.calls)


# -- our own options, by stage -----------------------------------------------------------------------------------------

DATA: dict[str, Row] = {
    "num_generations": Acts(2, lambda run: len(o.prompts(run)), to=8),
    "num_generations_eval": Acts(1, o.collected, to=[3], scenario="evaluate"),
    "generation_batch_size": Acts(32, o.collected, to=[32], given={"steps_per_generation": None}),
    "steps_per_generation": Acts(1, o.collected, to=[8, 8]),
    "num_iterations": Acts(2, o.collected, to=[8], given={"steps_per_generation": 1}),
    "shuffle_dataset": Acts(False, o.prompts, to=[[5], [5, 6], [5, 6, 7], [5, 6, 7, 8]]),
    "zero_signal_groups": Acts("keep", o.training_shapes, scenario="even"),
    "max_resamples": Acts(1, draws, scenario="even", given={"zero_signal_groups": "resample"}),
}
REWARD: dict[str, Row] = {
    "reward_weights": Acts([0.0, 1.0], o.advantages, scenario="two rewards"),
    "multi_objective_aggregation": Acts("normalize_then_sum", o.advantages, scenario="two rewards"),
    "scale_rewards": Acts("none", o.advantages),
    "reward_workers": Checked(checks.reward_workers),
    "reward_timeout": Checked(checks.reward_timeout),
    "reward_memory_limit": Checked(checks.reward_memory_limit),
}
POLICY: dict[str, Row] = {
    "model_init_kwargs": Acts(
        {"dtype": "bfloat16"},
        lambda run: str(run.trainer.model.dtype),
        to="torch.bfloat16",
        scenario="by path",
    ),
    "trust_remote_code": Checked(checks.trust_remote_code),
    "disable_dropout": Acts(True, o.weights, scenario="dropout"),
    "cast_lm_head_to_fp32": Acts(
        True,
        lambda run: str(run.trainer.model.lm_head.weight.dtype),
        to="torch.float32",
        scenario="half",
    ),
    "router_aux_loss_coef": Acts(1.0, o.weights, scenario="mixture"),
    "pad_to_multiple_of": Acts(
        16, lambda run: {shape[1] % 16 for shape in o.training_shapes(run)}, to={0}, given=PADDED
    ),
    "batch_layout": Acts(
        "packed", lambda run: {shape[0] for shape in o.training_shapes(run)}, to={1}, given=PADDED
    ),
    "max_tokens_per_chunk": Acts(20, lambda run: len(o.training_shapes(run))),
    "nonfinite_steps": Acts("skip", o.has("nonfinite_steps"), to=True),
    "sync_ref_model": Checked(checks.sync_ref_model),
    "ref_model_mixup_alpha": Acts(1.0, o.reference, to=o.weights, given=SYNCED),
    "ref_model_sync_steps": Acts(2, o.reference, given=SYNCED),
}
OBJECTIVE: dict[str, Row] = {
    "loss_type": Acts("dr_grpo", o.weights, scenario="grpo", given=SGD),
    "beta": Acts(0.1, o.has("kl"), to=True),
    "epsilon": Acts(0.01, o.weights),
    "epsilon_high": Acts(0.01, o.weights),
    "delta": Acts(0.02, o.weights, given=MOVED),
    "importance_sampling_level": Acts("sequence", o.weights, given=MOVED),
    "mean_power": Acts(1.0, o.weights),
    "mean_power_final": Acts(1.0, o.weights),
    "sapo_temperature_neg": Acts(2.0, o.weights, scenario="grpo", given={"loss_type": "sapo"}),
    "sapo_temperature_pos": Acts(2.0, o.weights, scenario="grpo", given={"loss_type": "sapo"}),
    "vespo_k_pos": Acts(1.0, o.weights, scenario="grpo", given={"loss_type": "vespo"}),
    "vespo_lambda_pos": Acts(1.0, o.weights, scenario="grpo", given={"loss_type": "vespo"}),
    "vespo_k_neg": Acts(1.0, o.weights, scenario="grpo", given={"loss_type": "vespo"}),
    "vespo_lambda_neg": Acts(1.0, o.weights, scenario="grpo", given={"loss_type": "vespo"}),
    "top_entropy_quantile": Acts(0.5, o.weights),
    "mask_truncated_completions": Acts(True, o.weights),
    "off_policy_mask_threshold": Acts(0.0, o.weights),
    "use_bias_correction_kl": Acts(True, o.weights, given=KL),
    "entropy_coef": Acts(0.1, o.weights),
    "use_adaptive_entropy": Acts(True, o.weights, given={"entropy_coef": 0.1}),
    "entropy_coef_min": Acts(0.5, o.weights, given=ADAPTIVE),
    "entropy_coef_max": Acts(0.01, o.weights, given=ADAPTIVE),
    "entropy_coef_delta": Acts(0.5, o.weights, given=ADAPTIVE),
    "entropy_target": Acts(0.0, o.weights, given=ADAPTIVE),
    "vllm_importance_sampling_correction": Acts(False, o.weights, scenario="drifted"),
    "vllm_importance_sampling_mode": Acts("sequence_mask", o.weights, scenario="drifted"),
    "vllm_importance_sampling_clip_max": Acts(1.01, o.weights, scenario="drifted"),
    "vllm_importance_sampling_clip_min": Acts(0.99, o.weights, scenario="drifted"),
    "vllm_importance_sampling_cap": Acts(1.01, o.weights, scenario="drifted", given=TRUNCATE),
}
ROLLOUT: dict[str, Row] = {
    "max_completion_length": Acts(3, o.longest, to=3),
    "temperature": Acts(0.2, o.completions),
    "top_p": Acts(0.3, o.completions),
    "logps_support": Acts("full", o.weights, given={"top_k": 8}),
    "top_k": Acts(1, lambda run: len({tuple(ids) for ids in o.completions(run)[:4]}), to=1),
    "min_p": Acts(0.9, o.completions),
    "repetition_penalty": Acts(5.0, o.completions),
    "generation_kwargs": Acts({"max_new_tokens": 2}, o.longest, to=2),
    "chat_template_kwargs": Acts({"polite": True}, o.prompts, scenario="messages"),
    "overlong_prompts": Acts(
        "truncate_left",
        o.prompts,
        to=[[5], [5, 6], [5, 6, 7], [6, 7, 8]],
        scenario="short context",
        given={"shuffle_dataset": False},
    ),
    "generation_engine": Acts("generate", o.engine, to="GenerateEngine"),
    "cache_implementation": Acts(
        "static", o.caches, to=["StaticCache"], given={"generation_engine": "generate"}
    ),
    "use_transformers_continuous_batching": Acts(True, o.engine, to="ContinuousEngine"),
    "transformers_continuous_batching_config": Checked(checks.continuous_batching_config),
    "use_transformers_paged": Acts(True, o.engine, to="ContinuousEngine"),
    "ds3_gather_for_generation": Checked(checks.ds3_gather_for_generation),
    "max_tool_calling_iterations": Refused(3, "not available yet"),
    "use_vllm": Checked(checks.use_vllm),
    "vllm_mode": Refused("server", WITHOUT_VLLM),
    "vllm_model_impl": Refused("auto", WITHOUT_VLLM),
    "vllm_enable_sleep_mode": Refused(True, WITHOUT_VLLM),
    "vllm_structured_outputs_regex": Refused("a+", WITHOUT_VLLM),
    "vllm_server_base_url": Refused("http://a:1", WITHOUT_VLLM),
    "vllm_server_addresses": Refused(["http://a:1"], WITHOUT_VLLM),
    "vllm_server_host": Refused("a", WITHOUT_VLLM),
    "vllm_server_port": Refused(1, WITHOUT_VLLM),
    "vllm_server_timeout": Refused(1.0, WITHOUT_VLLM),
    "vllm_server_reconnect": Refused(1.0, WITHOUT_VLLM),
    "vllm_group_port": Refused(1, WITHOUT_VLLM),
    "vllm_weight_transfer": Refused("file", WITHOUT_VLLM),
    "vllm_weight_folder": Refused("weights", WITHOUT_VLLM),
    "vllm_publication_tolerance": Refused(0.5, WITHOUT_VLLM),
    "vllm_gpu_memory_utilization": Refused(0.5, WITHOUT_VLLM),
    "vllm_max_model_length": Refused(64, WITHOUT_VLLM),
    "vllm_tensor_parallel_size": Refused(2, WITHOUT_VLLM),
    "vllm_engine_kwargs": Refused({"enforce_eager": True}, WITHOUT_VLLM),
}
REPORT: dict[str, Row] = {
    "log_completions": Acts(
        True, lambda run: any("completions/train_" in name for name in o.files(run)), to=True
    ),
    "num_completions_to_print": Acts(0, o.printed, given={"log_completions": True}),
    "log_unique_prompts": Checked(checks.log_unique_prompts),
    "log_completions_hub_repo": Checked(checks.log_completions_hub_repo),
    "log_multimodal": Refused(False, "not available yet"),
}

# -- those of transformers.TrainingArguments ---------------------------------------------------------------------------

SCHEDULE: dict[str, Row] = {
    "num_train_epochs": Acts(1.0, o.steps, to=2, scenario="epochs"),
    "max_steps": Acts(1, o.steps, to=1),
    "learning_rate": Acts(1e-3, o.rates, to=[1e-3, 5e-4]),
    "lr_scheduler_type": Acts("constant", o.rates, to=[1e-2, 1e-2]),
    "lr_scheduler_kwargs": Acts(
        {"min_lr": 9e-3},
        o.rates,
        to=[1e-2, 9.5e-3],
        given=COSINE | {"lr_scheduler_kwargs": {"min_lr": 0.0}},
    ),
    "warmup_steps": Acts(2, o.rates, to=[0.0, 5e-3]),
    "warmup_ratio": Acts(1.0, o.rates, to=[0.0, 5e-3]),
    "optim": Acts("adagrad", o.optimizer, to="Adagrad"),
    "optim_args": Acts("momentum=0.9", o.weights, given=SGD),
    "optim_target_modules": Refused(["q_proj"], "optim_target_modules=.*optim='adamw"),
    "weight_decay": Acts(0.5, o.weights),
    "adam_beta1": Acts(0.1, o.weights),
    "adam_beta2": Acts(0.1, o.weights),
    "adam_epsilon": Acts(1.0, o.weights),
    "max_grad_norm": Acts(0.01, o.weights, given=SGD),
    "per_device_train_batch_size": Acts(4, o.collected, to=[8]),
    "gradient_accumulation_steps": Acts(2, o.collected, to=[16, 16]),
    "average_tokens_across_devices": Refused(False, "whole optimizer batch"),
    "label_smoothing_factor": Refused(0.1, "no labels"),
    "label_names": Refused(["x"], "no labels"),
    "train_sampling_strategy": Refused("sequential", "shuffle_dataset"),
    "length_column_name": Refused("n", "prompt by prompt"),
    "auto_find_batch_size": Refused(True, "max_tokens_per_chunk"),
    "seed": Acts(7, o.completions),
    "data_seed": Acts(7, o.prompts),
    "full_determinism": Checked(checks.full_determinism),
}
MODEL: dict[str, Row] = {
    "bf16": Acts(True, o.losses),
    "fp16": Refused(True, "fp16"),
    "bf16_full_eval": Acts(
        True, lambda run: str(run.trainer.model.dtype), to="torch.bfloat16", scenario="evaluate"
    ),
    "fp16_full_eval": Acts(
        True, lambda run: str(run.trainer.model.dtype), to="torch.float16", scenario="evaluate"
    ),
    "tf32": Checked(checks.tf32),
    "gradient_checkpointing": Acts(True, o.layer_passes, to=o.twice_the_layer_passes),
    "gradient_checkpointing_kwargs": Checked(checks.gradient_checkpointing_kwargs),
    "torch_compile": Checked(checks.torch_compile),
    "torch_compile_backend": Checked(checks.torch_compile_backend),
    "torch_compile_mode": Checked(checks.torch_compile_mode),
    "use_liger_kernel": Checked(checks.use_liger_kernel),
    "liger_kernel_config": Refused({"rope": False}, "liger_kernel_config=.*use_liger_kernel"),
    "use_cache": Acts(True, lambda run: run.trainer.model.config.use_cache, to=True),
    "neftune_noise_alpha": Acts(5.0, o.weights),
    "torch_empty_cache_steps": Checked(checks.torch_empty_cache_steps),
    "use_cpu": Checked(checks.use_cpu),
}
LOGS: dict[str, Row] = {
    "logging_strategy": Acts("no", o.logged_steps, to=[]),
    "logging_steps": Acts(2, o.logged_steps, to=[2]),
    "logging_first_step": Acts(True, o.logged_steps, to=[1, 2], given={"logging_steps": 2}),
    "logging_nan_inf_filter": Checked(checks.logging_nan_inf_filter),
    "logging_dir": Checked(checks.logging_dir),
    "include_num_input_tokens_seen": Acts("all", o.has("num_input_tokens_seen"), to=True),
    "log_level": Checked(checks.log_level),
    "log_level_replica": Checked(checks.log_level_replica),
    "log_on_each_node": Checked(checks.log_on_each_node),
    "disable_tqdm": Acts(False, lambda run: "ProgressCallback" in o.callbacks(run), to=True),
    "report_to": Acts(
        "tensorboard", lambda run: "TensorBoardCallback" in o.callbacks(run), to=True
    ),
    "run_name": Checked(checks.run_name),
    "project": Checked(checks.project),
    "trackio_space_id": Checked(checks.trackio_space_id),
    "trackio_bucket_id": Checked(checks.trackio_bucket_id),
    "trackio_static_space_id": Checked(checks.trackio_static_space_id),
    "skip_memory_metrics": Acts(False, checks.counts_memory, to=True),
    "debug": Checked(checks.debug),
}
EVALUATION: dict[str, Row] = {
    "eval_strategy": Acts(
        "epoch", o.evaluated_steps, to=[2], scenario="eval", given={"eval_strategy": "no"}
    ),
    "eval_steps": Acts(2, o.evaluated_steps, to=[2], scenario="eval"),
    "eval_delay": Acts(2, o.evaluated_steps, to=[2], scenario="eval"),
    "eval_on_start": Acts(True, o.evaluated_steps, to=[0, 1, 2], scenario="eval"),
    "per_device_eval_batch_size": Acts(2, o.collected, to=[2, 2, 2], scenario="evaluate"),
    "prediction_loss_only": Acts(
        True, lambda run: "eval_predictions" in run.evaluation, to=False, scenario="evaluate"
    ),
    "eval_do_concat_batches": Acts(
        False, lambda run: run.evaluation["eval_predictions"], to=2, scenario="evaluate"
    ),
    "eval_use_gather_object": Checked(checks.eval_use_gather_object),
    "eval_accumulation_steps": Checked(checks.eval_accumulation_steps),
    "include_for_metrics": Checked(checks.include_for_metrics),
    "batch_eval_metrics": Refused(True, "whole evaluation set"),
}
SAVING: dict[str, Row] = {
    "output_dir": Checked(checks.output_dir),
    "save_strategy": Acts(
        "epoch",
        o.checkpoints,
        to=["checkpoint-2"],
        scenario="epochs",
        given={"num_train_epochs": 1},
    ),
    "save_steps": Acts(2, o.checkpoints, to=["checkpoint-2"], scenario="saving"),
    "save_total_limit": Acts(1, o.checkpoints, to=["checkpoint-2"], scenario="saving"),
    "save_only_model": Acts(
        True,
        lambda run: any("optimizer" in name for name in o.files(run)),
        to=False,
        scenario="saving",
    ),
    "save_on_each_node": Checked(checks.save_on_each_node),
    "enable_jit_checkpoint": Acts(
        True, lambda run: "JITCheckpointCallback" in o.callbacks(run), to=True, scenario="built"
    ),
    "load_best_model_at_end": Acts(
        True,
        o.weights,
        scenario="eval",
        given=BEST | {"metric_for_best_model": "eval_entropy", "greater_is_better": False},
    ),
    "metric_for_best_model": Acts(
        "eval_entropy",
        lambda run: run.trainer.state.best_metric,
        scenario="eval",
        given=BEST | {"load_best_model_at_end": True},
    ),
    "greater_is_better": Acts(
        True,
        lambda run: run.trainer.state.best_metric,
        scenario="eval",
        given=BEST
        | {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_entropy",
            "greater_is_better": False,
        },
    ),
    "resume_from_checkpoint": Checked(checks.resume_from_checkpoint),
    "ignore_data_skip": Acts(
        True,
        lambda run: o.prompts(run) == o.other_prompts(run),
        scenario="resumed",
        given={"steps_per_generation": 1},
    ),
    "restore_callback_states_from_checkpoint": Checked(checks.restore_callback_states),
    "push_to_hub": Checked(checks.push_to_hub),
    "hub_token": Checked(checks.hub_token),
    "hub_private_repo": Checked(checks.hub_private_repo),
    "hub_model_id": Checked(checks.hub_model_id),
    "hub_strategy": Checked(checks.hub_strategy),
    "hub_always_push": Checked(checks.hub_always_push),
    "hub_revision": Checked(checks.hub_revision),
}
LOADING: dict[str, Row] = {
    "remove_unused_columns": Acts(True, lambda run: "wanted" in o.columns(run), to=False),
    "dataloader_drop_last": Acts(True, o.collected, to=[4], scenario="evaluate"),
    "dataloader_num_workers": Acts(1, o.loader("num_workers"), to=1),
    "dataloader_pin_memory": Checked(checks.dataloader_pin_memory),
    "dataloader_persistent_workers": Acts(
        True,
        o.loader("persistent_workers"),
        to=True,
        given={"dataloader_num_workers": 1},
        scenario="built",
    ),
    "dataloader_prefetch_factor": Acts(
        5, o.loader("prefetch_factor"), to=5, given={"dataloader_num_workers": 1}, scenario="built"
    ),
    "dataloader_multiprocessing_context": Acts(
        "spawn",
        lambda run: type(o.loader("multiprocessing_context")(run)).__name__,
        to="SpawnContext",
        given={"dataloader_num_workers": 1},
        scenario="built",
    ),
    "dataloader_in_order": Refused(False, "dataloader_in_order=False"),
}
RANKS: dict[str, Row] = {
    "accelerator_config": Checked(checks.accelerator_config),
    "parallelism_config": Checked(checks.parallelism_config),
    "ddp_find_unused_parameters": Acts(
        True,
        o.accelerator("ddp_handler.find_unused_parameters"),
        to=True,
        scenario="built",
        given={"ddp_find_unused_parameters": False},
    ),
    "ddp_bucket_cap_mb": Acts(
        5, o.accelerator("ddp_handler.bucket_cap_mb"), to=5, scenario="built"
    ),
    "ddp_broadcast_buffers": Acts(
        False, o.accelerator("ddp_handler.broadcast_buffers"), to=False, scenario="built"
    ),
    "ddp_static_graph": Acts(
        True, o.accelerator("ddp_handler.static_graph"), to=True, scenario="built"
    ),
    "ddp_backend": Checked(checks.ddp_backend),
    "ddp_timeout": Checked(checks.ddp_timeout),
    "fsdp": Checked(checks.fsdp),
    "fsdp_config": Checked(checks.fsdp_config),
    "deepspeed": Checked(checks.deepspeed),
}

PARTS = (
    DATA,
    REWARD,
    POLICY,
    OBJECTIVE,
    ROLLOUT,
    REPORT,
    SCHEDULE,
    MODEL,
    LOGS,
    EVALUATION,
    SAVING,
    LOADING,
    RANKS,
)
TABLE: dict[str, Row] = {name: row for part in PARTS for name, row in part.items()}
