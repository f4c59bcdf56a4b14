"""Causal language models from anywhere (hub, folder, GGUF, PEFT adapter, the lab) and their safe way to disk."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import UserError, did_you_mean
from holdfast.files import new_folder
from holdfast.gguf import load_gguf, quiet_progress
from holdfast.weights import weights_hash

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["convert_gguf", "get_model", "load_model", "save_model", "weights_hash"]

LAB = "lab"
DTYPES = ("float32", "bfloat16", "float16")
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
)
# short recipe keys -> PEFT's own names
LORA_ALIASES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}


def load_model(
    source: str | Path,
    *,
    dtype: str = "float32",
    lora: Mapping[str, Any] | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, on the CPU, in evaluation mode.

    ``source`` is a folder (a model, or a saved PEFT adapter), a ``.gguf`` file, ``lab`` (the packaged model), a name
    of ``holdfast models list`` that was fetched, or a hub id. ``lora`` takes PEFT's ``LoraConfig`` fields (also
    ``rank``, ``alpha``, ``dropout``, ``targets``) and wraps the model; its random start is drawn from ``seed``, and
    the global generator is left as it was. ``revision`` is for hub ids only. No remote code is ever run.

    Cost: one copy of the weights. Raises UserError when the source is missing, has no weights, no tokenizer, is no
    causal LM, or leaves parameters without a stored value.
    """
    torch_dtype = _dtype(dtype)
    with quiet_progress():
        model, tokenizer = _load(str(source), torch_dtype, revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if lora is not None:
        model = _with_lora(model, lora, seed)
    return model.eval(), tokenizer


def _load(source: str, dtype: torch.dtype, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if source == LAB:
        from holdfast import lab

        return _load_folder(lab.model_dir(), dtype)
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path}: a model is a folder, a .gguf file or a hub id; this is another kind of file")
        return load_gguf(path.resolve(), dtype)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return _load_adapter(path.resolve(), dtype)
        return _load_folder(path.resolve(), dtype)
    if _looks_like_path(source):
        raise UserError(f"{source}: no such model folder or file.{_nearest(path)}")
    from holdfast.fetch import KNOWN, fetched

    if source in KNOWN:
        folder = fetched(source)
        if folder is None:
            raise UserError(f"model '{source}' has not been fetched yet; run: holdfast models get {source}")
        return _load_folder(folder, dtype)
    return _load_hub(source, dtype, revision)


def _dtype(name: str) -> torch.dtype:
    import torch

    if name not in DTYPES:
        raise UserError(f"dtype: '{name}' is not a weight type.{did_you_mean(str(name), DTYPES)}")
    return getattr(torch, name)


def _looks_like_path(source: str) -> bool:
    return source.endswith(".gguf") or source.startswith((".", "/", "~")) or source.count("/") != 1 or "\\" in source


def _nearest(path: Path) -> str:
    """The nearest existing name beside a missing path, or the first missing part of it."""
    path = path.absolute()
    parent = path.parent
    if not parent.is_dir():
        while not parent.is_dir():
            path, parent = parent, parent.parent
        return f" There is no '{path.name}' in {parent}.{did_you_mean(path.name, _names(parent))[:200]}"
    return did_you_mean(path.name, _names(parent))[:200]


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]


def _load_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _check_folder(folder)
    return _from_pretrained(str(folder), dtype, None, str(folder)), _tokenizer(str(folder), None, str(folder))


def _check_folder(folder: Path) -> None:
    """Say what is missing before transformers does."""
    there = ", ".join(sorted(_names(folder))[:8]) or "nothing"
    if not (folder / "config.json").is_file():
        gguf = sorted(folder.glob("*.gguf"))
        hint = f" Give the file itself: {gguf[0]}." if gguf else ""
        inner = sorted(child.name for child in folder.iterdir() if (child / "config.json").is_file())
        hint = hint or (f" There are models inside it: {', '.join(inner[:8])}." if inner else "")
        raise UserError(f"{folder}: no model here, config.json is missing. It holds: {there}.{hint}")
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise UserError(f"{folder}: a model folder without weights (no *.safetensors). It holds: {there}.")
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise UserError(f"{folder}: a model folder without a tokenizer (no tokenizer.json). It holds: {there}.")


def _load_hub(name: str, dtype: torch.dtype, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name, revision=revision)
    except OSError as error:
        at = f" at revision '{revision}'" if revision else ""
        raise UserError(
            f"model '{name}': no such folder here, and the hub gives no model of that name{at} "
            f"({_first_line(error)}).{_near_here(name)}"
        ) from error
    except ValueError as error:
        raise UserError(f"model '{name}': {_first_line(error)}") from error
    return _from_pretrained(name, dtype, revision, f"model '{name}'"), _tokenizer(name, revision, f"model '{name}'")


