"""What a model source is, without loading its weights: its tokenizer, and a hash that names its content."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.files import sha256_file
from holdfast.models import LAB, load_model
from holdfast.weights import weights_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def local_folder(source: str | Path) -> Path | None:
    """The folder of a source that is one: a path, ``lab``, or a fetched model; None for GGUF files and hub ids."""
    if str(source) == LAB:
        from holdfast import lab

        return lab.model_dir()
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    from holdfast.fetch import KNOWN, fetched

    return fetched(str(source)) if str(source) in KNOWN else None


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a source that ``load_model`` takes, loaded without its weights where that is possible.

    Raises UserError as ``load_model`` does.
    """
    from transformers import AutoTokenizer

    folder = local_folder(source)
    usable = folder is not None and (folder / "tokenizer_config.json").is_file() and (folder / "config.json").is_file()
    if not usable or not list(folder.glob("*.safetensors")):  # type: ignore[union-attr]
        return load_model(source)[1]  # a GGUF file, a hub id, or an error to be explained
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def source_hash(source: str | Path) -> str:
    """A hash of the weights a source stands for: over tensors (folders), bytes (GGUF), or the hub's commit."""
    folder = local_folder(source)
    if folder is not None:
        return weights_hash(folder)
    path = Path(source).expanduser()
    if path.is_file():
        return sha256_file(path)
    from transformers import AutoConfig

    return f"{source}@{getattr(AutoConfig.from_pretrained(str(source)), '_commit_hash', None)}"
