"""Text to tokens, with the conventions of lm-eval: so that scores mean the same on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from holdfast.evaluate.tree import Question

UNSET_LENGTH = 10**12  # tokenizers without a limit report 1e30


class BadItem(ValueError):
    """One item that can't be scored; the others go on."""


def max_length(model: nn.Module, tokenizer: Any) -> int:
    """Tokens the model can see: the config's limit, else the tokenizer's, else 2048 (as lm-eval)."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(limit := getattr(text, name, None), int):
            return limit
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit and limit < UNSET_LENGTH else 2048


def prefix_token(tokenizer: Any) -> int:
    """The token that stands for an empty context: BOS, else EOS, else 0."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def encode(tokenizer: Any, texts: Sequence[str], special: bool | None = None) -> list[list[int]]:
    """Token ids of each text; ``special`` adds BOS and the like (None: the tokenizer's default).

    A text that already starts with the BOS token gets no second one.
    """
    if not texts:
        return []
    bos = tokenizer.decode([prefix_token(tokenizer)])
    if special is None and bos and any(text.startswith(bos) for text in texts):
        plain = iter(encode(tokenizer, [text for text in texts if text.startswith(bos)], special=False))
        rest = iter(encode(tokenizer, [text for text in texts if not text.startswith(bos)]))
        return [next(plain) if text.startswith(bos) else next(rest) for text in texts]
    options = {} if special is None else {"add_special_tokens": special}
    return [list(ids) for ids in tokenizer(list(texts), verbose=False, **options)["input_ids"]]


def encode_pairs(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], special: bool | None = None, prefix: int | None = None
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(context, continuation) token ids: spaces that end the context move to the continuation, then the whole is cut
    where the context's own encoding ends. An empty context becomes the prefix token."""
    moved = []
    for context, continuation in pairs:
        bare = context.rstrip()
        moved.append((bare, context[len(bare) :] + continuation))
    contexts = list(dict.fromkeys(context for context, _ in moved if context))
    length = dict(zip(contexts, map(len, encode(tokenizer, contexts, special))))
    wholes = iter(encode(tokenizer, [context + text for context, text in moved if context], special))
    alone = iter(encode(tokenizer, [text for context, text in moved if not context], special=False))
    start = prefix_token(tokenizer) if prefix is None else prefix
    encoded = []
    for context, _ in moved:
        if context:
            whole = next(wholes)
            encoded.append((tuple(whole[: length[context]]), tuple(whole[length[context] :])))
            continue
        ids = next(alone)
        keep = 1 if ids and ids[0] == start else 0  # the text brings its own BOS
        encoded.append(((start,), tuple(ids[keep:])))
    return encoded


def fit(context: tuple[int, ...], continuation: tuple[int, ...], limit: int) -> tuple[tuple[int, ...], int]:
    """The context cut from the left so that all but the last token of context + continuation fit, and how many tokens
    were cut. Raises BadItem if the continuation alone does not fit."""
    excess = len(context) + len(continuation) - 1 - limit
    if excess <= 0:
        return context, 0
    if excess >= len(context):
        raise BadItem(f"the continuation alone has {len(continuation)} tokens; the model sees {limit}")
    return context[excess:], excess


def question(
    encoded: Iterable[tuple[tuple[int, ...], tuple[int, ...]]], limit: int, labels: tuple[int, ...] = ()
) -> tuple[list[Question], int]:
    """One question if all pairs share their context after truncation, else one per pair; and the tokens cut."""
    cut = 0
    fitted = []
    for context, continuation in encoded:
        context, excess = fit(context, continuation, limit)
        cut = max(cut, excess)
        fitted.append((context, continuation))
    if len({context for context, _ in fitted}) == 1:
        return [Question(fitted[0][0], tuple(continuation for _, continuation in fitted), labels)], cut
    return [Question(context, (continuation,), labels) for context, continuation in fitted], cut


def rolling(tokens: Sequence[int], prefix: int, limit: int, stride: int | None = None) -> list[Question]:
    """Windows that predict every token once: each window sees up to ``limit`` tokens and scores ``stride`` new ones.

    stride None: windows that meet without overlap but for one token of context (lm-eval's rolling log-likelihood).
    The first token is predicted from ``prefix``.
    """
    step = limit if stride is None else max(1, min(stride, limit))
    done = min(limit, len(tokens))
    windows = [Question((prefix,), (tuple(tokens[:done]),))] if done else []
    while done < len(tokens):
        end = min(done + step, len(tokens))
        windows.append(Question(tuple(tokens[end - limit - 1 : done]), (tuple(tokens[done:end]),)))
        done = end
    return windows
