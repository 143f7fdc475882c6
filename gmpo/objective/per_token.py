"""The part that the members which charge each token have in common."""

import torch
from torch import Tensor

from gmpo.objective.aggregate import row_mean
from gmpo.objective.types import SurrogateInputs

EXPONENT_LIMIT = 80.0  # exp(80) = 5.5e34 and exp(-80) are normal numbers in float32

LOG_WEIGHTS = {
    "token": lambda x: x.log_ratio,
    "sequence": lambda x: row_mean(x.log_ratio, x.mask),  # GSPO, arXiv:2507.18071
}


def log_weights(x: SurrogateInputs, level: str) -> Tensor:
    """Return log w of every selected token, [B, T].

    It is 0 elsewhere, so that no exponential of an unselected token can overflow.

    Args:
        x: Log-ratios and selected tokens.
        level: "token" takes the token's own log-ratio, "sequence" the mean over the completion.
    """
    return torch.where(x.select, LOG_WEIGHTS[level](x), 0)


def charged(x: SurrogateInputs, cost: Tensor) -> Tensor:
    """Return the selected tokens' costs after the correction, [B, T]; 0 elsewhere."""
    return torch.where(x.select, cost * x.correction, 0)
