"""Methods of the trainers that a subclass may override, and names that nothing would call."""

# method -> what an override changes
HOOKS = {
    "compute_loss": "the loss of a micro-batch: its share in the loss of the optimizer batch",
    "training_step": "forward and backward pass of a micro-batch",
    "prediction_step": "generation, rewards and loss of an evaluation batch",
    "get_train_dataloader": "the rows of each collection (`Rows`), in their order",
    "get_eval_dataloader": "the rows of an evaluation",
    "get_test_dataloader": "the rows of `predict`",
    "get_batch_samples": "the micro-batches of an optimizer step",
    "create_optimizer": "the optimizer",
    "create_scheduler": "the schedule of the learning rate",
    "log": "what is logged, with gmpo's figures in it",
    "evaluate": "an evaluation",
    "evaluation_loop": "the batches of an evaluation",
    "save_model": "what is saved of the model",
    "create_model_card": "the run's README.md",
}

_REWARDS = "Pass reward_funcs: a function gets prompts, completions and every dataset column"
_LOSS = "Override compute_loss, or add a member to FAMILY in gmpo/objective/family.py"
_ENGINE = "Completions are made by an engine: gmpo/rollout/engine.py says what one must do"
_LOGPROBS = "Log-probs are computed by LogProbs in gmpo/policy/logprobs.py"
_LOADER = "Override get_train_dataloader or get_eval_dataloader"
_LOG = "Call log_metric or log_extra in a reward function, or override log"
_STEP = "Override training_step and prediction_step"

# names that other trainers call and gmpo does not -> what to do instead
NEVER_CALLED = {
    "_compute_loss": _LOSS,
    "get_sapo_token_loss": _LOSS,
    "get_gamma_weights": _LOSS,
    "get_off_policy_mask": "Set off_policy_mask_threshold. " + _LOSS,
    "get_high_entropy_mask": "Set top_entropy_quantile. " + _LOSS,
    "compute_liger_loss": _LOSS,
    "compute_loss_context_manager": _STEP,
    "autocast_smart_context_manager": _STEP,
    "_prepare_inputs": "Override get_batch_samples, which gives the micro-batches of a step",
    "_get_num_items_in_batch": "Denominators are in each micro-batch: inputs.denominators",
    "_calculate_rewards": _REWARDS,
    "_generate_and_score_completions": _REWARDS + ". " + _ENGINE,
    "_generate": _ENGINE,
    "_generate_single_turn": _ENGINE,
    "_tokenize_prompts": "Prompts are encoded by PromptEncoder in gmpo/rollout/prompts/encoder.py",
    "_tool_call_loop": "Tools are not available yet",
    "_get_tool_suffix_ids": "Tools are not available yet",
    "_get_per_token_logps": _LOGPROBS,
    "_get_per_token_logps_and_entropies": _LOGPROBS,
    "_get_last_hidden_state": _LOGPROBS,
    "_log_metric": _LOG,
    "_log_completion_extra": _LOG,
    "_get_train_sampler": _LOADER,
    "_get_eval_sampler": _LOADER,
    "_get_dataloader": _LOADER,
    "_remove_unused_columns": _LOADER,
    "_get_collator_with_removed_columns": _LOADER,
    "_set_signature_columns_if_needed": _LOADER,
}


def refuse_unused_methods(cls: type, base: type) -> None:
    """Raise a TypeError for a method that `cls`, derived from the trainer `base`, adds in vain.

    The name would be called by another trainer, so that its author expects it to act.
    """
    for name, instead in NEVER_CALLED.items():
        if getattr(cls, name, None) is not getattr(base, name, None):
            raise TypeError(
                f"{cls.__name__}.{name} would never be called: gmpo has no such hook. {instead}. "
                f"Or give the method another name. Hooks are {', '.join(HOOKS)}."
            )
