"""A real model with adapters learns, and its base stays bitwise what it was."""

from pathlib import Path

import pytest

from benchmarks import adapters
from examples import smollm2


@pytest.mark.smollm2
def test_adapters_learn_and_the_base_weights_stay():
    folder = smollm2.prepared(Path(__file__).parents[2] / ".cache")
    rewards, _ = adapters.trained(
        folder, adapters=True, steps=8
    )  # compares the base's weights itself
    assert rewards[-1] > rewards[0] + 0.1, rewards
