"""`Objective`, which the trainer calls: from log-probs and advantages to a loss."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmpo.objective.aggregate import entropy_mean
from gmpo.objective.check import check_objective
from gmpo.objective.correction import Correction, correction_from, sampler_difference
from gmpo.objective.family import FAMILY, Member, member_name
from gmpo.objective.kl import kl_k3
from gmpo.objective.selection import rows_on_policy
from gmpo.objective.settings import ObjectiveSettings
from gmpo.objective.statistics import mean, statistics
from gmpo.objective.types import Denominators, ObjectiveInputs, SurrogateInputs
from gmpo.types import Statistics


@dataclass(frozen=True, slots=True)
class Objective:
    """A member of the family with its options.  It has no state; `objective_from` makes one."""

    member: Member
    options: Mapping[str, Any]  # keywords of the member's surrogate
    mean_power_final: float | None
    beta: float
    bias_correction: bool  # of the KL
    off_policy_threshold: float | None  # nats per token
    correction: Correction | None
    top_entropy_quantile: float = 1.0  # share of tokens that get a policy gradient, by entropy

    @property
    def selects_by_entropy(self) -> bool:
        """True if only the tokens with the highest entropy get a policy gradient."""
        return self.top_entropy_quantile < 1.0

    @property
    def depends_on_micro_batches(self) -> bool:
        """True if cutting an optimizer batch into other micro-batches changes its loss."""
        # The threshold of a selection is taken in each micro-batch.
        return self.selects_by_entropy or self.member.depends_on_micro_batches

    def zero_advantage_is_inert(self, entropy_coef: float) -> bool:
        """Return whether rows with an advantage of 0 add nothing to the loss and its gradient.

        Every surrogate is a multiple of the advantage; KL and entropy bonus are not.
        """
        return self.beta == 0.0 and entropy_coef == 0.0

    def loss(
        self,
        inputs: ObjectiveInputs,
        denominators: Denominators,
        *,
        progress: float = 0.0,
        entropy_coef: float | None = None,
    ) -> tuple[Tensor, Statistics]:
        """Return this chunk's share of the optimizer batch's loss, and its figures.

        Shares add up to the loss exactly, however the rows are cut.

        Args:
            inputs: Rows of one chunk.  Computed in float32, or wider where the log-probs are.
            denominators: Counts of the whole optimizer batch.
            progress: Share of the training that is done, in [0, 1]; moves `mean_power` to
                `mean_power_final`.
            entropy_coef: Weight of the entropy bonus in this step, from `EntropyController.coef`;
                None without a bonus.
        """
        x = prepared(inputs)
        terms = self.terms(x)
        surrogate = self.member.surrogate(terms, **self.options_at(progress))
        loss = self.member.aggregate(surrogate.loss, x.mask, denominators)

        kl = kl_k3(x, bias_correction=self.bias_correction) if self.beta else None
        if kl is not None:
            loss = loss + self.beta * self.member.aggregate(kl, x.mask, denominators)

        figures = statistics(x, terms, surrogate, kl, self.correction)
        if self.selects_by_entropy and x.entropy is not None:
            figures.means["entropy/selected"] = mean(x.entropy.detach(), x.select & x.mask)

        # Rows add up to 1 over the optimizer batch, so that this is the loss per optimizer step.
        if entropy_coef is not None:
            weight = len(x.mask) / denominators.num_rows
            figures.means["policy_loss"] = (loss.detach(), weight)
        if entropy_coef:
            assert x.entropy is not None, "an entropy bonus needs the entropy"
            bonus = entropy_mean(
                x.entropy, x.mask, x.select, denominators, selective=self.selects_by_entropy
            )
            loss = loss - entropy_coef * bonus
        return loss, figures

    def terms(self, x: ObjectiveInputs) -> SurrogateInputs:
        """Apply the selection, the off-policy mask and the correction, in this order."""
        select = x.select & x.mask
        if self.off_policy_threshold is not None:
            select = select & rows_on_policy(x, self.off_policy_threshold)

        weight = x.logps.new_ones(1, 1)
        if self.correction is not None and x.sampler_logps is not None:
            difference = sampler_difference(x.old_logps, x.sampler_logps, x.mask)
            weight = self.correction.weight(self.correction.ratio(difference, x.mask))

        return SurrogateInputs(
            logps=torch.where(x.mask, x.logps, 0),
            log_ratio=torch.where(x.mask, x.logps - x.old_logps, 0),
            advantages=x.advantages,
            mask=x.mask,
            select=select & (weight > 0),
            correction=weight,
        )

    def options_at(self, progress: float) -> Mapping[str, Any]:
        """Return the surrogate's options, with `mean_power` as far as it has moved.

        Example:
            mean_power 0, mean_power_final 1, progress 0.25 -> mean_power 0.25
        """
        if self.mean_power_final is None:
            return self.options
        start = self.options["mean_power"]
        moved = (self.mean_power_final - start) * min(max(progress, 0.0), 1.0)
        return {**self.options, "mean_power": start + moved}


def prepared(inputs: ObjectiveInputs) -> ObjectiveInputs:
    """Return `inputs` in float32, or in float64 if a field is.

    Only log-probs and entropy keep their gradients.
    """
    floats: dict[str, Tensor] = {}
    for f in dataclasses.fields(inputs):
        value: Tensor | None = getattr(inputs, f.name)
        if value is not None and value.is_floating_point():
            floats[f.name] = value if f.name in ("logps", "entropy") else value.detach()

    is_double = any(value.dtype == torch.float64 for value in floats.values())
    dtype = torch.float64 if is_double else torch.float32
    wide: dict[str, Any] = {name: value.to(dtype) for name, value in floats.items()}
    return dataclasses.replace(inputs, **wide)


def objective_from(settings: ObjectiveSettings, *, algorithm: str) -> Objective:
    """Return the objective that the settings ask for.

    Args:
        settings: Of the objective, or of a whole run.
        algorithm: "gmpo" (GMPOTrainer) or "grpo" (GRPOTrainer), where `loss_type` names the member.

    Raises:
        ValueError: As `check_objective`.
    """
    check_objective(settings, algorithm=algorithm)
    member = FAMILY[member_name(settings, algorithm=algorithm)]

    options = {name: getattr(settings, name) for name in member.options}
    if "epsilon_high" in options and options["epsilon_high"] is None:
        options["epsilon_high"] = settings.epsilon

    return Objective(
        member=member,
        options=options,
        mean_power_final=settings.mean_power_final,
        beta=settings.beta,
        bias_correction=settings.use_bias_correction_kl,
        off_policy_threshold=settings.off_policy_mask_threshold,
        correction=correction_from(settings),
        top_entropy_quantile=settings.top_entropy_quantile,
    )
