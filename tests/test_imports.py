"""The floors of the house: who may import whom, and what a cheap import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gmpo

ROOT = Path(gmpo.__file__).parent
FLOORS = {
    "types": 1,
    "options": 1,
    "distributed": 1,
    "data": 2,
    "objective": 2,
    "rollout": 3,
    "policy": 3,
    "reward": 3,
    "report": 3,
    "arguments": 4,
    "collect": 4,
    "learn": 4,
    "config": 4,
    "checkpoint": 4,
    "trainer": 4,
    "cli": 5,
}
STAGES = {"data", "objective", "rollout", "policy", "reward", "report"}


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def gmpo_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "gmpo"
                else {node.module}
            )
    return {
        name.split(".")[1]
        for name in names
        if name.startswith("gmpo.") and name.split(".")[1] in FLOORS
    }


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    here = room(path)
    for other in gmpo_imports(path) - {here}:
        below = FLOORS[other] < FLOORS[here]
        composes = FLOORS[other] == FLOORS[here] == 4 or (here == "config" and FLOORS[other] <= 3)
        assert below or composes, (
            f"{here} (floor {FLOORS[here]}) imports {other} (floor {FLOORS[other]})"
        )


def test_the_config_reads_settings_and_checks_alone_of_the_stages():
    for node in ast.walk(ast.parse((ROOT / "config.py").read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[1:2] in [[s] for s in STAGES]
        ):
            assert node.module.endswith((".settings", "objective.family")), node.module


@pytest.mark.parametrize("module", ["gmpo", "gmpo.cli"])
def test_a_cheap_import_pulls_in_nothing_heavy(module):
    heavy = "('torch', 'transformers', 'datasets', 'vllm', 'peft')"
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_no_peer_is_imported():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "import trl" not in text and "from trl" not in text, path
