"""GGUF files: dequantized once, then ordinary weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file into a plain model and tokenizer; nothing of its quantization is left.

    Every block is unpacked to ``dtype``, so the model takes 4 bytes per parameter in fp32, several times the file.
    Raises UserError if the package ``gguf`` is missing or the file can't be read.
    """
    tokenizer = gguf_tokenizer(file)
    from transformers import AutoModelForCausalLM

    kwargs: dict[str, Any] = {}
    with contextlib.suppress(ImportError):  # newer transformers keep the blocks packed unless told otherwise
        from transformers import GgufConfig

        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=dtype, **kwargs)
    except Exception as error:  # the reader raises whatever a damaged file trips over
        raise UserError(f"{file}: can't be read as a GGUF language model: {error}") from error
    tokenizer.model_max_length = model.config.max_position_embeddings
    _detach_quantizer(model)
    model.config._name_or_path = str(file)
    return model, tokenizer


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer inside a GGUF file. Raises UserError like ``load_gguf``."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{file}: reading GGUF files needs the package 'gguf': pip install 'holdfast[gguf]' (or pip install gguf)"
        ) from error
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        _repair_tokenizer(tokenizer, file)
    except Exception as error:
        raise UserError(f"{file}: its tokenizer can't be read from the GGUF file: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def quiet_progress() -> Iterator[None]:
    """No progress bars of transformers inside the block; a study prints its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _detach_quantizer(model: PreTrainedModel) -> None:
    """Forget that the weights were once quantized; otherwise save_pretrained refuses them."""
    for name in ("hf_quantizer", "quantization_method"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    if getattr(model, "is_quantized", False):
        model.is_quantized = False  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model.config, "_model_name_or_path"):  # the file's own title, which is no path
        del model.config._model_name_or_path


def _repair_tokenizer(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Restore what the conversion to a fast tokenizer drops: the pre-tokenizer that the file names.

    SmolLM splits numbers into digits *before* spaces are grouped; without that "a  1" is cut differently from the
    way the model was trained.
    """
    import gguf
    from tokenizers import pre_tokenizers

    field = gguf.GGUFReader(str(file)).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
