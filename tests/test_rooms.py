"""Who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "outgrow"
# room -> the rooms of ours that it may import
MAY = {
    "errors": set(),
    "spaces": {"errors"},
    "arch": {"errors", "spaces"},
    "growth": {"errors", "spaces", "arch"},
    "files": {"errors"},
    "config": {"errors"},
    "checkpoint": {"errors", "spaces", "arch", "growth", "files"},
    "models": {"errors", "config", "spaces", "arch", "growth", "checkpoint", "files"},
    "data": {"errors", "config", "files"},
    "training": {"errors", "config", "spaces", "arch", "growth", "files", "checkpoint", "models", "data"},
    "extensions": {"errors", "config", "arch", "growth"},
    "evaluation": {"errors", "config", "files", "arch", "checkpoint", "models", "data"},
    "api": {"errors", "arch", "checkpoint", "growth"},
    "scaling": {"errors", "config", "arch"},
    "lab": {
        "extensions",
        "scaling",
        "errors",
        "config",
        "spaces",
        "arch",
        "growth",
        "files",
        "checkpoint",
        "models",
        "data",
        "training",
        "evaluation",
    },
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("room", MAY)
def test_a_room_imports_only_what_lies_below_it(room):
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("outgrow.")}
        assert rooms <= MAY[room] | {room}, path


def test_every_room_has_a_rule():
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__", "cli"} == set(MAY)


@pytest.mark.parametrize("room", ["checkpoint", "training"])
def test_neither_disk_nor_engine_knows_an_operator(room):
    for path in (ROOT / room).rglob("*.py"):
        assert not [name for name in imports(path) if name.startswith("outgrow.growth.operators")], path


@pytest.mark.parametrize("room", ["spaces", "arch", "growth"])
def test_the_core_does_no_file_io_and_imports_no_torch(room):
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))
    for path in files:
        assert not imports(path) & {"os", "io", "pathlib", "shutil", "tempfile", "torch", "transformers"}, path
        assert "open(" not in path.read_text(), path


def test_importing_outgrow_and_its_help_costs_no_torch():
    code = "import outgrow, outgrow.cli, outgrow.growth.operators, outgrow.checkpoint.grow, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
