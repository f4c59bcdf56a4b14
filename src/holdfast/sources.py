"""What a model's name means: a folder, an adapter, a GGUF file, a packaged or fetched model, or a hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holdfast.errors import UserError, did_you_mean

LAB = "lab"
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken", "spiece.model")


@dataclass(frozen=True)
class Source:
    """A model that was found: ``at`` is an absolute path, or the hub id."""

    kind: Literal["folder", "adapter", "gguf", "hub"]
    at: str

    @property
    def label(self) -> str:
        return f"model '{self.at}'" if self.kind == "hub" else self.at


def locate(name: str | Path) -> Source:
    """Find a model. Raises UserError with the nearest existing name, or with what a folder holds instead."""
    text = str(name)
    if text == LAB:
        from holdfast import lab

        return _folder(Path(lab.model_dir()))
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path.resolve())
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path}: a model is a folder, a .gguf file or a hub id; this is another kind of file")
        return Source("gguf", str(path.resolve()))
    from holdfast.fetch import KNOWN, fetched

    if text in KNOWN:
        folder = fetched(text)
        if folder is None:
            raise UserError(f"model '{text}' has not been fetched yet; run: holdfast models get {text}")
        return _folder(folder.resolve())
    if text.endswith(".gguf") or text.startswith((".", "/", "~")) or text.count("/") > 1 or not text.strip():
        raise UserError(f"{text}: no such model folder or file.{nearest(path)}")
    return Source("hub", text)


def base_of_adapter(folder: Path) -> str:
    """The base model that a PEFT adapter names."""
    file = folder / "adapter_config.json"
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: not readable as JSON: {error}") from error
    if not base:
        raise UserError(f"{file}: key 'base_model_name_or_path' is empty; name the base model")
    return str(base)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of some kind of tokenizer."""
    return any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES)


def nearest(path: Path) -> str:
    """A hint for a missing path: its first missing part, and the nearest name that is there."""
    path = path.expanduser().absolute()
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    names = [entry.name for entry in missing.parent.iterdir() if not entry.name.startswith(".")]
    hint = did_you_mean(missing.name, names)
    if len(hint) > 200:
        hint = hint[:200] + " …"
    return hint if missing == path else f" There is no '{missing.name}' in {missing.parent}.{hint}"


def _folder(folder: Path) -> Source:
    """A model folder, or what is missing from it, said before transformers does."""
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    if (folder / "adapter_config.json").is_file():
        if not any(folder.glob("adapter_model.*")):
            raise UserError(f"{folder}: an adapter without weights (no adapter_model.safetensors). It holds: {there}.")
        return Source("adapter", str(folder))
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model here, config.json is missing. It holds: {there}.{_inside(folder)}")
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise UserError(f"{folder}: a model folder without weights (no *.safetensors). It holds: {there}.")
    if not has_tokenizer(folder):
        raise UserError(f"{folder}: a model folder without a tokenizer (no tokenizer.json). It holds: {there}.")
    return Source("folder", str(folder))


def _inside(folder: Path) -> str:
    if files := sorted(folder.glob("*.gguf")):
        return f" Give the file itself: {files[0]}."
    models = sorted(child.name for child in folder.iterdir() if (child / "config.json").is_file())
    return f" There are models inside it: {', '.join(models[:8])}." if models else ""
