"""The files of a checkpoint: our state as JSON and safetensors, and a manifest of digests.

A checkpoint is written into a folder of another name, to which the manifest is added last, with
the size and the digest of every file.  Then it is synced and renamed, so a checkpoint is there
whole or not at all.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "gmpo_manifest.json"
TENSOR = "__tensor__"  # stands in the JSON for a tensor of the safetensors file

Plain = Any  # JSON: None, bool, int, float, str, lists and dicts of them; tensors among them
State = dict[str, Plain]


class Stateful(Protocol):
    """A part of a run whose state can be saved and restored."""

    def state_dict(self) -> State:
        """Return plain values and tensors that later steps do not change.  Every rank must call."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Go on from what `state_dict` returned."""
        ...


class DamagedCheckpoint(ValueError):
    """A checkpoint that can't be resumed; the message names the file and the folder."""


# -- our state -------------------------------------------------------------------------------------


def save_state(state: Mapping[str, State], folder: str | Path, name: str) -> None:
    """Write `state` to {name}.json and, if it holds tensors, to {name}.safetensors in `folder`."""
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(dict(state), "", tensors)
    Path(folder, f"{name}.json").write_text(json.dumps(plain) + "\n", encoding="utf-8")
    if tensors:
        save_file(tensors, Path(folder, f"{name}.safetensors"))


def load_state(folder: str | Path, name: str) -> dict[str, State]:
    """Return what `save_state` wrote."""
    plain = json.loads(Path(folder, f"{name}.json").read_text(encoding="utf-8"))
    file = Path(folder, f"{name}.safetensors")
    return _with_tensors(plain, load_file(file) if file.exists() else {})


def _without_tensors(value: Plain, path: str, tensors: dict[str, Tensor]) -> Plain:
    """Return `value` with its tensors moved to `tensors`; scalars become numbers."""
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return value.item()
        tensors[path] = value.detach().cpu().contiguous()
        return {TENSOR: path}

    if isinstance(value, dict):
        return {
            key: _without_tensors(item, f"{path}.{key}" if path else key, tensors)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_tensors(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _with_tensors(value: Plain, tensors: Mapping[str, Tensor]) -> Plain:
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value


# -- whole or not at all ---------------------------------------------------------------------------


def finish_checkpoint(folder: str | Path, facts: Mapping[str, Plain]) -> None:
    """Sync everything in `folder` to the disk, then add the manifest, which says that it is whole.

    Args:
        facts: What the manifest tells beside the files: run, step, options, versions.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            _sync(path)
            files[path.relative_to(folder).as_posix()] = {
                "size": path.stat().st_size,
                "xxh3_128": digest_of_file(path),
            }

    manifest = {**facts, "files": files}
    text = json.dumps({"checksum": _checksum(manifest), "manifest": manifest}, indent=1)
    fresh = folder / (MANIFEST + ".tmp")
    fresh.write_text(text, encoding="utf-8")
    _sync(fresh)
    os.replace(fresh, folder / MANIFEST)
    _sync(folder)


def move_into_place(finished: str | Path, place: str | Path) -> None:
    """Rename a finished checkpoint to `place`; one that is there already is deleted afterwards."""
    finished, place = Path(finished), Path(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    former = finished.with_name(f"former-{place.name}")
    shutil.rmtree(former, ignore_errors=True)
    if place.exists():
        os.replace(place, former)
    os.replace(finished, place)
    _sync(place.parent)
    shutil.rmtree(former, ignore_errors=True)


def delete_checkpoint(folder: str | Path) -> None:
    """Delete a checkpoint, its manifest first: what a crash leaves of it is not taken for whole."""
    Path(folder, MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def read_manifest(folder: str | os.PathLike[str]) -> State:
    """Return the manifest of a checkpoint, without looking at the other files.

    Raises:
        DamagedCheckpoint: If there is none, or it was changed.
    """
    path = Path(folder, MANIFEST)
    if not path.exists():
        raise DamagedCheckpoint(
            f"{str(folder)!r} was not written to its end (or not by gmpo): it has no {MANIFEST}."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        manifest = content["manifest"]
        is_right = content["checksum"] == _checksum(manifest)
    except (ValueError, KeyError, TypeError, OSError):
        is_right, manifest = False, {}
    if not is_right:
        raise DamagedCheckpoint(f"{MANIFEST} in {str(folder)!r} is damaged.")
    return manifest


def check_whole(folder: str | os.PathLike[str]) -> State:
    """Return the manifest of a checkpoint whose files are all as they were written.

    Raises:
        DamagedCheckpoint: If one is not, or it can't be resumed (`save_only_model`).
    """
    manifest = read_manifest(folder)
    for name, known in manifest["files"].items():
        path = Path(folder, name)
        if not path.is_file():
            raise DamagedCheckpoint(f"{name} is missing in {str(folder)!r}.")
        size = path.stat().st_size
        if size != known["size"]:
            raise DamagedCheckpoint(
                f"{name} in {str(folder)!r} is damaged: it has {size} bytes, and was saved with "
                f"{known['size']}."
            )
        if digest_of_file(path) != known["xxh3_128"]:
            raise DamagedCheckpoint(
                f"{name} in {str(folder)!r} is damaged: its content is not what was saved."
            )

    if not manifest.get("resumable", True):
        raise DamagedCheckpoint(
            f"{str(folder)!r} holds the model only (save_only_model=True), which can't be resumed. "
            "Give it as model to begin a new run from its weights."
        )
    return manifest


def digest_of_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest_of(value: Plain) -> str:
    """Return a digest of plain values, the same in every process; others count by their type."""
    text = json.dumps(value, sort_keys=True, default=lambda other: type(other).__name__)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _checksum(manifest: Mapping[str, Plain]) -> str:
    return digest_of(json.loads(json.dumps(manifest)))


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
