"""Layers import downwards only, and the lower ones do without Lightning."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_autolr

PACKAGE = Path(lightning_autolr.__file__).parent
NAME = "lightning_autolr"
# From the bottom to the top. A layer may import itself and what stands below it.
LAYERS = ["schedules", "core", "search", "report", "engine", "callbacks", "tasks", "fit", "commands", "cli"]
WITHOUT_LIGHTNING = ["schedules", "core", "search"]


def imports(source: str, module: str) -> Iterator[str]:
    """Absolute names of all modules that a source file imports, functions and type checking included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield ".".join([*module.split(".")[: -node.level], node.module or ""])
        elif isinstance(node, ast.ImportFrom) and node.module == NAME:
            yield from (f"{NAME}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def violations(source: str, module: str) -> list[str]:
    """What a module of the package imports from above its own layer."""
    layer = module.split(".")[1]
    found = []
    for name in imports(source, module):
        parts = name.split(".")
        if parts[0] == NAME and len(parts) > 1 and parts[1] in LAYERS and LAYERS.index(parts[1]) > LAYERS.index(layer):
            found.append(f"{module} imports {name}")
        if layer in WITHOUT_LIGHTNING and parts[0] in ("lightning", "pytorch_lightning", "torchmetrics"):
            found.append(f"{module} imports {name}")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if name.split(".")[1] in LAYERS:
            yield name, path


def test_imports_point_downwards() -> None:
    assert {name.split(".")[1] for name, _ in modules()} >= set(LAYERS)
    assert [v for name, path in modules() for v in violations(path.read_text(), name)] == []


def test_the_table_of_the_engine_is_complete() -> None:
    table = (PACKAGE / "engine/__init__.py").read_text()
    named = re.findall(r"^``(\w+)``", table, re.MULTILINE)
    assert sorted(named) == sorted({path.stem for path in (PACKAGE / "engine").glob("*.py")} - {"__init__"})


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from lightning_autolr.engine.driver import SearchCallback", "lightning_autolr.search.autolrs"),
        ("import lightning_autolr.callbacks", "lightning_autolr.engine.driver"),
        ("from lightning_autolr import engine", "lightning_autolr.core.scores"),
        ("def f():\n    from ..engine import state", "lightning_autolr.core.scores"),
        ("from lightning.pytorch import Trainer", "lightning_autolr.core.scores"),
        ("import lightning", "lightning_autolr.schedules.base"),
    ],
)
def test_the_check_can_fail(source: str, module: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize("module", [*(f"{NAME}.{layer}" for layer in WITHOUT_LIGHTNING), f"{NAME}.core.record", NAME])
def test_imports_without_lightning(module: str) -> None:
    code = f"import sys, {module}; print([m for m in sys.modules if m.split('.')[0] in ('lightning', 'pytorch_lightning')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
