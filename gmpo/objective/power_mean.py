"""The power mean of a row's ratios, in log space."""

import torch
from torch import Tensor

from gmpo.objective.aggregate import row_mean

SMALLEST_POWER = 1e-3  # nearer to 0, the quotient's float32 rounding exceeds its distance from the geometric mean


def log_power_mean(logs: Tensor, counted: Tensor, power: float) -> Tensor:
    """[B, 1]: log( mean_t exp(power * logs_t) ) / power over the counted tokens, 0 for a row without any.

    Powers 1, 0 and -1 are the arithmetic, geometric and harmonic mean of exp(logs).
    """
    if abs(power) < SMALLEST_POWER:
        return row_mean(logs, counted)
    empty = ~counted.any(-1, keepdim=True)  # logsumexp over nothing but -inf has a NaN gradient
    logs = torch.where(counted, power * logs, torch.where(empty, 0.0, -torch.inf))
    length = (counted | empty).sum(-1, keepdim=True, dtype=logs.dtype)
    return (logs.logsumexp(-1, keepdim=True) - length.log()) / power
