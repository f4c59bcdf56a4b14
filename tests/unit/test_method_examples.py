"""The examples run as they stand, shortened by their own options."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_trl_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SAM and SFA in an existing TRL script: three marked lines (an import and two in one call)."""
    assert (EXAMPLES / "trl_sft.py").read_text(encoding="utf-8").count("# (+)") == 3
    run(monkeypatch, "trl_sft.py", "--out", str(tmp_path), "--max-steps", "2")
    assert (tmp_path / "model.safetensors").is_file()


def test_image_classification(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "image_classification.py", "--out", str(tmp_path), "--methods", "--epochs", "1", "--count", "64")
    assert capsys.readouterr().out.count("after task") == 2
