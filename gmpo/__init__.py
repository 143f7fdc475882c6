"""gmpo: train language models by Geometric-Mean Policy Optimization (arXiv:2507.20673).

    from gmpo import GMPOConfig, GMPOTrainer

The names are loaded when they are first used, so that `import gmpo` costs nothing.

A step, from top to bottom:

trainer.py            what `transformers.Trainer` asks, answered in the order in which it asks
stages.py             the stages of a run, built from its settings
optimizer_batches.py  rows to a collection, and to the micro-batches of each optimizer step
collect.py            dataset rows to a batch: generate, score, take advantages
learn.py              a micro-batch to its gradient, in chunks that fit into memory
nonfinite.py          steps whose numbers are not finite, found before they touch the weights

The stages, each a folder with a map of its files:

data/                 dataset rows, dealt to the ranks
rollout/              prompts to completions, by an engine
reward/               completions to rewards and advantages
policy/               a batch to log-probs, or to the gradient of a loss of them
attention/            rows of segments without masks; sampling and learning share it
objective/            log-probs and advantages to a loss: pure functions
report/               metrics, completions, model card, curves
cli/                  the `gmpo` command

What they share:

types.py              what flows between the stages: read it first
token_sets.py         the tokens that a token was drawn from
distributed.py        collectives, and errors that every rank raises
sharding.py           whole parameters out of the shards of FSDP2 and ZeRO-3
unwrap.py             the model inside its wrappers

What a user gives:

config.py             GMPOConfig and GRPOConfig: the settings of all stages and the Trainer's own
option.py             declaring an option: default, legal values, help text
inherited_options.py  options of the Trainer that gmpo checks or restricts
arguments.py          checks of the trainers' arguments, before weights are loaded
model_name.py         the base model behind the name of an adapter
hooks.py              methods that a subclass may override

A run's life:

run/                  its folder and identity, its checkpoints, and what ends it
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
