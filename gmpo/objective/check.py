"""Rules between the options of an objective.  An option that can't act is refused, with the reason.

Rules for a single value are in `settings.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from gmpo.objective.correction import correction_from
from gmpo.objective.family import FAMILY, member_name
from gmpo.objective.settings import ObjectiveSettings

FINITE = (
    "mean_power",
    "mean_power_final",
    "off_policy_mask_threshold",
    "entropy_coef",
    "entropy_coef_min",
    "entropy_coef_max",
)

# Options that act only with another one: name or prefix -> (that option, the value that enables it)
NEEDS = {
    "vllm_importance_sampling_": ("vllm_importance_sampling_correction", "True"),
    "use_bias_correction_kl": ("beta", "above 0"),
    "entropy_coef_": ("use_adaptive_entropy", "True"),
    "entropy_target": ("use_adaptive_entropy", "True"),
}


def check_objective(settings: ObjectiveSettings, *, algorithm: str) -> None:
    """Raise a ValueError for the first combination of options that the objective can't use.

    Args:
        settings: Of the objective, or of a whole run.
        algorithm: "gmpo" or "grpo", as for `objective_from`.
    """
    name = member_name(settings, algorithm=algorithm)
    for rule in RULES:
        for problem in rule(settings, name):
            raise ValueError(problem)


def questionable_options(settings: ObjectiveSettings, *, algorithm: str) -> list[str]:
    """Return what is allowed but rarely meant, for warnings.

    Args:
        settings: Of the objective, or of a whole run.
        algorithm: "gmpo" or "grpo", as for `objective_from`.
    """
    name = member_name(settings, algorithm=algorithm)
    level = settings.importance_sampling_level
    if level == "sequence" and name in LENGTH_WEIGHS:
        return [
            f"importance_sampling_level='sequence' with loss_type={name!r}: one ratio stands for a "
            "whole completion, and the loss weighs it by the number of its tokens. For GSPO, which "
            "weighs completions alike, set loss_type='grpo' (or 'luspo' to weigh them by length on "
            "purpose)."
        ]
    if level == "token" and name == "luspo":
        return [
            "loss_type='luspo' with importance_sampling_level='token': LUSPO is defined for ratios "
            "of whole completions. Set importance_sampling_level='sequence'."
        ]
    return []


# Members whose averages give long completions more weight than short ones.
LENGTH_WEIGHS = ("bnpo", "dr_grpo", "dapo", "cispo")


def changed_objective_options(settings: ObjectiveSettings) -> dict[str, tuple[Any, Any]]:
    """Return name -> (value, default) of the objective's options that were changed.

    The default is the one of the settings' own class.
    """
    ours = {f.name for f in dataclasses.fields(ObjectiveSettings)}
    changed = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if f.name in ours and value != f.default:
            changed[f.name] = (value, f.default)
    return changed


def readers_of_options() -> dict[str, list[str]]:
    """Return option -> names of the members that read it, for the options that surrogates read."""
    readers: dict[str, list[str]] = {}
    for reader, member in FAMILY.items():
        for option in member.options:
            readers.setdefault(option, []).append(reader)
    return {**readers, "mean_power_final": readers["mean_power"]}


def unread_options(settings: ObjectiveSettings, *, algorithm: str) -> set[str]:
    """Return the options that the objective does not read, whatever their values.

    Args:
        settings: Of the objective, or of a whole run.
        algorithm: "gmpo" or "grpo", as for `objective_from`.
    """
    name = member_name(settings, algorithm=algorithm)
    unread = {option for option, members in readers_of_options().items() if name not in members}
    return unread | {"loss_type"} if algorithm == "gmpo" else unread


# -- rules: each yields what is wrong ------------------------------------------------------------


def numbers_are_finite(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    """Refuse infinity and NaN where only numbers make sense."""
    for option, (value, default) in changed_objective_options(settings).items():
        if option in FINITE and value is not None and not math.isfinite(value):
            yield (
                f"{option}={value!r} is not a finite number. Give one, or leave it at {default!r}."
            )


def options_are_read(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    """Refuse options of other members."""
    readers = readers_of_options()
    for option, (value, default) in changed_objective_options(settings).items():
        if name not in readers.get(option, name):
            yield (
                f"{option}={value!r} does nothing for the objective {name!r}. "
                f"Leave it at {default!r}, or train one that reads it: "
                f"{', '.join(readers[option])}."
            )


def options_have_their_switch(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    """Refuse options that modify a feature which is off."""
    for option, (value, default) in changed_objective_options(settings).items():
        for start, (switch, on) in NEEDS.items():
            if option.startswith(start) and option != switch and not getattr(settings, switch):
                yield (
                    f"{option}={value!r} needs {switch} to be {on}. "
                    f"Set that, or leave {option} at {default!r}."
                )


def window_is_sound(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    """Refuse bounds that would close the clip window, and CISPO without its cap."""
    if name == "cispo":
        yield from _cap_is_sound(settings)
        return
    if settings.delta is None:
        return

    # `delta` caps what the window leaves open, so it must be no tighter.
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    bound, what, kind = 1 + high, "1 + epsilon_high", "ratios"
    if name == "gmpo":
        bound, what, kind = high, "epsilon_high", "log-ratios"
    if settings.delta < bound:
        yield (
            f"delta={settings.delta!r} is below {what} = {bound:g}. It bounds {kind} of negative "
            "advantages from above and must leave the clip window open: "
            f"use at least {bound:g}, or None for no bound."
        )


def _cap_is_sound(settings: ObjectiveSettings) -> Iterator[str]:
    if settings.epsilon_high is None or settings.epsilon_high < 1:
        yield (
            f"epsilon_high={settings.epsilon_high!r} with loss_type='cispo': there it is the cap "
            "on the ratio itself, and less than 1 would scale down even unmoved tokens. "
            "Set for example epsilon_high=5.0."
        )


def mean_power_is_of_tokens(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    """Refuse a power mean over tokens where whole completions are clipped."""
    powered = settings.mean_power != 0 or settings.mean_power_final is not None
    if powered and settings.importance_sampling_level == "sequence":
        yield (
            f"mean_power={settings.mean_power!r}, mean_power_final={settings.mean_power_final!r} "
            "with importance_sampling_level='sequence': the sequence level sums log-ratios and has "
            "no mean over tokens. Use importance_sampling_level='token', or leave mean_power at "
            "0.0 and mean_power_final at None."
        )


def correction_has_bounds(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    """Refuse a correction whose bounds cross, or that has nothing to truncate to."""
    correction = correction_from(settings)
    if correction is None:
        return

    low, high = correction.low, correction.high
    if low is not None and high is not None and low >= high:
        yield (
            f"vllm_importance_sampling_clip_min={low!r} is not below "
            f"vllm_importance_sampling_clip_max={high!r}. "
            "Lower the one, raise the other, or set one to None."
        )
    if low is None and high is None and not correction.masks:
        yield (
            f"vllm_importance_sampling_mode={correction.mode!r} has nothing to truncate to: set "
            "vllm_importance_sampling_clip_max (for example 3.0) or "
            "vllm_importance_sampling_clip_min."
        )


def correction_fits_vespo(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    """Refuse geometric corrections for VESPO."""
    correction = correction_from(settings)
    if name == "vespo" and correction is not None and correction.mode.startswith("geometric"):
        yield (
            f"vllm_importance_sampling_mode={correction.mode!r} with loss_type='vespo': VESPO "
            "multiplies the ratios of all tokens of a completion, and a geometric mean is not "
            "their product. Use a token_* or sequence_* mode."
        )


def entropy_range_is_ordered(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    """Refuse an empty range of the entropy bonus's coefficient."""
    low, high = settings.entropy_coef_min, settings.entropy_coef_max
    if settings.use_adaptive_entropy and low > high:
        yield f"entropy_coef_min={low!r} is above entropy_coef_max={high!r}. Swap them."


Rule = Callable[[ObjectiveSettings, str], Iterator[str]]

RULES: tuple[Rule, ...] = (
    numbers_are_finite,
    options_are_read,
    options_have_their_switch,
    window_is_sound,
    mean_power_is_of_tokens,
    correction_has_bounds,
    correction_fits_vespo,
    entropy_range_is_ordered,
)
