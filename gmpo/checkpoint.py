"""What a run holds beside what the Trainer saves, in its checkpoints: as JSON and safetensors, without pickle."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

PLAIN = "gmpo_state.json"


class Stateful(Protocol):
    """What is put back by what it gave."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values, or tensors alone.  Every rank must call."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        ...


def save_state(parts: Mapping[str, Stateful], folder: str, *, write: bool) -> None:
    """Put the state of all parts into a checkpoint.  Every rank must call.

    Args:
        parts: By names that stay the same from run to run; what they hold is the same on all ranks.
        folder: The checkpoint's, which exists.
        write: Whether this rank writes.
    """
    plain = {}
    for name, part in parts.items():
        state = part.state_dict()
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            plain[name] = state
        elif write:
            save_file(
                {key: tensor.contiguous() for key, tensor in state.items()},
                tensors_of(name, folder),
            )
    if write:
        Path(folder, PLAIN).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def load_state(parts: Mapping[str, Stateful], folder: str) -> None:
    """Put back what `save_state` saved; parts that the checkpoint knows nothing of stay as they are."""
    file = Path(folder, PLAIN)
    plain = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, part in parts.items():
        if name in plain:
            part.load_state_dict(plain[name])
        elif tensors_of(name, folder).exists():
            part.load_state_dict(load_file(tensors_of(name, folder)))


def tensors_of(name: str, folder: str) -> Path:
    return Path(folder, f"gmpo_{name}.safetensors")


def last_whole_checkpoint(output_dir: str) -> str:
    """The newest checkpoint in `output_dir` that was written to its end (trainer_state.json is written last)."""
    folders = (
        [f for f in os.listdir(output_dir) if f.startswith("checkpoint-")]
        if os.path.isdir(output_dir)
        else []
    )
    whole = [
        f for f in folders if os.path.exists(os.path.join(output_dir, f, "trainer_state.json"))
    ]
    if not whole:
        raise ValueError(
            f"resume_from_checkpoint=True, but {output_dir!r} holds no whole checkpoint. "
            "Train without it, or name a folder."
        )
    return os.path.join(output_dir, max(whole, key=lambda name: int(name.rsplit("-", 1)[-1])))
