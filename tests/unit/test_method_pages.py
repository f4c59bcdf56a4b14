"""Every method has a page that says what it is, and its snippet is a recipe that builds the method."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from holdfast.method import describe, from_spec
from holdfast.methods import METHODS

PAGES = Path(__file__).parents[2] / "docs" / "methods"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_page(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    for heading in ("## Settings", "## Cost", "## When it fails", "## Measured on the lab"):
        assert heading in text or (name == "l1" and "Settings and cost are those of [l2](l2.md)" in text), heading
    assert "## Formula" in text or "## Definition" in text
    text += (PAGES / "l2.md").read_text(encoding="utf-8") if "[l2](l2.md)" in text else ""
    text += (PAGES / "ewc.md").read_text(encoding="utf-8") if "[ewc](ewc.md)" in text else ""
    for field in dataclasses.fields(METHODS[name]):
        assert f"`{field.name}" in text, f"the page does not explain {field.name}"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_pages_recipe_builds_the_method(name: str) -> None:
    snippets = re.findall(r"```yaml\n(.*?)```", (PAGES / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    for entry in yaml.safe_load(snippets[0])["methods"]:
        ((key, settings),) = entry.items()
        method = from_spec(key, settings)
        assert key == name and describe([method])


def test_every_method_is_in_the_table() -> None:
    table = (PAGES / "README.md").read_text(encoding="utf-8")
    assert all(f"[{name}]({name}.md)" in table for name in METHODS)
