"""Merge checkpoints on disk into a new checkpoint (or, in a sweep, into several at once)."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import holdfast
from holdfast.errors import UserError
from holdfast.merge.compare import Embeddings
from holdfast.merge.engine import Engine, Output, Progress, StreamNumbers
from holdfast.merge.families import Weights
from holdfast.merge.formulas import Facts, Formula
from holdfast.merge.layout import allocate, index
from holdfast.merge.plan import MergePlan, PathLike, Variant, check_disk, make_plan
from holdfast.merge.publish import copy_companions, finish_folder, write_json
from holdfast.merge.stage import Stage


@dataclass
class MergeResult:
    """What came out: the folders, whether work of an earlier, interrupted run was used, and what was noticed."""

    out: Path
    outputs: dict[str, Path]  # sweep label -> folder; {"": out} for a single merge
    plan: MergePlan
    seconds: float = 0.0
    resumed: bool = False
    already_done: bool = False
    nonfinite: dict[str, int] = field(default_factory=dict)


def merge_checkpoints(
    method: str,
    models: Sequence[PathLike],
    out: PathLike | None = None,
    base: PathLike | None = None,
    weights: Weights = None,
    *,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    dtype: str | None = None,
    allow_missing: bool = False,
    embeddings: Embeddings = "error",
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> MergeResult:
    """Merge checkpoint folders (safetensors, single or sharded; LoRA adapters; DCP/FSDP folders) into ``out``.

    The formulas are those of ``holdfast.merge.METHODS``; ``settings`` are the method's own (``density``, ``scope``,
    ``alpha``, ``t``, ``seed``, ``fisher``, …). ``sweep={"alpha": [0, 0.5, 1]}`` writes one folder per value (or per
    combination) from one pass over the inputs. Memory does not grow with the models: 0.1 to 0.3 GB. Cost: one read of
    each input (two for TIES, SLERP and pruning), one write per output. The result's dtype is the base's (or the first
    model's) unless ``dtype`` is given. Killed at any moment, the same call continues and gives the same bytes.
    ``threads`` workers are forked processes on Linux, and threads elsewhere or once torch is loaded. Raises
    ``UserError`` for inputs that don't fit together, hold NaN or inf, or an output that exists (``overwrite=True``),
    ``ChildProcessError`` if a worker was killed (what was done is kept).
    """
    started = time.monotonic()
    plan = make_plan(method, models, base, weights, settings, sweep, dtype, allow_missing, embeddings, threads)
    try:
        if dry_run:
            return MergeResult(Path(out or "."), {}, plan)
        if out is None:
            raise UserError("where to? give the output folder: --out DIR (out=…).")
        folder = Path(out)
        if finished(folder, plan):
            return MergeResult(folder, outputs_of(folder, plan), plan, already_done=True)
        if folder.exists() and not overwrite and (folder.is_file() or any(folder.iterdir())):
            raise UserError(f"{folder}: exists and is not this merge; choose another folder or pass --overwrite.")
        result = _merge(plan, folder, allow_nonfinite, overwrite, progress)
        result.seconds = time.monotonic() - started
        return result
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{out}: the disk is full; nothing was left behind.") from None
        raise
    finally:
        plan.close()


def outputs_of(out: Path, plan: MergePlan) -> dict[str, Path]:
    """Folder of every variant."""
    return {variant.label: out / variant.label if plan.swept else out for variant in plan.variants}


def finished(out: Path, plan: MergePlan) -> bool:
    """Does ``out`` hold the complete result of this very plan?"""
    record = out / ("sweep.json" if plan.swept else "merge.json")
    try:
        return bool(json.loads(record.read_text(encoding="utf-8"))["plan"] == plan.identity)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _merge(
    plan: MergePlan, out: Path, allow_nonfinite: bool, overwrite: bool, progress: Progress | None
) -> MergeResult:
    kinds = {tensor.name: tensor.dtype for one in plan.shards for tensor in one.tensors}
    numbers = StreamNumbers(plan.sources, plan.match, kinds, allow_nonfinite)
    with Stage(out, plan.identity) as stage:
        check_disk(out, plan.output_bytes, plan.output_bytes if stage.resumed else 0)
        folders = outputs_of(stage.result, plan)
        if not stage.resumed:
            for path in folders.values():
                path.mkdir(parents=True, exist_ok=True)
                allocate(path, plan.shards)
            stage.begin()
        outputs = _outputs(plan, folders, numbers)
        engine = Engine(plan.reference, numbers, outputs, plan.shards)
        hashes, nonfinite = engine.run(stage.done, stage.finish_job, plan.threads, progress)
        inputs = {str(path): hashes[path] for path in sorted(hashes)}
        for variant in plan.variants:
            copy_companions(folders[variant.label], plan.companions, plan.dtype)
            record = _record(plan, variant, inputs, nonfinite)
            finish_folder(folders[variant.label], record, variant.label or out.name, index(plan.shards))
        if plan.swept:
            write_json(
                stage.result / "sweep.json", {"plan": plan.identity, "outputs": [v.label for v in plan.variants]}
            )
        stage.publish(overwrite)
    return MergeResult(out, outputs_of(out, plan), plan, resumed=stage.resumed, nonfinite=nonfinite)


def _outputs(plan: MergePlan, folders: Mapping[str, Path], numbers: StreamNumbers) -> list[Output]:
    """Prepare each distinct formula once."""
    facts: dict[Formula, Facts] = {}
    for variant in plan.variants:
        if variant.formula not in facts:
            facts[variant.formula] = variant.formula.prepare(numbers, plan.threads)
    return [Output(folders[variant.label], variant.formula, facts[variant.formula]) for variant in plan.variants]


def _record(
    plan: MergePlan, variant: Variant, inputs: Mapping[str, str], nonfinite: Mapping[str, int]
) -> dict[str, Any]:
    """Content of merge.json."""
    return {
        "holdfast": holdfast.__version__,
        "method": plan.method,
        "formula": plan.family.formula,
        "settings": dict(variant.settings),
        "weights": None if variant.weights is None else list(variant.weights),
        "base": plan.base,
        "models": plan.models,
        "inputs": dict(inputs),
        "merged": len(plan.match.merged),
        "copied": plan.match.copied,
        "dropped": plan.match.dropped,
        "nonfinite": dict(nonfinite),
        "plan": plan.identity if variant.label == "" else f"{plan.identity}/{variant.label}",
    }
