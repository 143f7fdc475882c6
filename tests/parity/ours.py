"""The same cases through gmpo."""

import dataclasses

import torch
from torch import Tensor

from gmpo.objective.objective import objective_from
from gmpo.objective.selection import entropy_threshold, high_entropy_tokens
from gmpo.objective.settings import ObjectiveSettings
from gmpo.objective.types import Denominators, ObjectiveInputs
from tests.parity.cases import MAX_COMPLETION_LENGTH, Case


def loss_and_gradients(case: Case) -> dict[str, Tensor]:
    """The loss, and its gradients in "logps" and "entropy"."""
    leaves = {name: case.rows[name].clone().requires_grad_() for name in ("logps", "entropy")}
    inputs = {
        name: value for name, value in case.rows.items() if name not in ("lengths", "truncated")
    } | leaves
    mask = case.rows["mask"]
    if case.other.get("mask_truncated_completions"):
        mask = mask & ~case.rows["truncated"][:, None]
        inputs["mask"] = mask
    algorithm = "gmpo" if case.member == "gmpo" else "grpo"
    objective = objective_from(ObjectiveSettings(**case.options), algorithm=algorithm)
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(mask)).chunk(case.micro_batches):
        part = {name: value[rows] for name, value in inputs.items()}
        x = objective_inputs(
            part, top_entropy_quantile=case.options.get("top_entropy_quantile", 1.0)
        )
        counts = Denominators(
            num_rows=len(mask),
            tokens=float(mask.sum()),
            micro_batch_tokens=float(mask[rows].sum()),
            micro_batches=case.micro_batches,
            max_completion_length=MAX_COMPLETION_LENGTH,
            micro_batch_selected=float(x.select.sum()),
        )
        loss, _ = objective.loss(x, counts, entropy_coef=case.options.get("entropy_coef", 0.0))
        loss.backward()
        total += loss.detach()
    gradients = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
    }
    return {"loss": total, **gradients}


def objective_inputs(part: dict[str, Tensor], *, top_entropy_quantile: float) -> ObjectiveInputs:
    fields = {f.name: part.get(f.name) for f in dataclasses.fields(ObjectiveInputs)}
    mask, entropy = part["mask"], part["entropy"].detach()
    fields["select"] = mask
    if top_entropy_quantile < 1:
        threshold = entropy_threshold(entropy[mask].float(), top_entropy_quantile)
        fields["select"] = high_entropy_tokens(mask, entropy, threshold)
    fields["advantages"] = part["advantages"][:, None]
    return ObjectiveInputs(**fields)  # pyright: ignore[reportArgumentType]
