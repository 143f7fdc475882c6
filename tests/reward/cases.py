"""Rollouts and calls, made by hand."""

from gmpo.reward.types import RewardCall
from gmpo.types import Prompt, Rollout


def rollout(source="2 + 2 =", completion="4", ids=(5, 2)):
    return Rollout(Prompt([1], source), list(ids), "stop", completion=completion)


def call(
    rollouts,
    columns=None,
    *,
    log_extra=lambda column, values: None,
    log_metric=lambda name, value: None,
):
    return RewardCall(rollouts, columns or {}, "state", log_extra, log_metric)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}
