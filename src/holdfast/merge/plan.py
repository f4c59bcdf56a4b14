"""What a merge will do, worked out from headers alone: inputs compared, outputs laid out, needs estimated."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import holdfast
from holdfast.errors import UserError, did_you_mean
from holdfast.files import digest
from holdfast.merge.compare import Embeddings, Match, add_fishers, match
from holdfast.merge.engine import BLOCK
from holdfast.merge.families import METHODS, Family, Weights, resolve
from holdfast.merge.formulas import Deltas, Formula
from holdfast.merge.layout import Shard, layout
from holdfast.merge.numbers import TORCH_NAMES, parse_dtype
from holdfast.merge.publish import companions
from holdfast.merge.scratch import CHUNK, cores
from holdfast.merge.sources import Source, local_base, open_checkpoint
from holdfast.merge.thresholds import IN_MEMORY

PathLike = str | Path
INTERPRETER = 70_000_000  # bytes of Python, numpy and the command line


@dataclass(frozen=True)
class Variant:
    """One output: folder name under the result ('' for the result itself), its settings and formula."""

    label: str
    settings: Mapping[str, Any]
    weights: tuple[float, ...] | None
    formula: Formula


@dataclass
class MergePlan:
    """Everything decided before the first number is read."""

    method: str
    family: Family
    models: list[str]
    base: str | None
    reference: Source
    sources: list[Source]
    match: Match
    shards: list[Shard]
    variants: list[Variant]
    companions: dict[str, Path]
    dtype: str | None
    threads: int
    identity: str

    @property
    def swept(self) -> bool:
        """Several outputs in folders of their own?"""
        return self.variants[0].label != ""

    @property
    def output_bytes(self) -> int:
        """Bytes of weights that will be written."""
        return sum(one.nbytes for one in self.shards) * len(self.variants)

    @property
    def memory_bytes(self) -> int:
        """Estimate of the peak resident memory; independent of the size of the models."""
        width = max((4 if t.dtype in ("F16", "BF16") else 8) for one in self.shards for t in one.tensors)
        arrays = (len(self.sources) + 14) * CHUNK * width
        longest = min(IN_MEMORY, max(self.match.merged.values(), default=0))
        selection = 4 * longest * (len(self.sources) + 1) if self.passes > 1 else 0
        counters = 24_000_000 * len(self.sources) if self.passes > 1 else 0
        return INTERPRETER + self.threads * (arrays + selection) + counters

    @property
    def passes(self) -> int:
        """Times the inputs are read (one more for tensors too long to select from in memory)."""
        formula = self.variants[0].formula
        needs = isinstance(formula, Deltas) and formula.sparsify == "magnitude" and formula.density < 1
        return 2 if needs or self.method == "slerp" else 1

    def describe(self) -> list[str]:
        """Lines for ``--dry-run``."""
        read = sum(path.stat().st_size for path in {p for s in [self.reference, *self.sources] for p in s.files})
        lines = [f"{self.method}: {self.family.formula}"]
        for variant in self.variants:
            weights = "" if variant.weights is None else f" weights {', '.join(f'{w:g}' for w in variant.weights)}"
            values = ", ".join(f"{key}={value}" for key, value in variant.settings.items())
            lines.append(f"  {variant.label or 'output'}:{weights} {values}".rstrip())
        lines += [
            f"base: {self.base or '-'}; models: {', '.join(self.models)}",
            f"tensors: {len(self.match.merged)} merged, {len(self.match.equal)} must be equal, "
            f"{len(self.match.copied)} copied, {len(self.match.dropped)} dropped",
            f"output: {len(self.shards)} file(s) per model, {self.output_bytes / 1e9:.2f} GB on disk in all",
            f"work: {read / 1e9:.2f} GB read in {self.passes} pass(es), {self.threads} threads, "
            f"about {self.memory_bytes / 1e9:.2f} GB of memory",
            f"also copied: {', '.join(self.companions) or 'nothing'}",
        ]
        return lines

    def notes(self) -> list[str]:
        """What was kept from the reference or left out."""
        named = (("kept from the base", self.match.copied), ("left out", self.match.dropped))
        return [f"{what}: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}" for what, names in named if names]

    def close(self) -> None:
        """Close all input files."""
        for source in [self.reference, *self.sources]:
            source.close()


def make_plan(
    method: str,
    models: Sequence[PathLike],
    base: PathLike | None,
    weights: Weights,
    settings: Mapping[str, Any],
    sweep: Mapping[str, Sequence[Any]] | None,
    dtype: str | None,
    allow_missing: bool,
    embeddings: Embeddings,
    threads: int | None,
) -> MergePlan:
    """Open and compare the inputs and decide every output; whatever the user got wrong raises ``UserError``."""
    name, _ = resolve(method, settings)
    family, models = METHODS[name], [_place(model) for model in models]
    base = None if base is None else _place(base)
    if name == "slerp" and base is not None and len(models) == 1:
        models = [base, *models]
    _check_arguments(name, family, len(models), base is not None, weights, embeddings)
    target = None if dtype is None else parse_dtype(dtype)
    variants = _variants(method, len(models), weights, settings, sweep or {})
    opened, root = _open(models, base)
    reference, sources = (root if root is not None else opened[0]), list(opened)
    fishers = variants[0].settings.get("fisher", ())
    if family.base and root is not None:
        sources = [root, *sources]
    found = match(reference, sources, allow_missing, embeddings)
    if name == "fisher":
        if len(fishers) != len(models):
            raise UserError(
                f"fisher needs one Fisher file per model: {len(models)} models, {len(fishers)} files (fisher=A,B)."
            )
        estimates = [open_checkpoint(path) for path in fishers]
        add_fishers(found, estimates, reference, allow_missing)
        sources += estimates
    shards = layout(reference, target, found.merged)
    folders = [source.where for source in dict.fromkeys([reference, *opened])]
    folders = [
        folder for folder in [*map(Path, [base] if base else []), *folders, *map(Path, models)] if folder.is_dir()
    ]
    identity = _identity(name, variants, [reference, *sources], shards, [allow_missing, embeddings, str(target)])
    return MergePlan(
        name, family, [str(model) for model in models], None if base is None else str(base), reference, sources, found,
        shards, variants, companions(folders), None if target is None else TORCH_NAMES[target],
        threads or cores() + 1, identity,
    )  # fmt: skip


def check_method(method: str, models: int, weights: Weights, settings: Mapping[str, Any]) -> str:
    """The canonical name of a merge of so many models and a base; what is wrong with it raises ``UserError`` now."""
    name, _ = resolve(method, settings)
    _check_arguments(name, METHODS[name], models, True, weights, "error")
    _variants(method, models, weights, settings, {})
    return name


def _place(model: PathLike) -> PathLike:
    """A path as it is; ``lab`` and the names of fetched models are turned into their folders."""
    if Path(model).exists():
        return model
    from holdfast.sources import locate

    found = locate(model)
    return found.at if found.kind == "folder" else model


def _check_arguments(name: str, family: Family, models: int, has_base: bool, weights: Weights, embeddings: str) -> None:
    low, high = family.models
    if not low <= models <= high:
        count = str(low) if low == high else f"at least {low}"
        raise UserError(f"method '{name}' takes {count} model{'s' if count != '1' else ''}, not {models}.")
    if family.base and not has_base:
        raise UserError(f"method '{name}' needs the base model that the others were tuned from: --base DIR (base=…).")
    if not family.weighted and weights is not None:
        raise UserError(f"method '{name}' takes no weights; its settings: {', '.join(family.settings)}.")
    if embeddings not in ("error", "base", "overlap"):
        raise UserError(
            f"embeddings '{embeddings}' is unknown.{did_you_mean(embeddings, ('error', 'base', 'overlap'))}"
        )


def _open(models: Sequence[PathLike], base: PathLike | None) -> tuple[list[Source], Source | None]:
    """The models, and the base if one is given or an adapter needs it; a folder named twice is opened once."""
    adapters = [Path(model) for model in models if (Path(model) / "adapter_config.json").is_file()]
    root = open_checkpoint(base) if base is not None else open_checkpoint(local_base(adapters[0])) if adapters else None
    opened: dict[str, Source] = {} if root is None or base is None else {str(base): root}
    for model in map(str, models):
        if model not in opened:
            opened[model] = open_checkpoint(model, root)
    return [opened[str(model)] for model in models], root


def _variants(
    method: str, count: int, weights: Weights, settings: Mapping[str, Any], sweep: Mapping[str, Sequence[Any]]
) -> list[Variant]:
    """One variant, or the product of all swept values."""
    variants: dict[str, Variant] = {}
    for values in itertools.product(*sweep.values()):
        chosen = dict(zip(sweep, values))
        label = ",".join(f"{key}={_short(value)}" for key, value in chosen.items())
        w = chosen.pop("weights", chosen.pop("weight", weights))
        name, full = resolve(method, {**settings, **chosen})
        if w is not None and not METHODS[name].weighted:
            raise UserError(f"method '{name}' takes no weights; its settings: {', '.join(METHODS[name].settings)}.")
        formula = METHODS[name].build(count, w, full)
        shown = (
            None
            if not METHODS[name].weighted
            else (w,) * count
            if isinstance(w, int | float)
            else tuple(w or (1.0,) * count)
        )
        variants[label] = Variant(label, full, shown, formula)
    if not variants:
        raise UserError("the sweep has no values.")
    return list(variants.values())


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "_".join(_short(one) for one in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _identity(
    name: str, variants: Sequence[Variant], sources: Sequence[Source], shards: Sequence[Shard], flags: Any
) -> str:
    """Hash of everything that decides the output's bytes; inputs by path, size and time of change."""
    files = []
    for source in sources:
        for path in source.files:
            status = path.stat()
            files.append([os.path.realpath(path), status.st_size, status.st_mtime_ns])
    outputs = [[variant.label, repr(variant.formula)] for variant in variants]
    headers = [[one.name, one.nbytes, digest(one.header.hex())] for one in shards]
    return digest([holdfast.__version__, name, outputs, files, headers, flags, BLOCK], 32)


def check_disk(out: Path, need: int, there: int) -> None:
    """Refuse before starting if the output can't fit; ``there`` bytes are already allocated by an earlier try."""
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if need - there > free:
        raise UserError(f"{out}: needs {need / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free in {folder}.")
