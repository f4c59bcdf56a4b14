"""Pictures of surfaces with Plotly: contour maps and reliefs, several models on one colour scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import UserError
from holdfast.landscape.grid import Array, Surface

Surfaces = Surface | Mapping[str, Surface]
COLORSCALE = "Viridis"
PANEL = 420  # pixels
NOT_FINITE = "#9a9a9a"


def named(surfaces: Surfaces) -> dict[str, Surface]:
    """One surface or several as a mapping of title to surface. Raises UserError for none."""
    found = {"": surfaces} if isinstance(surfaces, Surface) else dict(surfaces)
    if not found:
        raise UserError("there is no surface to draw")
    return found


def shared_scale(surfaces: Sequence[Surface], cap: float | None = None) -> tuple[float, float]:
    """Lowest and highest finite loss over all surfaces; ``cap`` cuts the top, for a rim that dwarfs the middle."""
    finite = np.concatenate([surface.grid[np.isfinite(surface.grid)] for surface in surfaces])
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    high = high if cap is None else max(low, min(high, cap))
    return low, high if high > low else low + max(abs(low), 1.0) * 1e-6


def levels(low: float, high: float, count: int = 12) -> list[float]:
    """About ``count`` round contour levels inside a range."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]


def contour(surfaces: Surfaces, *, cap: float | None = None, title: str = "") -> Any:
    """Contour maps side by side on one colour scale, as a Plotly figure.

    ``surfaces``: one, or titles and surfaces. Points that aren't finite are grey; marks and paths are drawn on
    top. ``cap``: highest loss that gets a colour of its own.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = named(surfaces)
    low, high = shared_scale(list(panels.values()), cap)
    ticks = levels(low, high)
    figure = make_subplots(
        rows=1, cols=len(panels), subplot_titles=[escape(name) for name in panels], horizontal_spacing=0.08
    )
    for column, surface in enumerate(panels.values(), start=1):
        clipped = np.minimum(surface.grid, high)
        figure.add_trace(_grey(surface), row=1, col=column)
        figure.add_trace(
            go.Contour(
                x=surface.alphas, y=surface.betas, z=_gaps(clipped).T, zmin=low, zmax=high, coloraxis="coloraxis",
                connectgaps=False, contours={"start": ticks[0], "end": ticks[-1], "size": _size(ticks, high - low)},
                line={"width": 0.6, "color": "rgba(255,255,255,0.7)"},
                hovertemplate="α %{x:.4g}<br>β %{y:.4g}<br>loss %{z:.5g}<extra></extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
        for trace in _marks(surface):
            figure.add_trace(trace, row=1, col=column)
        figure.update_xaxes(title_text="α", row=1, col=column)
        figure.update_yaxes(title_text="β", row=1, col=column)
    bar = {"colorscale": COLORSCALE, "cmin": low, "cmax": high, "colorbar": {"title": "loss (nats per token)"}}
    figure.update_layout(
        template="plotly_white", coloraxis=bar, showlegend=False, title=escape(title) or None,
        width=PANEL * len(panels) + 160, height=PANEL + 80,
    )  # fmt: skip
    return figure


def relief(surfaces: Surfaces, *, cap: float | None = None, title: str = "") -> Any:
    """The same as three-dimensional surfaces; points that aren't finite are holes."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = named(surfaces)
    low, high = shared_scale(list(panels.values()), cap)
    figure = make_subplots(
        rows=1, cols=len(panels), specs=[[{"type": "surface"}] * len(panels)],
        subplot_titles=[escape(name) for name in panels], horizontal_spacing=0.02,
    )  # fmt: skip
    axes = {"xaxis_title": "α", "yaxis_title": "β", "zaxis_title": "loss", "zaxis_range": [low, high]}
    for column, surface in enumerate(panels.values(), start=1):
        values = _gaps(np.minimum(surface.grid, high))
        figure.add_trace(
            go.Surface(x=surface.alphas, y=surface.betas, z=values.T, coloraxis="coloraxis"), row=1, col=column
        )
        figure.update_scenes(axes, row=1, col=column)
    bar = {"colorscale": COLORSCALE, "cmin": low, "cmax": high, "colorbar": {"title": "loss (nats per token)"}}
    figure.update_layout(
        template="plotly_white", coloraxis=bar, title=escape(title) or None, width=PANEL * len(panels) + 160,
        height=PANEL + 80,
    )  # fmt: skip
    return figure


def save_picture(surfaces: Surfaces, path: str | Path, *, cap: float | None = None, title: str = "") -> Path:
    """Write a contour map: ``.svg`` (for papers, nothing else needed), ``.html`` (interactive, self-contained, with
    the relief below it), or ``.png`` and ``.pdf`` through Plotly's own exporter, the optional package kaleido.

    Raises UserError for another suffix, or if kaleido or the browser that it drives is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        from holdfast.files import write_text
        from holdfast.landscape.draw import svg

        write_text(path, svg(surfaces, cap=cap, title=title))
    elif path.suffix == ".html":
        from holdfast.files import write_text

        flat = contour(surfaces, cap=cap, title=title).to_html(full_html=False, include_plotlyjs=True)
        high = relief(surfaces, cap=cap).to_html(full_html=False, include_plotlyjs=False)
        head = f'<!doctype html><meta charset="utf-8"><title>{escape(title) or "loss surface"}</title>'
        write_text(path, f"{head}<body>{flat}{high}</body>\n")
    elif path.suffix in (".png", ".pdf"):
        _export(contour(surfaces, cap=cap, title=title), path)
    else:
        raise UserError(f"{path}: a picture is .svg, .html, .png or .pdf, not '{path.suffix}'")
    return path


def _export(figure: Any, path: Path) -> None:
    try:
        figure.write_image(path, scale=2)
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"{path}: {path.suffix} needs the package kaleido and a browser; .svg needs neither") from error


def _size(ticks: list[float], extent: float) -> float:
    return ticks[1] - ticks[0] if len(ticks) > 1 else extent


def _gaps(values: Array) -> Array:
    """Infinities as NaN, which Plotly leaves out."""
    return np.where(np.isfinite(values), values, np.nan)


def _grey(surface: Surface) -> Any:
    """The points that aren't finite, as grey cells."""
    import plotly.graph_objects as go

    cells = np.where(np.isfinite(surface.grid), np.nan, 1.0)
    scale = [[0, NOT_FINITE], [1, NOT_FINITE]]
    return go.Heatmap(
        x=surface.alphas, y=surface.betas, z=cells.T, colorscale=scale, showscale=False, hoverinfo="skip"
    )  # fmt: skip


def _marks(surface: Surface) -> list[Any]:
    import plotly.graph_objects as go

    traces = []
    for mark in surface.marks:
        text = [escape(mark.label)] + [""] * (len(mark.points) - 1)
        traces.append(
            go.Scatter(
                x=[point[0] for point in mark.points], y=[point[1] for point in mark.points], text=text,
                mode="markers+text" if len(mark.points) == 1 else "lines+markers+text", textposition="top center",
                textfont={"color": "white"}, line={"color": "white", "width": 1.5},
                marker={"color": "white", "size": 7, "line": {"color": "black", "width": 1}}, hoverinfo="x+y+text",
            )
        )  # fmt: skip
    return traces
