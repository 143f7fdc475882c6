"""Which combinations of options an objective can use.  Nothing is ignored: what can't act is refused, with the reason.

Whether a single value is legal is held in `settings.py`; here are the rules between options.
"""

import dataclasses
import math
from collections.abc import Iterator
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
NEEDS = {  # options that act only beside another one: prefix or name -> (that option, the value that switches it on)
    "vllm_importance_sampling_": ("vllm_importance_sampling_correction", "True"),
    "use_bias_correction_kl": ("beta", "above 0"),
    "entropy_coef_": ("use_adaptive_entropy", "True"),
    "entropy_target": ("use_adaptive_entropy", "True"),
}


def check_objective(settings: ObjectiveSettings, *, algorithm: str) -> None:
    """Raise a ValueError for the first combination of options that the objective can't use.

    Args:
        algorithm: "gmpo" or "grpo", as for `objective_from`.
    """
    name = member_name(settings, algorithm=algorithm)
    for rule in RULES:
        for problem in rule(settings, name):
            raise ValueError(problem)


def changed_options(settings: ObjectiveSettings) -> dict[str, tuple[Any, Any]]:
    """name -> (value, default) of the objective's options that differ from the default of the settings' own class."""
    ours = {f.name for f in dataclasses.fields(ObjectiveSettings)}
    pairs = {
        f.name: (getattr(settings, f.name), f.default)
        for f in dataclasses.fields(settings)
        if f.name in ours
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def numbers_are_finite(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    for option, (value, default) in changed_options(settings).items():
        if option in FINITE and value is not None and not math.isfinite(value):
            yield f"{option}={value!r} is not a finite number. Give one, or leave it at {default!r}."


def options_are_read(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    """Options of other members are left at their defaults."""
    readers = readers_of_options()
    for option, (value, default) in changed_options(settings).items():
        if name not in readers.get(option, name):
            yield (
                f"{option}={value!r} does nothing for the objective {name!r}. "
                f"Leave it at {default!r}, or train one that reads it: {', '.join(readers[option])}."
            )


def readers_of_options() -> dict[str, list[str]]:
    """option -> names of the members that read it, for every option that a surrogate reads."""
    readers: dict[str, list[str]] = {}
    for reader, member in FAMILY.items():
        for option in member.options:
            readers.setdefault(option, []).append(reader)
    return {**readers, "mean_power_final": readers["mean_power"]}


def unread_options(settings: ObjectiveSettings, *, algorithm: str) -> set[str]:
    """Options that the objective does not read, whatever they are set to.

    Args:
        algorithm: "gmpo" or "grpo", as for `objective_from`.
    """
    name = member_name(settings, algorithm=algorithm)
    unread = {option for option, members in readers_of_options().items() if name not in members}
    return unread | {"loss_type"} if algorithm == "gmpo" else unread


def options_have_their_switch(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    """Options that modify a feature come with that feature."""
    for option, (value, default) in changed_options(settings).items():
        for start, (switch, on) in NEEDS.items():
            if option.startswith(start) and option != switch and not getattr(settings, switch):
                yield f"{option}={value!r} needs {switch} to be {on}. Set that, or leave {option} at {default!r}."


def window_is_sound(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    """`delta` caps what the window leaves open, so it is no tighter; CISPO's window is a cap on the ratio itself."""
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    if name == "cispo":
        if settings.epsilon_high is None or settings.epsilon_high < 1:
            yield (
                f"epsilon_high={settings.epsilon_high!r} with loss_type='cispo': there it is the cap on the ratio "
                "itself, and less than 1 would scale down even unmoved tokens. Set for example epsilon_high=5.0."
            )
    elif settings.delta is not None:
        bound, what = (high, "epsilon_high") if name == "gmpo" else (1 + high, "1 + epsilon_high")
        if settings.delta < bound:
            kind = "log-ratios" if name == "gmpo" else "ratios"
            yield (
                f"delta={settings.delta!r} is below {what} = {bound:g}. It bounds {kind} of negative advantages from "
                f"above and must leave the clip window open: use at least {bound:g}, or None for no bound."
            )


def mean_power_is_of_tokens(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    powered = settings.mean_power != 0 or settings.mean_power_final is not None
    if powered and settings.importance_sampling_level == "sequence":
        yield (
            f"mean_power={settings.mean_power!r}, mean_power_final={settings.mean_power_final!r} with "
            "importance_sampling_level='sequence': the sequence level sums log-ratios and has no mean over tokens. "
            "Use importance_sampling_level='token', or leave mean_power at 0.0 and mean_power_final at None."
        )


def correction_has_bounds(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    correction = correction_from(settings)
    if correction is None:
        return
    low, high = correction.low, correction.high
    if low is not None and high is not None and low >= high:
        yield (
            f"vllm_importance_sampling_clip_min={low!r} is not below vllm_importance_sampling_clip_max={high!r}. "
            "Lower the one, raise the other, or set one to None."
        )
    if low is None and high is None and not correction.masks:
        yield (
            f"vllm_importance_sampling_mode={correction.mode!r} has nothing to truncate to: set "
            "vllm_importance_sampling_clip_max (for example 3.0) or vllm_importance_sampling_clip_min."
        )


def correction_fits_vespo(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    correction = correction_from(settings)
    if name == "vespo" and correction is not None and correction.mode.startswith("geometric"):
        yield (
            f"vllm_importance_sampling_mode={correction.mode!r} with loss_type='vespo': VESPO multiplies the ratios of "
            "all tokens of a completion, and a geometric mean is not their product. Use a token_* or sequence_* mode."
        )


def entropy_range_is_ordered(settings: ObjectiveSettings, name: str) -> Iterator[str]:
    low, high = settings.entropy_coef_min, settings.entropy_coef_max
    if settings.use_adaptive_entropy and low > high:
        yield f"entropy_coef_min={low!r} is above entropy_coef_max={high!r}. Swap them."


RULES = (
    numbers_are_finite,
    options_are_read,
    options_have_their_switch,
    window_is_sound,
    mean_power_is_of_tokens,
    correction_has_bounds,
    correction_fits_vespo,
    entropy_range_is_ordered,
)
