"""Recipes as files: where they are, how they are read, and ``key=value`` overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from holdfast.errors import UserError, did_you_mean


def recipe_folder() -> Path:
    """The recipes that come with holdfast: inside the package, or beside ``src`` in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def builtin_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with holdfast."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a built-in one. Raises UserError with the nearest name."""
    path = Path(source)
    if path.is_file():
        return path
    builtin = builtin_recipes()
    if str(source) in builtin:
        return builtin[str(source)]
    hint = "" if path.suffix in {".yaml", ".yml"} else did_you_mean(str(source), builtin)
    raise UserError(f"No recipe '{source}': neither a file nor a built-in recipe.{hint}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe's keys, unchecked. Raises UserError with file and line."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML text file: {error}.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys (model, tasks, arms, …).")
    return data


def override(data: dict[str, Any], text: str) -> None:
    """Apply one ``a.b.c=value``; list items are named by index or by their ``name``; values are YAML.

    A key that is there and has dots in its name (``arms.sfa-0.25``) is found as a whole.
    """
    key, separator, raw = text.partition("=")
    if not separator or not key:
        raise UserError(f"'{text}': an override is written key=value, for example training.learning_rate=1e-4.")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise UserError(f"'{text}': the value is not valid YAML.") from None
    parts = _names(data, key.split("."))
    node: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            index = _list_index(node, part, ".".join(parts[:depth]))
            if last:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            elif not isinstance(node.get(part), dict | list):
                node[part] = _expand(part, node.get(part))
            node = node[part]
        else:
            raise UserError(f"'{text}': '{'.'.join(parts[:depth])}' is a single value and has no '{part}'.")


def _names(node: Any, parts: list[str]) -> list[str]:
    """The parts of a dotted key, those joined again that are one existing key with dots in its name."""
    found = []
    while parts:
        sizes = range(len(parts), 1, -1) if isinstance(node, dict) else ()
        size = next((n for n in sizes if ".".join(parts[:n]) in node), 1)
        name, parts = ".".join(parts[:size]), parts[size:]
        found.append(name)
        node = node.get(name) if isinstance(node, dict) else None
    return found


def _expand(key: str, value: Any) -> dict[str, Any]:
    """A mapping to descend into where the recipe used a short form or nothing: ``panel: lab`` -> {name: lab}."""
    if key == "panel" and isinstance(value, str):
        return {"name": value}
    return {}


def _list_index(node: list[Any], part: str, where: str) -> int:
    if part.isdigit():
        if int(part) < len(node):
            return int(part)
        raise UserError(f"'{where}' has {len(node)} entries; there is no {where}.{part}.")
    names = [_entry_name(entry) for entry in node]
    if part in names:
        index = names.index(part)
        if isinstance(node[index], str):
            node[index] = {"source": node[index]}
        return index
    raise UserError(f"'{where}' has no entry '{part}'.{did_you_mean(part, filter(None, names))}")


def _entry_name(entry: Any) -> str:
    if isinstance(entry, str):
        return entry.removeprefix("lab:")
    return entry.get("name") or str(entry.get("source", "")).removeprefix("lab:")
