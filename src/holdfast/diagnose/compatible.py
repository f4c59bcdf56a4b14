"""Can these checkpoints be compared with this base at all? Checked before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import UserError
from holdfast.models import load_tokenizer
from holdfast.sources import locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def check_checkpoints(base: str, checkpoints: Sequence[str]) -> list[str]:
    """Warnings about the checkpoints; UserError if one has another architecture or another vocabulary than the base.

    Added tokens are a warning: the tokens that both know must have the same ids. Reads configurations and tokenizers,
    not weights (but for GGUF files and hub ids, whose tokenizer comes with the model).
    """
    warnings: list[str] = []
    tokenizer, shape = load_tokenizer(base), _shape(base)
    for checkpoint in checkpoints:
        other = _shape(checkpoint)
        differ = [f"{key} {shape[key]} and {other[key]}" for key in shape if key in other and shape[key] != other[key]]
        if differ and not (len(differ) == 1 and differ[0].startswith("vocab_size")):
            raise UserError(f"{checkpoint}: another architecture than the base {base}: {', '.join(differ)}")
        if warning := _vocabulary(base, tokenizer, checkpoint):
            warnings.append(warning)
    return warnings


def _shape(source: str) -> dict[str, Any]:
    found = locate(source)
    if found.kind != "folder":  # an adapter names its base; GGUF files and hub ids are known when they are loaded
        return {}
    read = json.loads((Path(found.at) / "config.json").read_text(encoding="utf-8"))
    return {key: read[key] for key in SHAPE if key in read}


def _vocabulary(base: str, tokenizer: PreTrainedTokenizerBase, checkpoint: str) -> str | None:
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(checkpoint).get_vocab()
    if ours == theirs:
        return None
    moved = sorted(token for token, index in ours.items() if theirs.get(token) != index)
    if moved:
        raise UserError(
            f"{checkpoint}: another tokenizer than the base {base}: {len(moved):,} of {len(ours):,} tokens are missing "
            f"or have another id, for example {moved[0]!r}; perplexities and items can't be compared"
        )
    return f"{checkpoint}: its tokenizer has {len(theirs) - len(ours):,} tokens that the base does not have"
