"""Training ranks that share an engine, for real."""

import subprocess
import sys

import pytest

from tests.vllm.servers import free_port

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def test_two_ranks_share_an_engine_and_each_gets_its_own_completions():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launcher, "--master_port", str(free_port()), "-m", "tests.vllm.rank_program"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert all(f"rank {rank} is content" in finished.stdout for rank in range(2))
