"""What ``holdfast landscape`` does: load, scan, condense, write."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import UserError, did_you_mean
from holdfast.files import write_json
from holdfast.landscape.grid import Surface
from holdfast.landscape.seeds import Spread, summarize

if TYPE_CHECKING:
    from torch import Tensor

    from holdfast.landscape.ball import Sharpness
    from holdfast.landscape.hessian import Curvature
    from holdfast.landscape.lines import Line
    from holdfast.landscape.objective import TokenLoss

KINDS = ("filter", "gaussian", "plane", "pca")
PICTURES = ("svg", "html", "png", "pdf")
OnPoint = Callable[[int, int], None] | None


@dataclass(frozen=True)
class Request:
    """Everything that the command line asks for."""

    model: str
    data: str
    out: Path
    grid: int = 21
    range: float | None = None
    directions: str = "filter"
    checkpoints: tuple[str, ...] = ()
    seeds: int = 3
    seed: int = 0
    line: bool = False
    rho: float | None = None
    hessian: bool = False
    examples: int = 64
    max_length: int = 512
    prompt: str | None = None
    completion: str | None = None
    scope: Any = "trainable"
    compute: str = "float32"
    memory: Any = "auto"
    cap: float | None = None
    pictures: tuple[str, ...] = ("svg", "html")

    def check(self) -> None:
        """Find mistakes before a model is loaded. Raises UserError."""
        if self.directions not in KINDS:
            raise UserError(f"--directions '{self.directions}' is unknown.{did_you_mean(self.directions, KINDS)}")
        for name in self.pictures:
            if name not in PICTURES:
                raise UserError(f"--picture '{name}' is unknown.{did_you_mean(name, PICTURES)}")
        if self.scope not in ("trainable", "all"):
            raise UserError(f"--scope must be trainable or all, not '{self.scope}'")
        if self.memory not in ("auto", "stored", "regenerated"):
            raise UserError(f"--memory must be auto, stored or regenerated, not '{self.memory}'")
        if self.compute not in ("float32", "bfloat16", "float16"):
            raise UserError(f"--compute must be float32, bfloat16 or float16, not '{self.compute}'")
        needed = 1 if self.line else {"plane": 2, "pca": 2}.get(self.directions, 0)
        if len(self.checkpoints) < needed:
            what = "--line" if self.line else f"--directions {self.directions}"
            raise UserError(f"{what} needs {needed} --checkpoint, {len(self.checkpoints)} given")
        if self.seeds < 1:
            raise UserError(f"--seeds must be at least 1, not {self.seeds}")
        from holdfast.landscape.scan import axes

        axes(self.grid, self.range, "filter")


@dataclass
class Result:
    """What was measured, and the files that hold it."""

    surfaces: list[Surface] = field(default_factory=list)
    line: Line | None = None
    sharpness: Sharpness | None = None
    curvature: Curvature | None = None
    files: list[Path] = field(default_factory=list)
    random: bool = True

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, value and interval of every number."""
        rows: list[tuple[str, str, str]] = []
        if self.surfaces:
            found = summarize(self.surfaces)
            rows.append(("loss at the centre (nats per token)", f"{self.surfaces[0].centre:.6g}", ""))
            planes = f"{found.planes} random planes" if self.random else "this plane"
            for name, spread in (("SC", found.sc), ("AG", found.ag), ("MAG", found.mag)):
                rows.append((f"{name} (%), {planes}", *_percent(spread)))
            reach = self.surfaces[0].meta["reach"]
            rows.append(("rim: distance / norm of the weights", f"{reach:.3g}", ""))
        if self.line is not None:
            rows.append(("loss barrier (nats per token)", f"{self.line.barrier:.6g}", ""))
            rows.append(("linearly connected (2 %)", "yes" if self.line.connected() else "no", ""))
        if self.sharpness is not None:
            s = self.sharpness
            rows.append((f"worst rise found at rho {s.rho:g}", f"{s.worst:.5g}", ""))
            rows.append((f"average rise at rho {s.rho:g}", f"{s.average.mean:.5g}", _interval(s.average)))
            rows.append(("gradient norm", f"{s.gradient_norm:.5g}", ""))
        if self.curvature is not None:
            c = self.curvature
            rows.append(("Hessian trace (± standard error)", f"{c.trace:.5g} ± {c.trace_error:.2g}", ""))
            for value, good in zip(c.eigenvalues, c.converged, strict=True):
                rows.append(("Hessian eigenvalue", f"{value:.5g}", "" if good else "not converged"))
        return rows

    def notes(self) -> list[str]:
        """Warnings that belong beside the numbers."""
        if not self.surfaces:
            return []
        notes = list(summarize(self.surfaces).notes)
        return notes if self.random else [note for note in notes if "anecdote" not in note]


