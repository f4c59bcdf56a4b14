"""Causal language models from anywhere (hub, folder, GGUF, PEFT adapter, the lab) and their safe way to disk."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.adapters import check_adapter, with_adapter
from holdfast.errors import UserError, did_you_mean
from holdfast.files import new_folder, sha256_file
from holdfast.gguf import gguf_tokenizer, load_gguf, quiet_progress
from holdfast.hub import hub_is_unreachable
from holdfast.sources import Source, base_of_adapter, has_tokenizer, locate, nearest
from holdfast.weights import weights_hash

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "convert_gguf",
    "get_model",
    "load_model",
    "load_tokenizer",
    "save_model",
    "source_hash",
    "weights_hash",
]

DTYPES = ("float32", "bfloat16", "float16", "auto")


def load_model(
    source: str | Path,
    *,
    dtype: str = "float32",
    lora: Mapping[str, Any] | None = None,
    revision: str | None = None,
    seed: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, on the CPU, in evaluation mode.

    ``source`` is a folder (a model, or a saved PEFT adapter), a ``.gguf`` file, ``lab`` (the packaged model), a name
    of ``holdfast models list`` that was fetched, or a hub id. ``dtype`` is the type of the weights in memory (``auto``:
    as stored). ``lora`` takes PEFT's ``LoraConfig`` fields (also ``rank``, ``alpha``, ``dropout``, ``targets``; all
    linear layers by default), or another PEFT tuner's with its ``type``, and wraps the model; its random start comes
    from the global generator, or from ``seed``, which leaves that generator as it was. ``revision`` is for hub ids
    only. No remote code is ever run.

    Cost: one copy of the weights. Raises UserError when the source is missing, has no weights, no tokenizer, is no
    causal LM, or leaves parameters without a stored value.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: '{dtype}' is not a weight type.{did_you_mean(str(dtype), DTYPES)}")
    if lora is not None:
        check_adapter(lora)
    found = locate(source)
    with quiet_progress():
        model, tokenizer = _load(found, dtype, revision)
        if lora is not None:
            if found.kind == "adapter":
                raise UserError(f"{found.at}: is a LoRA adapter already; leave out `lora`, or merge it first")
            model = with_adapter(model, lora, seed)
    _make_savable(model)
    return model.eval(), tokenizer


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that ``load_model`` would return, without the weights."""
    found = locate(source)
    with quiet_progress():
        if found.kind == "gguf":
            return gguf_tokenizer(Path(found.at))
        if found.kind == "adapter" and not has_tokenizer(Path(found.at)):
            return load_tokenizer(base_of_adapter(Path(found.at)))
        if found.kind == "hub":
            _hub_config(found.at, revision)
        return _tokenizer(found, revision)


def source_hash(source: str | Path, *, revision: str | None = None) -> str:
    """A name for a model's weights that changes when they do: a hash of the tensors, or the hub's commit."""
    found = locate(source)
    if found.kind == "gguf":
        return sha256_file(Path(found.at))
    if found.kind == "hub":
        return f"{found.at}@{_hub_commit(found.at, revision)}"
    return weights_hash(found.at)


# ---------------------------------------------------------------- loading


