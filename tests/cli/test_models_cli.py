"""``holdfast models``: thin over the library, mistakes end with code 2 and one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast import fetch
from holdfast.cli import main

Captured = pytest.CaptureFixture[str]


def test_list_shows_what_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HOLDFAST_MODELS", str(tmp_path))
    assert main(["models", "list"]) == 0
    shown = capsys.readouterr().out
    assert "lab " in shown
    assert "not fetched yet: holdfast models get smollm2-135m" in shown
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").touch()
    assert main(["models", "list"]) == 0
    assert str(tmp_path / "smollm2-135m") in capsys.readouterr().out


def test_get_passes_name_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []

    def get_model(name: str, out: Path | None) -> Path:
        asked.append((name, out))
        return out or Path("cache") / name

    monkeypatch.setattr(fetch, "get_model", get_model)
    assert main(["models", "get", "smollm2-135m", "--out", str(tmp_path / "m")]) == 0
    assert f"model: {tmp_path / 'm'}" in capsys.readouterr().out
    assert main(["models", "get", "smollm2-135m"]) == 0
    assert "model: smollm2-135m" in capsys.readouterr().out
    assert asked == [("smollm2-135m", tmp_path / "m"), ("smollm2-135m", None)]


def test_mistakes_end_with_code_2(tmp_path: Path, capsys: Captured) -> None:
    assert main(["models", "get", "smollm", "--out", str(tmp_path / "m")]) == 2
    shown = capsys.readouterr()
    assert shown.err == "holdfast: unknown model 'smollm'. Did you mean 'smollm2-135m'?\n"
    assert main(["models", "get"]) == 2
    assert not (tmp_path / "m").exists()
