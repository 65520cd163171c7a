"""Imports run one way, from the base up, and never in a circle. docs/architecture.md draws the same order."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Each line may import from the lines above it, and a folder from itself. Names on one line keep apart.
ORDER = [
    ["configurator"],
    ["modeling"],
    ["formats"],
    ["model", "dataset"],
    ["training", "generation"],
    ["loop", "distillation", "evals"],
    ["prepare"],
    ["train", "distill", "sft", "dpo", "grpo", "verifier", "sample", "serve", "eval", "export"],
    ["tools"],
    ["bench"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def modules() -> dict[str, Path]:
    """{"training.run": its file} of everything but the tests and config/."""
    files = [*ROOT.glob("*.py"), *(file for name in LEVEL for file in (ROOT / name).rglob("*.py"))]
    return {str(file.relative_to(ROOT).with_suffix("")).replace("/", "."): file for file in files}


def imports(file: Path, known: set[str]) -> set[str]:
    """The modules of this project that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= inside or {node.module}
    return found & known


GRAPH = {name: imports(file, set(modules())) for name, file in modules().items()}


def test_every_module_has_a_level():
    assert {name.split(".")[0] for name in GRAPH} == LEVEL.keys()


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_no_import_runs_upward(name):
    room = name.split(".")[0]
    for imported in GRAPH[name]:
        other = imported.split(".")[0]
        assert other == room or LEVEL[other] < LEVEL[room], f"{name} imports {imported}"


def start_imports(name: str) -> set[str]:
    """What a module imports when it is imported, through the project's own modules too; not TYPE_CHECKING."""
    seen, left = set(), [name]
    while left:
        body = ast.parse(modules()[left.pop()].read_text()).body
        new = {alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
               for node in body if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
        new |= {imported.rpartition(".")[0] for imported in new}
        left += (new - seen) & modules().keys()
        seen |= new
    return seen


def test_prepare_starts_without_torch():
    """Importing torch takes two seconds, and text needs none of it."""
    found = start_imports("prepare")
    assert "formats.tokenizer" in found and not {name for name in found if name.split(".")[0] == "torch"}
    assert "torch" in start_imports("sample")


def test_no_circles():
    """Take away what imports nothing that is left, again and again: a circle would remain."""
    left = {name: set(imported) for name, imported in GRAPH.items()}
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in free:
            del left[name]
    assert not left
