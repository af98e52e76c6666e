"""Who may import whom: DESIGN's layers, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("gateway", "worker", "control", "shared", "realtime_serve")
FORBIDDEN = {
    "gateway": {"worker", "control", "realtime_serve", "torch", "transformers", "arq"},
    "worker": {"gateway", "control", "realtime_serve", "aiohttp", "arq"},
    "control": {"gateway", "worker", "realtime_serve", "torch", "transformers", "aiohttp"},
    "shared": {"gateway", "worker", "control", "realtime_serve", "torch", "transformers", "arq"},
    "realtime_serve": {"torch", "transformers", "arq"},
}
HEAVY = {"torch", "transformers", "safetensors", "gguf", "vllm"}


def _files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def _imports(tree: ast.AST) -> Iterator[str]:
    """Every imported module, wherever in the file the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def _imported_at_load(tree: ast.Module) -> Iterator[str]:
    """Modules that are imported when the file is, so neither in functions nor for types only."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _imports(node)
        waiting.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_layers(path: Path) -> None:
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).parts[0]
    roots = {name.partition(".")[0] for name in _imports(tree)}
    assert not roots & FORBIDDEN[package]
    if path.relative_to(ROOT).parts[:2] != ("worker", "engine"):
        assert not roots & HEAVY, "torch and transformers belong in worker/engine"
    at_load = {name.partition(".")[0] for name in _imported_at_load(tree)}
    if package == "realtime_serve":
        assert not at_load & {"gateway", "worker", "control"}, "processes import, `up` starts"


@pytest.mark.parametrize("module", ["gateway.app", "control.main", "realtime_serve.cli"])
def test_imports_where_torch_is_not_installed(module: str) -> None:
    code = f"""
import sys
for name in {sorted(HEAVY)!r}:
    sys.modules[name] = None  # what an import statement then finds is: not installed
import {module}
assert not any(name.split(".")[0] == "worker" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)


def test_scheduling_needs_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import worker.engine.scheduler, worker.engine.blocks, worker.engine.echo, worker.engine.interface
import worker.engine.pace, worker.engine.prefix
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)
