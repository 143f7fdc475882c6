"""gmpo: train language models by Geometric-Mean Policy Optimization (arXiv:2507.20673).

    from gmpo import GMPOConfig, GMPOTrainer

The names are loaded when they are first used, so that `import gmpo` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmpo.config import GMPOConfig, GRPOConfig
    from gmpo.trainer import GMPOTrainer, GRPOTrainer

__version__ = "0.1.0"
__all__ = ["GMPOConfig", "GMPOTrainer", "GRPOConfig", "GRPOTrainer", "__version__"]

_HOMES = {
    "GMPOConfig": "config",
    "GRPOConfig": "config",
    "GMPOTrainer": "trainer",
    "GRPOTrainer": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gmpo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gmpo.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
