"""Imports only point down: format -> ops -> passes -> compile -> cache, tensor -> module -> quantize, report -> integrations -> cli."""

import ast
from pathlib import Path

import pytest

import hq_inductor

ROOT = Path(hq_inductor.__file__).parent
FLOORS = (
    "format",
    "ops",
    "passes",
    "compile",
    "cache",
    "tensor",
    "balance",
    "moments",
    "module",
    "quantize",
    "allocate",
    "report",
    "integrations",
    "cli",
    "",
)


def floor(module: str) -> int:
    """Index of the floor a module (dotted, relative to the package) belongs to."""
    return next(i for i, name in enumerate(FLOORS) if not name or module == name or module.startswith(name + "."))


def imported(path: Path) -> list[str]:
    """Modules of the package that a file imports, dotted, relative to the package."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name.removeprefix("hq_inductor.") for alias in node.names if alias.name.startswith("hq_inductor")]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = list(package[: len(package) - node.level + 1])
            parts = base + (node.module.split(".") if node.module else [])
            found += [".".join(parts)] if node.module else [".".join([*parts, alias.name]) for alias in node.names]
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    for other in imported(path):
        assert floor(other) <= floor(own), f"{own} imports {other}"


def test_no_environment_switches():
    source = "".join(path.read_text() for path in ROOT.rglob("*.py"))
    assert "os.environ" not in source and "os.getenv" not in source
