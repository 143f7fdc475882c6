"""Options of the objective: surrogate, aggregate, and what modifies them."""

from dataclasses import dataclass

from gmpo.option import option

CORRECTION_MODES = (
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_truncate",
    "geometric_mask",
)
# Members that GRPOTrainer minimises; each has a row in `family.FAMILY`.
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


@dataclass
class ObjectiveSettings:
    """Options of the objective."""

    loss_type: str = option(
        "dapo",
        "Member of the family: the cost of a ratio, and the average over tokens and rows. "
        "GMPOTrainer always minimises GMPO's loss and takes 'gmpo' or the inherited default 'dapo' "
        "for it.",
        choices=("gmpo", *LOSS_TYPES),
    )
    beta: float = option(
        0.0, "Weight of the KL divergence from the reference; 0 loads no reference.", low=0.0
    )
    epsilon: float = option(
        0.2,
        "Lower clip bound. GRPO's family: ratios below 1 - epsilon. GMPO: log-ratios below "
        "-epsilon.",
        low=0.0,
        low_open=True,
        infinite=True,
    )
    epsilon_high: float | None = option(
        None,
        "Upper clip bound, of the ratio minus 1 (GRPO's family) or of the log-ratio (GMPO); None "
        "takes epsilon.",
        low=0.0,
        low_open=True,
        infinite=True,
    )
    delta: float | None = option(
        None,
        "Upper bound for negative advantages: of the ratio (GRPO's family), of the log-ratio "
        "(GMPO). None for no bound.",
        low=0.0,
        low_open=True,
        infinite=True,
    )
    importance_sampling_level: str = option(
        "token",
        "Ratios of single tokens or of whole completions ('sequence').",
        choices=("token", "sequence"),
    )
    mean_power: float = option(
        0.0,
        "GMPO: power of the mean over a completion's ratios; 0 is the geometric mean, 1 the "
        "arithmetic, -1 the harmonic.",
    )
    mean_power_final: float | None = option(
        None, "GMPO: value that mean_power moves to, linearly over the training."
    )
    sapo_temperature_neg: float = option(
        1.05, "SAPO: temperature for negative advantages.", low=0.0, low_open=True
    )
    sapo_temperature_pos: float = option(
        1.0, "SAPO: temperature for positive advantages.", low=0.0, low_open=True
    )
    vespo_k_pos: float = option(2.0, "VESPO: power for positive advantages.", low=0.0)
    vespo_lambda_pos: float = option(3.0, "VESPO: decay for positive advantages.", low=0.0)
    vespo_k_neg: float = option(3.0, "VESPO: power for negative advantages.", low=0.0)
    vespo_lambda_neg: float = option(2.0, "VESPO: decay for negative advantages.", low=0.0)
    top_entropy_quantile: float = option(
        1.0,
        "Share of tokens, those of highest entropy, that get a policy gradient.",
        low=0.0,
        high=1.0,
        low_open=True,
    )
    mask_truncated_completions: bool = option(
        False,
        "Completions that ran into max_completion_length are not trained on. Means over tokens "
        "(dapo, bnpo, cispo, vespo, entropy bonus) leave them out; means over rows (GMPO, grpo, "
        "...) count them, so that masking a row makes no other row's step larger.",
    )
    off_policy_mask_threshold: float | None = option(
        None,
        "Drop completions with a negative advantage whose mean log-ratio of sampler to policy "
        "exceeds this many nats.",
        infinite=True,
    )
    use_bias_correction_kl: bool = option(
        False, "Weigh each token's KL by its importance ratio, with its gradient."
    )
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.")
    use_adaptive_entropy: bool = option(
        False, "Move entropy_coef by entropy_coef_delta per step toward entropy_target."
    )
    entropy_coef_min: float = option(0.0, "Lower end of the adaptive coefficient.")
    entropy_coef_max: float = option(1.0, "Upper end of the adaptive coefficient.")
    entropy_coef_delta: float = option(0.005, "Step of the adaptive coefficient.", low=0.0)
    entropy_target: float = option(
        0.2, "Entropy (nats per token) that the adaptive coefficient aims at.", low=0.0
    )
    vllm_importance_sampling_correction: bool = option(
        True, "Weigh by the ratio of trainer to sampler, for every engine that reports log-probs."
    )
    vllm_importance_sampling_mode: str = option(
        "sequence_mask",
        "Level (token, sequence, geometric mean) at which that ratio is taken, and whether it is "
        "clamped ('truncate') or dropped ('mask') outside its bounds.",
        choices=CORRECTION_MODES,
    )
    vllm_importance_sampling_clip_max: float | None = option(
        3.0, "Upper bound of that ratio.", low=0.0, low_open=True, infinite=True
    )
    vllm_importance_sampling_clip_min: float | None = option(
        None, "Lower bound of that ratio.", low=0.0
    )
    vllm_importance_sampling_cap: float | None = option(
        None,
        "Old name of vllm_importance_sampling_clip_max.",
        low=0.0,
        low_open=True,
        infinite=True,
    )
