"""Options of the policy stage: loading, scoring, and the reference."""

from dataclasses import dataclass
from typing import Any

from gmpo.option import option


@dataclass
class PolicySettings:
    """Options of the policy stage."""

    model_init_kwargs: dict[str, Any] | str | None = option(
        None,
        "Keywords for from_pretrained when the model is given by name or path (reward models and "
        "their tokenizers get them too). The weights are loaded in float32 unless `dtype` says "
        "otherwise.",
    )
    trust_remote_code: bool = option(
        False, "Allow code that comes with a model, a tokenizer or a reward model to run."
    )
    disable_dropout: bool = option(False, "Set every dropout of policy and reference to 0.")
    cast_lm_head_to_fp32: bool = option(
        False, "Compute the vocabulary head of policy and reference in float32."
    )
    router_aux_loss_coef: float = option(
        0.001,
        "Weight of the load-balancing loss of mixture-of-experts models; no effect on a dense "
        "model.",
        low=0.0,
    )
    pad_to_multiple_of: int | None = option(
        None, "Pad prompts and completions of the padded layout to this multiple.", low=1
    )
    batch_layout: str = option(
        "auto",
        "How rows are laid out for the model: 'shared_prefix' runs each prompt once for its group, "
        "'packed' runs rows back to back, 'padded' is the plain rectangle. 'auto' is "
        "'shared_prefix' where the model attends by segments, which is checked, else 'padded'.",
        choices=("auto", "shared_prefix", "packed", "padded"),
    )
    max_tokens_per_chunk: int | None = option(
        None,
        "Tokens of one forward pass: a micro-batch is cut into chunks of about this size, with the "
        "same update. None runs the whole micro-batch at once.",
        low=1,
    )
    nonfinite_steps: str = option(
        "stop",
        "An optimizer step whose log-probs, loss or gradient norm are not finite: 'stop' ends the "
        "run before the weights are touched, names the rows and leaves a checkpoint; 'skip' drops "
        "the step and counts it.",
        choices=("stop", "skip"),
    )
    sync_ref_model: bool = option(
        False, "Move the reference toward the policy every ref_model_sync_steps (needs beta > 0)."
    )
    ref_model_mixup_alpha: float = option(
        0.6,
        "With sync_ref_model: reference = (1 - alpha) * reference + alpha * policy.",
        low=0.0,
        high=1.0,
    )
    ref_model_sync_steps: int = option(
        512, "With sync_ref_model: optimizer steps between two moves.", low=1
    )