def _near_here(name: str) -> str:
    near = _nearest(Path(name))
    return near if "Did you mean" in near else ""


def _from_pretrained(source: str, dtype: torch.dtype, revision: str | None, label: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=dtype, output_loading_info=True
        )
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise UserError(f"{label}: not a causal language model ({_architecture(source, revision)})") from error
        raise UserError(f"{label}: {_first_line(error)}") from error
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"{label}: its weights can't be loaded: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":  # a compiled class that derives from Exception alone
            raise UserError(f"{label}: a damaged safetensors file: {_first_line(error)}") from error
        raise
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        # from_pretrained would fill these with random numbers and go on
        raise UserError(
            f"{label}: the weights of {len(missing)} parameters are not stored there, for example '{missing[0]}'; "
            f"not a complete causal language model ({_architecture(source, revision)})"
        )
    return model


def _architecture(source: str, revision: str | None) -> str:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, revision=revision)
    return ", ".join(config.architectures or []) or type(config).__name__


def _tokenizer(source: str, revision: str | None, label: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except Exception as error:  # each tokenizer class fails in its own way
        raise UserError(f"{label}: its tokenizer can't be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _load_adapter(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A folder written by PEFT: the base that it names, with the adapter on top, ready to be trained on."""
    from peft import PeftConfig, PeftModel

    if not any(folder.glob("adapter_model.*")):
        there = ", ".join(sorted(_names(folder))[:8])
        raise UserError(
            f"{folder}: an adapter folder without weights (no adapter_model.safetensors). It holds: {there}."
        )
    base_name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base_name:
        raise UserError(
            f"{folder / 'adapter_config.json'}: key 'base_model_name_or_path' is empty; name the base model"
        )
    try:
        base, tokenizer = _load(str(base_name), dtype, None)
    except UserError as error:
        raise UserError(f"{folder / 'adapter_config.json'}: key 'base_model_name_or_path': {error}") from error
    if any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        tokenizer = _tokenizer(str(folder), None, str(folder))
    return PeftModel.from_pretrained(base, str(folder), is_trainable=True), tokenizer  # type: ignore[return-value]


def _with_lora(model: PreTrainedModel, lora: Mapping[str, Any], seed: int) -> PreTrainedModel:
    import dataclasses

    import torch
    from peft import LoraConfig, get_peft_model

    valid = {field.name for field in dataclasses.fields(LoraConfig)} - {"peft_type", "task_type"}
    settings: dict[str, Any] = {"target_modules": "all-linear"}
    for key, value in lora.items():
        if key not in valid and key not in LORA_ALIASES:
            raise UserError(f"lora: unknown key '{key}'.{did_you_mean(key, valid | set(LORA_ALIASES))}")
        settings[LORA_ALIASES.get(key, key)] = value
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))  # type: ignore[return-value]
        except (ValueError, TypeError) as error:
            raise UserError(f"lora: {_first_line(error)}") from error


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write model and tokenizer as a folder that exists only when it is complete (safetensors, no pickle).

    ``state_dict`` replaces the model's own weights (gathered shards, a merge). A PEFT model writes its adapter only.
    Cost: one write of the weights. Raises UserError when the disk is full; then nothing is left behind.
    """
    out = Path(out)
    with full_disk(out), new_folder(out) as folder, quiet_progress():
        kwargs: dict[str, Any] = {} if state_dict is None else {"state_dict": dict(state_dict)}
        model.save_pretrained(str(folder), **kwargs)
        tokenizer.save_pretrained(str(folder))
    return out


@contextlib.contextmanager
def full_disk(out: Path) -> Iterator[None]:
    """Turn "no space left" from any writer into one clear message; other errors pass through."""
    try:
        yield
    except Exception as error:
        # safetensors reports the system's error number in its text only
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if not full:
            raise
        parent = next(folder for folder in (out.parent, *out.absolute().parents) if folder.exists())
        free = shutil.disk_usage(parent).free / 1e6
        raise UserError(f"{out}: the disk is full ({free:.0f} MB free); the checkpoint was not saved") from error


def get_model(name: str, out: str | Path | None = None) -> Path:
    """Fetch a packaged model: see ``holdfast.fetch.get_model``."""
    from holdfast import fetch

    return fetch.get_model(name, out)


def convert_gguf(file: str | Path, out: str | Path) -> Path:
    """Turn a GGUF file into a normal model folder: see ``holdfast.fetch.convert_gguf``."""
    from holdfast import fetch

    return fetch.convert_gguf(file, out)
