"""Loss cases that both sides compute, and the differences that are meant to be.

A case says everything in the option names that gmpo and the peer share.  All numbers are float32 values, so that a step
of either side that rounds to float32 changes nothing; the losses are computed in float64.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gmpo.objective.settings import LOSS_TYPES

MEMBERS = ("gmpo", *LOSS_TYPES)
ROWS, TOKENS, MAX_COMPLETION_LENGTH = 6, 10, 16
WINDOWS = {  # what a member needs to be defined; the peer's default window would scale down unmoved tokens of CISPO
    "gmpo": {"epsilon": 0.4, "epsilon_high": 0.5},
    "cispo": {"epsilon_high": 1.5},
    "sapo": {},
    "vespo": {},
}
KL = ({}, {"beta": 0.1}, {"beta": 0.1, "use_bias_correction_kl": True})
MODES = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True, slots=True)
class Case:
    member: str
    options: dict[str, Any]
    rows: dict[
        str, Tensor
    ]  # float64 [B, T]: logps, old_logps, ref_logps, sampler_logps, entropy; mask; [B]: the rest
    micro_batches: int = 1  # that the rows are cut into, all of one optimizer step
    windows: int = 1  # optimizer steps that the collection makes, this being one of them
    other_tokens: int = 0  # counted tokens of the other ones
    other: dict[str, Any] = field(
        default_factory=dict
    )  # what only the trainers know of, as mask_truncated_completions

    @property
    def name(self) -> str:
        options = ", ".join(
            f"{k}={v}" for k, v in {**self.options, **self.other}.items() if k != "loss_type"
        )
        return f"{self.member}({options}) in {self.micro_batches} micro-batch(es)"


def random_rows(generator: torch.Generator, *, empty: bool = False) -> dict[str, Tensor]:
    """Rows whose ratios leave every clip window on both sides.  The first row has the full length.

    empty: Make the last row one that the policy wrote nothing of.
    """

    def normal(scale: float, *size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).double()

    shape = (ROWS, TOKENS)
    lengths = torch.randint(1, TOKENS + 1, (ROWS,), generator=generator)
    lengths[0] = TOKENS
    within = torch.arange(TOKENS) < lengths[:, None]
    mask = within & (torch.rand(shape, generator=generator) < 0.85)  # the holes are tool tokens
    mask[:, 0] = True
    if empty:
        mask[-1] = False
    logps = -normal(1.0, *shape).abs() - 0.1
    old_logps = (logps + normal(0.5, *shape)).float().double()
    entropy = normal(1.0, *shape).abs()
    entropy[:, 0] += 10.0  # every row has a token that a selection by entropy keeps
    advantages = normal(1.0, ROWS)
    advantages[torch.rand(ROWS, generator=generator) < 0.1] = 0.0
    return {
        "logps": logps,
        "old_logps": old_logps,
        "ref_logps": (logps + normal(0.5, *shape)).float().double(),
        "sampler_logps": (old_logps + normal(0.3, *shape)).float().double(),
        "entropy": entropy,
        "mask": mask,
        "lengths": lengths,
        "truncated": torch.zeros(ROWS, dtype=torch.bool),
        "advantages": advantages,
    }


def correction_options(mode: str | None) -> dict[str, Any]:
    if mode is None:
        return {"vllm_importance_sampling_correction": False}
    return {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": 1.6,
        "vllm_importance_sampling_clip_min": 0.7,
    }


def case(
    member: str, *, seed: int, mode: str | None = None, empty: bool = False, **fields: Any
) -> Case:
    """A case with random rows.

    Args:
        mode: Of the sampler/trainer correction; None: off.
        fields: Those of `Case`; everything else is an option.
    """
    ours = ("micro_batches", "windows", "other_tokens", "other")
    own = {name: fields.pop(name) for name in ours if name in fields}
    window = WINDOWS.get(member, {"epsilon": 0.2, "epsilon_high": 0.28})
    options = {
        "use_bias_correction_kl": False,
        **window,
        **correction_options(mode),
        **fields,
    }  # defaults differ
    if member != "gmpo":
        options["loss_type"] = member
    return Case(
        member, options, random_rows(torch.Generator().manual_seed(seed), empty=empty), **own
    )


def grid() -> Iterator[Case]:
    """Every member with everything that modifies it, as far as both sides mean the same by it."""
    axes = itertools.product(MEMBERS, ("token", "sequence"), KL, MODES, (1.0, 0.5), (None, 0.05))
    kept = [axis for axis in axes if comparable(*axis)]
    kept += 20 * [
        axis for axis in kept if axis[0] == "gmpo"
    ]  # little modifies it on both sides: more draws instead
    for seed, (member, level, kl, mode, quantile, threshold) in enumerate(kept):
        draw = random.Random(seed)
        options: dict[str, Any] = kl | drawn_options(member, draw)
        if member != "vespo":
            options["importance_sampling_level"] = level
        if threshold is not None:
            options["off_policy_mask_threshold"] = threshold
        bonus = member != "gmpo" and quantile == 1.0 and draw.random() < 0.3
        options |= {"entropy_coef": 0.05} if bonus else {"top_entropy_quantile": quantile}
        whole = bonus or (
            member == "gmpo" and quantile < 1.0
        )  # else a row might be left without selected tokens
        yield case(
            member,
            seed=seed,
            mode=mode,
            empty=member != "gmpo" and draw.random() < 0.2,
            micro_batches=1 if whole else draw.choice([1, 2, 3]),
            **options,
        )


def comparable(
    member: str,
    level: str,
    kl: dict[str, Any],
    mode: str | None,
    quantile: float,
    threshold: float | None,
) -> bool:
    """Whether both sides mean the same; test_differences.py has what they don't."""
    if member == "gmpo" and (
        level == "sequence" or mode or threshold or kl.get("use_bias_correction_kl")
    ):
        return False
    if member == "vespo" and level == "sequence":
        return False  # it has no level
    return not (level == "sequence" and kl.get("use_bias_correction_kl"))


def drawn_options(member: str, draw: random.Random) -> dict[str, Any]:
    """The member's own options, or none."""
    if draw.random() < 0.5:
        return {}
    if member == "gmpo":
        return {"epsilon_high": None}
    if member == "sapo":
        return {"sapo_temperature_pos": 1.3, "sapo_temperature_neg": 2.1}
    if member == "vespo":
        return {
            "vespo_k_pos": 1.5,
            "vespo_lambda_pos": 2.0,
            "vespo_k_neg": 2.5,
            "vespo_lambda_neg": 1.0,
        }
    return {} if member == "cispo" else {"delta": 1.5}
