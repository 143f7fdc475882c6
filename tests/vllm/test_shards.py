"""Two ranks that train with vLLM, copied or sharded: an engine each, one for both, or a server."""

import pytest
import torch

from tests.distributed.runs import KINDS, marked, with_two_ranks
from tests.tiny import tiny_tokenizer
from tests.vllm.servers import Server
from tests.vllm.sharded_program import RUNS, SERVED, train_and_score
from tests.vllm.small import SEQUENCES, small_model, trainer_logps

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    small_model(seed=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.delenv("VLLM_API_KEY", raising=False)
        it = Server(folder, "--dtype", "float32").start()
        patch.setenv("SERVER", it.address)
        yield it
        it.kill()


@pytest.fixture(scope="module", params=marked(KINDS))
def ranks(request, tmp_path_factory, server):
    return with_two_ranks(request.param, train_and_score, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", [*RUNS, SERVED])
def test_the_engines_of_two_ranks_compute_what_both_trained(ranks, case):
    start = small_model()
    policy = small_model()
    policy.load_state_dict(ranks[0][case]["weights"], strict=False)
    assert any(
        not torch.equal(p, q) for p, q in zip(policy.parameters(), start.parameters(), strict=True)
    )
    engines = [logps for rank in ranks for logps in rank[case]["logps"]]
    assert len(engines) == 2
    for engine in engines:
        for ids, logps in zip(SEQUENCES, engine, strict=True):
            assert (torch.tensor(logps) - trainer_logps(policy, ids)).abs().max() < 1e-4
            assert (torch.tensor(logps) - trainer_logps(start, ids)).abs().max() > 1e-3
