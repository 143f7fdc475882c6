"""Ask the peer, in its own process, for what the tests compare with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.peer import Worker
from tests.parity.cases import Case


class Peer:
    """Losses and gradients as the peer computes them."""

    def __init__(self, worker: Worker, scratch: Path):
        self.worker, self.scratch = worker, scratch

    def losses(self, cases: Sequence[Case]) -> list[dict[str, Tensor]]:
        """For each case the loss, and its gradients in "logps" and "entropy"."""
        tensors = {
            f"{i}/{name}": value
            for i, case in enumerate(cases)
            for name, value in case.rows.items()
        }
        save_file(tensors, self.scratch / "rows.safetensors")
        fields = ("member", "options", "micro_batches", "windows", "other_tokens", "other")
        listed = [{name: getattr(case, name) for name in fields} for case in cases]
        (self.scratch / "cases.json").write_text(json.dumps(listed))
        found = self._ask(
            "losses",
            cases=str(self.scratch / "cases.json"),
            tensors=str(self.scratch / "rows.safetensors"),
        )
        return [
            {name: found[f"{i}/{name}"] for name in ("loss", "logps", "entropy")}
            for i in range(len(cases))
        ]

    def gradients(
        self, batch: dict[str, Tensor], *, gmpo: bool, options: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Gradients by the name of the parameter, and the "loss"."""
        save_file(batch, self.scratch / "batch.safetensors")
        return self._ask(
            "gradients", batch=str(self.scratch / "batch.safetensors"), gmpo=gmpo, options=options
        )

    def _ask(self, job: str, **message: Any) -> dict[str, Tensor]:
        out = self.scratch / "answers.safetensors"
        self.worker.ask(job=job, out=str(out), **message)
        return load_file(out)