def _load(found: Source, dtype: str, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    if found.kind == "gguf":
        return load_gguf(Path(found.at), torch.float32 if dtype == "auto" else wanted)
    if found.kind == "adapter":
        return _load_adapter(Path(found.at), dtype)
    if found.kind == "hub":
        _hub_config(found.at, revision)
    return _weights(found, wanted, revision), _tokenizer(found, revision)


def _hub_config(name: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    at = f" at revision '{revision}'" if revision else ""
    offline = hub_is_unreachable()
    try:
        return AutoConfig.from_pretrained(name, revision=revision, local_files_only=offline)
    except (OSError, ValueError) as error:
        near = nearest(Path(name))
        hint = near if "Did you mean" in near else ""
        reason = "the hub can't be reached from here and its cache has no such model" if offline else _first_line(error)
        raise UserError(f"model '{name}'{at}: no such folder, and {reason}.{hint}") from error


def _hub_commit(name: str, revision: str | None) -> str:
    """The commit that a revision of a hub model stands for: the cache keeps its files under that name."""
    from huggingface_hub import try_to_load_from_cache

    _hub_config(name, revision)  # brings the file into the cache
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else revision or "main"


def _weights(found: Source, dtype: Any, revision: str | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            found.at, revision=revision, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # a SafetensorError, for one, derives from Exception alone
        if "Unrecognized configuration class" in str(error):
            raise UserError(f"{found.label}: not a causal language model ({_architecture(found, revision)})") from error
        raise UserError(f"{found.label}: its weights can't be loaded: {_first_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        # from_pretrained would fill these with random numbers and go on
        raise UserError(
            f"{found.label}: the weights of {len(missing)} parameters are not stored there, for example "
            f"'{missing[0]}'; not a complete causal language model ({_architecture(found, revision)})"
        )
    return model


def _architecture(found: Source, revision: str | None) -> str:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(found.at, revision=revision)
    return ", ".join(config.architectures or []) or type(config).__name__


def _tokenizer(found: Source, revision: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(found.at, revision=revision)
    except Exception as error:  # each tokenizer class fails in its own way
        raise UserError(f"{found.label}: its tokenizer can't be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _make_savable(model: PreTrainedModel) -> None:
    """Many published models name a temperature without ``do_sample``; save_pretrained refuses that after training."""
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True  # the setting under which their temperature means something


# ---------------------------------------------------------------- adapters


def _load_adapter(folder: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A folder written by PEFT: the base that it names, with the adapter on top, ready to be trained on."""
    from peft import PeftModel

    try:
        base, tokenizer = _load(locate(base_of_adapter(folder)), dtype, None)
    except UserError as error:
        raise UserError(f"{folder / 'adapter_config.json'}: its base model: {error}") from error
    if has_tokenizer(folder):
        tokenizer = _tokenizer(Source("adapter", str(folder)), None)
    try:
        model: Any = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    except Exception as error:
        raise UserError(f"{folder}: the adapter doesn't fit its base model: {_first_line(error)}") from error
    return model, tokenizer


# ---------------------------------------------------------------- saving


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write model and tokenizer as a folder that exists only when it is complete (safetensors, no pickle).

    ``state_dict`` replaces the model's own weights (gathered shards, a merge). A PEFT model writes its adapter only.
    Cost: one write of the weights. Raises UserError when the disk is full; then nothing is left behind.
    """
    out = Path(out)
    weights: dict[str, Any] = {} if state_dict is None else {"state_dict": dict(state_dict)}
    with full_disk(out), new_folder(out) as folder, quiet_progress():
        model.save_pretrained(str(folder), **weights)
        tokenizer.save_pretrained(str(folder))
    return out


@contextlib.contextmanager
def full_disk(out: Path) -> Iterator[None]:
    """Turn "no space left" from any writer into one clear message; other errors pass through."""
    try:
        yield
    except Exception as error:
        # safetensors gives the system's error number in its text only
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if not full:
            raise
        there = next(folder for folder in out.absolute().parents if folder.exists())
        free = shutil.disk_usage(there).free / 1e6
        raise UserError(f"{out}: the disk is full ({free:.0f} MB free); the checkpoint was not saved") from error


def get_model(name: str, out: str | Path | None = None) -> Path:
    """Fetch a packaged model: see ``holdfast.fetch.get_model``."""
    from holdfast import fetch

    return fetch.get_model(name, out)


def convert_gguf(file: str | Path, out: str | Path) -> Path:
    """Turn a GGUF file into a normal model folder: see ``holdfast.fetch.convert_gguf``."""
    from holdfast import fetch

    return fetch.convert_gguf(file, out)
