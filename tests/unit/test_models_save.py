"""A checkpoint is whole or absent, also when the disk is full; its hash is that of its tensors."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.errors import UserError
from holdfast.models import load_model, save_model, weights_hash


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; skipped where one can't be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk_leaves_nothing(tiny_model: Path, small_disk: Path) -> None:
    model, tokenizer = load_model(tiny_model)
    with pytest.raises(UserError, match=r"out: the disk is full \(\d+ MB free\); the checkpoint was not saved"):
        for i in range(5):
            save_model(model, tokenizer, small_disk / f"{i}" / "out")
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 8192))
    kept = sorted(path for path in small_disk.rglob("*") if path.is_file() and path.name != "filler")
    for config in small_disk.rglob("config.json"):
        load_model(config.parent)  # what lies there under its final name is whole
    with pytest.raises(UserError, match="the disk is full"):
        save_model(model, tokenizer, small_disk / "last")
    assert sorted(path for path in small_disk.rglob("*") if path.is_file() and path.name != "filler") == kept


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("where", ["model", "tokenizer"])
def test_full_disk_keeps_the_old_checkpoint(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    model, tokenizer = load_model(tiny_model)
    out = save_model(model, tokenizer, tmp_path / "out")
    before = weights_hash(out)

    def full(folder: str, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(model if where == "model" else tokenizer, "save_pretrained", full)
    for target in (out, tmp_path / "new"):
        with pytest.raises(UserError, match="the disk is full"):
            save_model(model, tokenizer, target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert weights_hash(out) == before
    assert len(list(out.glob("*"))) > 3


def test_other_errors_are_not_called_a_full_disk(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(tiny_model)

    def fail(folder: str, **_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(PermissionError):
        save_model(model, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- hash


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"b": torch.randn(3, 5), "a": torch.arange(7), "empty": torch.zeros(0), "c": torch.randn(2).bfloat16()}


def write(folder: Path, *files: dict[str, torch.Tensor], **metadata: str) -> Path:
    folder.mkdir(parents=True)
    for i, part in enumerate(files):
        save_file(part, folder / f"model-{i}.safetensors", metadata={"format": "pt", **metadata})
    return folder


def test_hash_is_of_the_tensors_not_of_the_files(tmp_path: Path) -> None:
    whole = tensors()
    one = weights_hash(write(tmp_path / "one", whole))
    sharded = write(tmp_path / "two", {"c": whole["c"], "a": whole["a"]}, {"b": whole["b"], "empty": whole["empty"]})
    assert weights_hash(sharded) == one
    assert weights_hash(write(tmp_path / "note", whole, note="x")) == one
    (sharded / "config.json").write_text("{}")
    assert weights_hash(str(sharded)) == one
    assert len(one) == 64


def changed_bit(weights: dict[str, torch.Tensor]) -> None:
    weights["b"].view(torch.int32)[2, 4] ^= 1


def renamed(weights: dict[str, torch.Tensor]) -> None:
    weights["z"] = weights.pop("empty")


def reshaped(weights: dict[str, torch.Tensor]) -> None:
    weights["b"] = weights["b"].reshape(5, 3)


def retyped(weights: dict[str, torch.Tensor]) -> None:
    weights["c"] = weights["c"].view(torch.int16)


def swapped(weights: dict[str, torch.Tensor]) -> None:
    weights["b"] = weights["b"].flip(0).contiguous()


@pytest.mark.parametrize("change", [changed_bit, renamed, reshaped, retyped, swapped])
def test_every_change_of_a_tensor_changes_the_hash(tmp_path: Path, change: Any) -> None:
    weights = tensors()
    before = weights_hash(write(tmp_path / "before", weights))
    change(weights)
    assert weights_hash(write(tmp_path / "after", weights)) != before


def test_hash_of_an_adapter_covers_its_scale_and_base(tiny_model: Path, tmp_path: Path) -> None:
    hashes = set()
    other = tmp_path / "base"
    shutil.copytree(tiny_model, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, other / "model.safetensors")
    for i, settings in enumerate(
        [
            {"base_model_name_or_path": str(tiny_model), "lora_alpha": 8},
            {"base_model_name_or_path": str(tiny_model), "lora_alpha": 16},
            {"base_model_name_or_path": str(other), "lora_alpha": 8},
            {"base_model_name_or_path": "someone/thing", "lora_alpha": 8},
        ]
    ):
        folder = write(tmp_path / str(i), tensors())
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        hashes.add(weights_hash(folder))
    assert len(hashes) == 4


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 16,
        struct.pack("<Q", 4) + b"nope",
        header(a={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}) + b"1234",
        header(a={"dtype": "F32", "shape": [1]}) + b"1234",
        header(a=3),
    ],
)
def test_damaged_files_have_no_hash(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: a damaged safetensors file"):
        weights_hash(tmp_path)


def test_nothing_and_twice_have_no_hash(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tensors to hash"):
        weights_hash(tmp_path)
    whole = tensors()
    with pytest.raises(UserError, match=r"'a' is stored in model-0\.safetensors and model-1\.safetensors"):
        weights_hash(write(tmp_path / "twice", whole, {"a": whole["a"]}))
