"""The floors of the house: who may import whom, what a folder's map says, what a cheap import costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gmpo

ROOT = Path(gmpo.__file__).parent
FLOORS = {
    "types": 1,
    "token_sets": 1,
    "option": 1,
    "distributed": 1,
    "sharding": 1,
    "unwrap": 1,
    "model_name": 1,
    "hooks": 1,
    "data": 2,
    "objective": 2,
    "attention": 2,
    "rollout": 3,
    "policy": 3,
    "reward": 3,
    "report": 3,
    "inherited_options": 4,
    "config": 4,
    "arguments": 4,
    "collect": 4,
    "learn": 4,
    "nonfinite": 4,
    "optimizer_batches": 4,
    "stages": 4,
    "run": 4,
    "trainer": 4,
    "cli": 5,
}
STAGES = {"data", "objective", "attention", "rollout", "policy", "reward", "report"}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
FOLDERS = sorted({path.parent for path in FILES} - {ROOT})


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def module(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Modules of gmpo that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & {module(other) for other in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    here = room(path)
    for other in {name.split(".")[1] for name in imported_modules(path)} - {here}:
        below = FLOORS[other] < FLOORS[here]
        composes = FLOORS[other] == FLOORS[here] in (1, 4)
        config_reads = here == "config" and FLOORS[other] <= 3
        assert below or composes or config_reads, (
            f"{here} (floor {FLOORS[here]}) imports {other} (floor {FLOORS[other]})"
        )


def test_no_two_files_import_each_other():
    imports = {module(path): imported_modules(path) for path in FILES}

    def reachable(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for name in imports[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        return seen

    assert [name for name in imports if name in reachable(name)] == []


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} == FLOORS.keys()


def test_the_config_reads_only_settings_and_checks_of_the_stages():
    for name in imported_modules(ROOT / "config.py"):
        parts = name.split(".")
        if parts[1] in STAGES:
            assert parts[-1] in ("settings", "check"), name


@pytest.mark.parametrize(
    "folder", [ROOT, *FOLDERS], ids=lambda path: str(path.relative_to(ROOT.parent))
)
def test_the_map_of_a_folder_names_what_is_in_it(folder):
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    assert text is not None
    named = set(re.findall(r"^(\w+(?:\.py|/))  +\S", text, re.MULTILINE))
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
    rooms = {f"{path.name}/" for path in folder.iterdir() if list(path.glob("*.py"))}
    assert named == files | rooms


def test_maps_import_nothing():
    for folder in FOLDERS:
        if folder.name != "cli":
            assert imported_modules(folder / "__init__.py") == set(), folder


@pytest.mark.parametrize("name", ["gmpo", "gmpo.cli"])
def test_a_cheap_import_pulls_in_nothing_heavy(name):
    heavy = "('torch', 'transformers', 'datasets', 'vllm', 'peft')"
    code = f"import sys, {name}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_no_peer_is_imported():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "import trl" not in text and "from trl" not in text, path


def test_nothing_of_ours_unpickles():
    """Weights and states come from elsewhere; only ranks that trust each other exchange objects.

    A reward's worker process unpickles what its own parent writes to its stdin, and nothing else.
    """

    def offends(node: ast.AST) -> bool:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            return bool(names & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"})
        return isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"

    offenders = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path not in (ROOT / "reward" / "pool.py", ROOT / "reward" / "worker.py")
        and any(offends(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    ]
    assert offenders == []


def test_no_posix_module_is_needed_to_import_gmpo():
    """Windows has none of these.  torch and others are imported first: they have ways around it."""
    code = """
import sys
import torch, transformers, accelerate, datasets, psutil
import transformers.trainer
for name in ("resource", "fcntl", "termios", "pwd", "grp"):
    sys.modules[name] = None
import gmpo.trainer, gmpo.cli.train, gmpo.reward.code, gmpo.reward.worker
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
