"""Do the checkpoints fit together? Names, shapes, vocabularies; and what to do where they don't."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from holdfast.errors import UserError
from holdfast.merge.numbers import MERGEABLE
from holdfast.merge.scratch import Scratch
from holdfast.merge.sources import Source, same_bytes

Embeddings = Literal["error", "base", "overlap"]
SHOWN = 8  # differences listed per kind


@dataclass
class Match:
    """How much of each reference tensor is merged, and under which name every source has it."""

    merged: dict[str, int] = field(default_factory=dict)  # name -> leading elements merged; the rest is the reference's
    equal: list[str] = field(default_factory=list)  # not floating point: must be the same everywhere
    copied: list[str] = field(default_factory=list)  # the reference's, because a model lacks them or by policy
    dropped: list[str] = field(default_factory=list)  # in a model only
    aliases: list[dict[str, str]] = field(default_factory=list)  # per source: reference name -> its name there
    compared: int = 0  # sources that are models (Fisher estimates follow them)


def match(reference: Source, sources: Sequence[Source], allow_missing: bool, embeddings: Embeddings) -> Match:
    """Compare every source with the reference; what no policy covers raises one ``UserError`` that lists it all."""
    result, problems, scratch = Match(), list[str](), Scratch()
    limits: dict[str, int] = {}
    copied: set[str] = set()
    for source in sources:
        alias, missing, extra = _names(reference, source, scratch)
        result.aliases.append(alias)
        if missing and not allow_missing:
            problems.append(_listing(f"{source.where} lacks", missing, f"tensors of {reference.where}"))
        if extra and not allow_missing:
            problems.append(_listing(f"{source.where} has", extra, f"tensors that {reference.where} lacks"))
        copied.update(missing)
        result.dropped += extra
        for name in reference.infos.keys() - missing:
            problem = _shape(reference, source, name, alias.get(name, name), embeddings, limits, copied)
            if problem:
                problems.append(problem)
    result.compared = len(sources)
    if embeddings == "error":
        problems += [text for source in sources for text in vocabulary_differences(reference.where, source.where)]
    if problems:
        hints = "Only merge what they share: --allow-missing. Different vocabularies: --embeddings base|overlap."
        raise UserError("the checkpoints don't fit together:\n  " + "\n  ".join(problems) + "\n" + hints)
    for name, info in reference.infos.items():
        if name in copied:
            result.copied.append(name)
        elif info.dtype in MERGEABLE:
            result.merged[name] = limits.get(name, info.size)
        elif info.dtype.startswith(("F", "C")):
            raise UserError(f"{reference.where}: tensor '{name}' has dtype {info.dtype}, which can't be merged.")
        else:
            result.equal.append(name)
    return result


def add_fishers(result: Match, fishers: Sequence[Source], reference: Source, allow_missing: bool) -> None:
    """Require an estimate of the same shape for every merged tensor; one without stays the reference's, if allowed."""
    problems = []
    for source in fishers:
        result.aliases.append({})
        missing = [name for name in result.merged if name not in source.infos]
        if missing and not allow_missing:
            problems.append(_listing(f"{source.where} lacks", missing, f"tensors of {reference.where}"))
        for name in missing:
            del result.merged[name]
            result.copied.append(name)
        for name in result.merged:
            ours, theirs = reference.infos[name].shape, source.infos[name].shape
            if ours != theirs:
                problems.append(f"'{name}' has shape {ours} in {reference.where} and {theirs} in {source.where}")
    if problems:
        raise UserError("the Fisher estimates don't fit:\n  " + "\n  ".join(problems))


def _listing(start: str, names: Sequence[str], end: str) -> str:
    more = f", … ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return f"{start} {len(names)} {end}: {', '.join(sorted(names)[:SHOWN])}{more}"


def _names(reference: Source, source: Source, scratch: Scratch) -> tuple[dict[str, str], list[str], list[str]]:
    """Aliases for tied tensors that one side stores twice, then names missing from the source and extra in it."""
    missing, alias = [], {}
    for name in sorted(reference.infos.keys() - source.infos.keys()):
        twin = _twin(reference, name, reference.infos.keys() & source.infos.keys(), scratch)
        if twin is None:
            missing.append(name)
        else:
            alias[name] = twin
    extra = [
        name
        for name in sorted(source.infos.keys() - reference.infos.keys())
        if _twin(source, name, reference.infos.keys() & source.infos.keys(), scratch) is None
    ]
    return alias, missing, extra


def _twin(source: Source, name: str, others: Any, scratch: Scratch) -> str | None:
    """Another tensor of the same checkpoint with the same bytes: tied weights that were stored twice."""
    info = source.infos[name]
    if info.size < 2 or len(info.shape) < 2:
        return None
    return next((other for other in sorted(others) if same_bytes((source, name), (source, other), scratch)), None)


def _shape(
    reference: Source, source: Source, name: str, there: str, embeddings: str, limits: dict[str, int], copied: set[str]
) -> str | None:
    ours, theirs = reference.infos[name], source.infos[there]
    if (ours.dtype in MERGEABLE) != (theirs.dtype in MERGEABLE):
        return f"'{name}' is {ours.dtype} in {reference.where} and {theirs.dtype} in {source.where}"
    if ours.shape == theirs.shape:
        return None
    rows_only = ours.shape[1:] == theirs.shape[1:] and len(ours.shape) == len(theirs.shape) > 0
    if rows_only and embeddings == "base":
        copied.add(name)
        return None
    if rows_only and embeddings == "overlap":
        shared = min(ours.shape[0], theirs.shape[0]) * (ours.size // max(1, ours.shape[0]))
        limits[name] = min(limits.get(name, ours.size), shared)
        return None
    kind = " (a different vocabulary?)" if rows_only else ""
    return f"'{name}' has shape {ours.shape} in {reference.where} and {theirs.shape} in {source.where}{kind}"


def vocabulary_differences(ours: Path, theirs: Path) -> list[str]:
    """Tokens that have different ids in two folders' tokenizer.json; nothing if either has none."""
    paths = [folder / "tokenizer.json" for folder in (ours, theirs)]
    if not all(path.is_file() for path in paths) or paths[0].read_bytes() == paths[1].read_bytes():
        return []
    first, second = (_vocabulary(path) for path in paths)
    differing = sorted((first.items() ^ second.items()), key=lambda entry: (entry[1], entry[0]))
    tokens = list(dict.fromkeys(token for token, _ in differing))
    return (
        [_listing(f"the vocabularies of {ours} and {theirs} differ in", [repr(t) for t in tokens], "tokens")]
        if tokens
        else []
    )


def _vocabulary(path: Path) -> dict[str, int]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: is not JSON.") from None
    model = content.get("model", {}).get("vocab", {})
    ids = dict(model) if isinstance(model, dict) else {entry[0]: i for i, entry in enumerate(model)}
    ids.update({token["content"]: token["id"] for token in content.get("added_tokens", [])})
    return ids
