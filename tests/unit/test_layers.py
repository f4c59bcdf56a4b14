"""Imports run downwards only: a module may import from its own layer's list and below, never from above."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "holdfast"

# top to bottom; names in one entry may import each other
LAYERS: list[set[str]] = [
    {"cli", "__main__"},
    {"study"},
    {"report"},
    {"results"},
    {"diagnose", "landscape"},
    {"recipe", "recipe_file"},
    {"merge"},  # its Pareto plane measures outputs
    {"trainer", "run_state", "unsupported"},
    # `lab` names a model and a panel, its benchmark is made of evaluate tasks, and evaluate loads models by name
    {"sources", "models", "fetch", "gguf", "evaluate", "lab", "adapters"},
    {"methods", "method"},  # from_spec looks names up in the registry
    {"data", "metrics"},
    {"probe", "window"},
    {"anchor", "tensors", "weights"},
    {"errors", "files", "hub", "lazy"},
]
HEIGHT = {name: len(LAYERS) - i for i, layer in enumerate(LAYERS) for name in layer}


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def top(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Parts of holdfast that a module imports, wherever in the file; imports for types only don't count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "holdfast" else [node.module]
            )
        found |= {name.split(".")[1] for name in names if name.startswith("holdfast.")}
    return found - {"__version__"}


def test_imports_run_downwards() -> None:
    upwards = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in modules()
        for name in sorted(imports(path))
        if HEIGHT[name] > HEIGHT[top(path)]
    ]
    assert upwards == []


def test_every_module_has_a_layer() -> None:
    assert {top(path) for path in modules()} <= set(HEIGHT)


def test_the_report_needs_neither_torch_nor_training() -> None:
    for path in (PACKAGE / "report").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        roots = {
            name.split(".")[0]
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not roots & {"torch", "transformers", "trl", "peft", "accelerate"}