def measure(asked: Request, on_point: OnPoint = None) -> Result:
    """Load the model and the subset, scan, and write surfaces and pictures into ``asked.out``.

    Finished points are kept in ``asked.out/points``; the same request continues there. Raises UserError.
    """
    asked.check()
    from holdfast.landscape.objective import token_loss
    from holdfast.models import load_model
    from holdfast.probe import on_device

    model, tokenizer = load_model(asked.model)
    model = on_device(model)
    objective = token_loss(
        _examples(asked), tokenizer, examples=asked.examples, max_length=asked.max_length, seed=asked.seed,
        compute=asked.compute,
    )  # fmt: skip
    result = Result(random=asked.directions in ("filter", "gaussian"))
    if asked.line:
        _scan_line(asked, model, objective, result)
    else:
        _scan_planes(asked, model, objective, result, on_point)
    if asked.rho is not None:
        from holdfast.landscape.ball import sharpness

        result.sharpness = sharpness(model, objective, rho=asked.rho, seed=asked.seed, scope=asked.scope)
    if asked.hessian:
        from holdfast.landscape.hessian import curvature

        result.curvature = curvature(model, objective, seed=asked.seed, scope=asked.scope)
    if _first_rank():
        _write(asked, result)
    return result


def _examples(asked: Request) -> Any:
    if asked.data.startswith("lab:"):
        from holdfast import lab

        return lab.load_task(asked.data.removeprefix("lab:"), "train")
    from holdfast.data import read_examples

    return read_examples(asked.data, prompt=asked.prompt, completion=asked.completion)


def _scan_planes(asked: Request, model: Any, objective: TokenLoss, result: Result, on_point: OnPoint) -> None:
    from holdfast.landscape.checkpoints import pca, plane
    from holdfast.landscape.scan import surface

    seeds = range(asked.seed, asked.seed + asked.seeds)
    chosen: Any = asked.directions
    if chosen == "plane":
        first, second = (_checkpoint(source) for source in asked.checkpoints[:2])
        base, a, b = (Path(source).name for source in (asked.model, *asked.checkpoints[:2]))
        chosen, seeds = plane(model, first, second, scope=asked.scope, labels=(base, a, b)), range(1)
    elif chosen == "pca":
        chosen = pca(model, [_checkpoint(source) for source in asked.checkpoints], scope=asked.scope)
        seeds = range(1)
    for number, seed in enumerate(seeds):
        counted = None if on_point is None else _offset(on_point, number, len(seeds))
        result.surfaces.append(
            surface(
                model, objective, grid=asked.grid, range=asked.range, directions=chosen, seed=seed,
                scope=asked.scope, compute=asked.compute, memory=asked.memory, cache=asked.out / "points",
                on_point=counted,
            )
        )  # fmt: skip


def _offset(on_point: Callable[[int, int], None], number: int, of: int) -> Callable[[int, int], None]:
    return lambda done, total: on_point(number * total + done, of * total)


def _scan_line(asked: Request, model: Any, objective: TokenLoss, result: Result) -> None:
    from holdfast.landscape.lines import line

    end = _checkpoint(asked.checkpoints[0])
    result.line = line(model, objective, None, end, points=asked.grid, scope=asked.scope)


def _checkpoint(source: str) -> str | Mapping[str, Tensor]:
    """A folder of safetensors is read a tensor at a time; anything else is loaded as a model."""
    if Path(source).is_dir() and any(Path(source).glob("model*.safetensors")):
        return source
    from holdfast.models import load_model

    return dict(load_model(source)[0].named_parameters())


def _first_rank() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _write(asked: Request, result: Result) -> None:
    from holdfast.landscape.pictures import save_picture

    asked.out.mkdir(parents=True, exist_ok=True)
    for number, found in enumerate(result.surfaces):
        name = f"surface-{found.meta.get('seed', number)}" if result.random else "surface"
        result.files.append(found.save(asked.out / f"{name}.json"))
    panels = {f"seed {s.meta['seed']}" if result.random else asked.directions: s for s in result.surfaces}
    for kind in asked.pictures if panels else ():
        result.files.append(save_picture(panels, asked.out / f"contour.{kind}", cap=asked.cap, title=asked.model))
    summary = {
        "model": asked.model, "data": asked.data, "notes": result.notes(),
        "numbers": [{"name": a, "value": b, "interval": c} for a, b, c in result.rows()],
        "line": None if result.line is None else {
            "t": result.line.t.tolist(), "losses": [x if math.isfinite(x) else str(x) for x in result.line.losses]
        },
    }  # fmt: skip
    write_json(asked.out / "landscape.json", summary)
    result.files.append(asked.out / "landscape.json")


def _percent(spread: Spread) -> tuple[str, str]:
    scaled = Spread(tuple(100 * value for value in spread.values))
    return f"{scaled.mean:.4g}", _interval(scaled)


def _interval(spread: Spread) -> str:
    return "none: one plane" if math.isnan(spread.low) else f"{spread.low:.4g} to {spread.high:.4g}"
