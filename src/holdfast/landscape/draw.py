"""Contour maps as SVG, drawn here: a vector picture for papers without a browser or a plotting package."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import numpy as np

from holdfast.landscape.grid import Array, Surface
from holdfast.landscape.pictures import COLORSCALE, NOT_FINITE, Surfaces, levels, named, shared_scale

SIDE = 300.0  # of one panel, in SVG units
LEFT, TOP, GAP, BAR = 56.0, 46.0, 74.0, 14.0
FINE = 4  # cells per grid cell, bilinear
SHADES = 64

Segment = tuple[float, float, float, float]


def svg(surfaces: Surfaces, *, cap: float | None = None, title: str = "") -> str:
    """Contour maps side by side on one colour scale, as SVG text; grey where the loss isn't finite."""
    panels = named(surfaces)
    low, high = shared_scale(list(panels.values()), cap)
    width = LEFT + len(panels) * (SIDE + GAP) + 40
    height = TOP + SIDE + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" '
        f'font-size="11">',
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
    ]
    if title:
        parts.append(_text(width / 2, 16, title, size=14))
    for index, (name, surface) in enumerate(panels.items()):
        parts.append(f'<g transform="translate({LEFT + index * (SIDE + GAP):g} {TOP:g})">')
        parts += _panel(surface, name, low, high)
        parts.append("</g>")
    parts.append(f'<g transform="translate({LEFT + len(panels) * (SIDE + GAP) - GAP + 16:g} {TOP:g})">')
    parts += _bar(low, high)
    parts += ["</g>", "</svg>"]
    return "\n".join(parts) + "\n"


def _panel(surface: Surface, name: str, low: float, high: float) -> Iterator[str]:
    """Colours, contour lines, marks and axes of one surface."""
    x, y = _places(surface.alphas), SIDE - _places(surface.betas)
    yield f'<rect width="{SIDE:g}" height="{SIDE:g}" fill="{NOT_FINITE}"/>'
    yield from _colours(surface.grid, x, y, low, high)
    for level in levels(low, high):
        path = "".join(f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}" for a, b, c, d in isolines(surface.grid, x, y, level))
        if path:
            yield f'<path d="{path}" fill="none" stroke="white" stroke-opacity="0.8" stroke-width="0.8"/>'
    for mark in surface.marks:
        points = [(_place(a, surface.alphas), SIDE - _place(b, surface.betas)) for a, b in mark.points]
        if len(points) > 1:
            way = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            yield f'<polyline points="{way}" fill="none" stroke="white" stroke-width="1.6"/>'
        for a, b in points:
            yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="white" stroke="black" stroke-width="0.8"/>'
        yield _text(points[0][0], points[0][1] - 7, mark.label, fill="white")
    yield f'<rect width="{SIDE:g}" height="{SIDE:g}" fill="none" stroke="black" stroke-width="0.8"/>'
    for share in (0.0, 0.5, 1.0):
        alpha, beta = (axis[0] + share * (axis[-1] - axis[0]) for axis in (surface.alphas, surface.betas))
        yield _text(share * SIDE, SIDE + 14, f"{alpha:.3g}")
        yield _text(-6, SIDE * (1 - share) + 4, f"{beta:.3g}", anchor="end")
    yield _text(SIDE / 2, SIDE + 30, "α")
    yield _text(-38, SIDE / 2, "β")
    yield _text(SIDE / 2, -8, name, size=12)


def _colours(grid: Array, x: Array, y: Array, low: float, high: float) -> Iterator[str]:
    """Small rectangles, one path per shade; a cell with a corner that isn't finite stays grey."""
    steps = (np.arange(FINE) + 0.5) / FINE
    shades = _shades()
    paths: dict[int, list[str]] = {}
    across, down = (x[1] - x[0]) / FINE, (y[0] - y[1]) / FINE
    for i in range(grid.shape[0] - 1):
        for j in range(grid.shape[1] - 1):
            corner = grid[i : i + 2, j : j + 2]
            if not np.isfinite(corner).all():
                continue
            for u, v in ((u, v) for u in steps for v in steps):
                value = (1 - u) * ((1 - v) * corner[0, 0] + v * corner[0, 1])
                value += u * ((1 - v) * corner[1, 0] + v * corner[1, 1])
                shade = int(np.clip((value - low) / (high - low), 0, 1) * (SHADES - 1))
                left = x[i] + (u * FINE - 0.5) * across
                upper = y[j] - (v * FINE + 0.5) * down
                paths.setdefault(shade, []).append(f"M{left:.2f} {upper:.2f}h{across:.2f}v{down:.2f}h{-across:.2f}z")
    for shade, path in sorted(paths.items()):
        colour = shades[shade]
        yield f'<path d="{"".join(path)}" fill="{colour}" stroke="{colour}" stroke-width="0.3"/>'


def isolines(grid: Array, x: Array, y: Array, level: float) -> Iterator[Segment]:
    """Line segments where the bilinear-on-edges surface crosses a level (marching squares; saddles by the mean)."""
    for i in range(grid.shape[0] - 1):
        for j in range(grid.shape[1] - 1):
            ring = [(i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1)]
            values = [float(grid[corner]) for corner in ring]
            if not np.isfinite(values).all():
                continue
            cuts = []
            for k in range(4):
                (a, b), (va, vb) = (ring[k], ring[(k + 1) % 4]), (values[k], values[(k + 1) % 4])
                if (va >= level) != (vb >= level):
                    t = (level - va) / (vb - va)
                    cuts.append((x[a[0]] + t * (x[b[0]] - x[a[0]]), y[a[1]] + t * (y[b[1]] - y[a[1]])))
            if len(cuts) == 4 and (np.mean(values) >= level) == (values[0] >= level):
                cuts = [cuts[0], cuts[1], cuts[2], cuts[3]]
            elif len(cuts) == 4:
                cuts = [cuts[3], cuts[0], cuts[1], cuts[2]]
            for first, second in zip(cuts[::2], cuts[1::2]):
                yield float(first[0]), float(first[1]), float(second[0]), float(second[1])


def _bar(low: float, high: float) -> Iterator[str]:
    """The colour bar with the contour levels."""
    for index, colour in enumerate(_shades()):
        top = SIDE * (1 - (index + 1) / SHADES)
        yield f'<rect x="0" y="{top:.2f}" width="{BAR:g}" height="{SIDE / SHADES + 0.4:.2f}" fill="{colour}"/>'
    for level in levels(low, high, 6):
        place = SIDE * (1 - (level - low) / (high - low))
        yield _text(BAR + 4, place + 4, f"{level:.4g}", anchor="start")
    yield _text(0, -8, "loss", anchor="start")


def _shades() -> list[str]:
    from plotly.colors import sample_colorscale

    return [str(colour) for colour in sample_colorscale(COLORSCALE, [i / (SHADES - 1) for i in range(SHADES)])]


def _place(value: float, axis: Array) -> float:
    return float((value - axis[0]) / (axis[-1] - axis[0]) * SIDE)


def _places(axis: Array) -> Array:
    return np.asarray((axis - axis[0]) / (axis[-1] - axis[0]) * SIDE)


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "middle", fill: str = "black") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{escape(text)}</text>'
    )
