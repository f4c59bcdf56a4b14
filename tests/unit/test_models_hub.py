"""Hub ids: models from a hub cache on disk, arguments passed on, and no waiting where the hub has no address."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch

from holdfast.data import raw_rows, read_examples
from holdfast.errors import UserError
from holdfast.hub import hub_is_unreachable
from holdfast.models import load_model, load_tokenizer, source_hash

COMMITS = {"main": "1" * 40, "v1": "2" * 40}


@pytest.fixture
def cached(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub id whose two revisions lie in a hub cache, laid out as huggingface_hub does it; v1 has doubled weights."""
    from safetensors.torch import load_file, save_file

    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for name, commit in COMMITS.items():
        shutil.copytree(tiny_model, repository / "snapshots" / commit)
        (repository / "refs" / name).write_text(commit)
    doubled = repository / "snapshots" / COMMITS["v1"] / "model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(doubled).items()}, doubled, metadata={"format": "pt"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return "someone/tiny"


def test_a_model_from_the_hub_with_its_revision(cached: str, tiny_model: Path) -> None:
    local, _ = load_model(tiny_model)
    model, tokenizer = load_model(cached)
    doubled, _ = load_model(cached, revision="v1")
    for name, parameter in local.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
        assert torch.equal(doubled.get_parameter(name), 2 * parameter)
    assert load_tokenizer(cached)("text").input_ids == tokenizer("text").input_ids
    assert source_hash(cached) == f"someone/tiny@{COMMITS['main']}"
    assert source_hash(cached, revision="v1") == f"someone/tiny@{COMMITS['v1']}"
    with pytest.raises(UserError, match=r"model 'someone/tiny' at revision 'v2': no such folder, and the hub can't be"):
        load_model(cached, revision="v2")


def test_data_sets_by_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, name: str | None, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_list([{"question": "a", "answer": "b"}, {"question": "c", "answer": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert raw_rows("owner/name:main", split="train[:10%]")[0] == {"question": "a", "answer": "b"}
    assert len(raw_rows("squad")) == 2
    assert asked == [("owner/name", "main", "train[:10%]"), ("squad", None, "train")]
    with pytest.raises(UserError, match=r"owner/name:2: column 'completion' is nothing \(null\)"):
        read_examples("owner/name", columns={"prompt": "question", "completion": "answer"})


def test_the_hub_is_asked_only_where_it_has_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_address(*_: Any) -> list[Any]:
        raise socket.gaierror("Name or service not known")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    assert not hub_is_unreachable()
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    assert hub_is_unreachable()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")  # a proxy looks names up by itself
    assert not hub_is_unreachable()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub_is_unreachable()
