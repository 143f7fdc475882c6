"""Two ranks: killed and resumed to the bit; a signal or an error of one of them ends both."""

import os
import signal
from pathlib import Path

import pytest
import torch

from gmpo import distributed
from gmpo.run.checkpoint import check_whole
from tests.distributed.runs import result_of, trainer, with_two_ranks
from tests.trainer.runs import KillAt, Killed, differences, outcome

RUN = {
    "dtype": torch.float32,
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 1,
    "num_iterations": 1,
    "max_steps": 6,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "log_completions": True,
    "save_strategy": "steps",
    "save_steps": 1,
}


class SendFromLast(KillAt):
    """Sends SIGTERM to the last rank only."""

    def __init__(self, event, step):
        def handler(args, state, control, **kwargs):
            if state.global_step == step and distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        setattr(self, event, handler)


def killed_and_resumed(folder, options):
    make = {"rows": 4, **RUN, **options}
    whole = trainer(f"{folder}/whole", **make)
    whole.train()

    killed = trainer(f"{folder}/killed", **make)
    killed.add_callback(KillAt("on_save", 2))
    with pytest.raises(Killed):
        killed.train()
    stopped = trainer(f"{folder}/killed", **make)
    stopped.add_callback(SendFromLast("on_step_begin", 4))
    with pytest.raises(SystemExit) as caught:
        stopped.train(resume_from_checkpoint=True)
    resumed = trainer(f"{folder}/killed", **make)
    resumed.train(resume_from_checkpoint=True)

    # Only the first rank writes the files that are compared.
    mine = distributed.rank() == 0
    found = differences(outcome(whole), outcome(resumed)) if mine else []
    weights = [result_of(run)["weights"] for run in (whole, resumed)]
    return {
        "code": caught.value.code,
        "differences": found,
        "same weights": all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]),
    }


def test_two_ranks_resume_to_the_bit_and_stop_together(tmp_path):
    ranks = with_two_ranks("copies", killed_and_resumed, tmp_path)
    for rank in ranks:
        assert rank == {"code": 143, "differences": [], "same weights": True}
    check_whole(Path(tmp_path, "killed", "checkpoint-5"))
