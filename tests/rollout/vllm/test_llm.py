"""What starting vLLM in this process leaves of the trainer's own state."""

import random

import numpy as np
import pytest
import torch

from gmpo.rollout.vllm.llm import preserve_rng


def test_a_start_that_fails_gives_random_numbers_and_threads_back():
    threads = torch.set_num_threads
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = (torch.rand(1), random.random(), np.random.rand())
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    with pytest.raises(ValueError, match="no memory"), preserve_rng():
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        torch.set_num_threads = None
        raise ValueError("no memory")
    assert torch.set_num_threads is threads
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
