"""Surfaces on disk and as pictures."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from holdfast.errors import UserError
from holdfast.landscape import Surface, contour, relief, save_picture, svg
from holdfast.landscape.draw import isolines
from holdfast.landscape.pictures import levels


def bowl(scale: float = 1.0) -> Surface:
    axis = np.linspace(-1, 1, 7)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    return Surface(scale * (x**2 + y**2), axis, axis, 0.0, {"seed": 3})


def test_a_surface_survives_the_disk_exactly(tmp_path: Path) -> None:
    surface = bowl(1 / 3).marked("path", (0.1, 0.2), (0.3, -0.4))
    surface.grid[0, 0], surface.grid[1, 1] = np.nan, np.inf
    for name in ("s.json", "s.npz"):
        read = Surface.load(surface.save(tmp_path / name))
        np.testing.assert_array_equal(read.grid, surface.grid)
        np.testing.assert_array_equal(read.alphas, surface.alphas)
        assert (read.marks, read.meta, read.centre) == (surface.marks, surface.meta, surface.centre)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}')
    (tmp_path / "y.json").write_text("[1")
    for name in ("x.json", "y.json", "none.json"):
        with pytest.raises(UserError, match=name):
            Surface.load(tmp_path / name)
    with pytest.raises(UserError, match=r"\.pkl"):
        bowl().save(tmp_path / "s.pkl")
    with pytest.raises(UserError, match=r"\.gif"):
        save_picture(bowl(), tmp_path / "s.gif")


def test_models_side_by_side_share_one_colour_scale() -> None:
    figure = contour({"flat": bowl(), "sharp": bowl(4)})
    maps = [trace for trace in figure.data if trace.type == "contour"]
    assert len(maps) == 2
    assert {(trace.coloraxis, trace.zmin, trace.zmax) for trace in maps} == {("coloraxis", 0.0, 8.0)}
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0.0, 8.0)
    assert len(relief({"flat": bowl(), "sharp": bowl(4)}).data) == 2
    assert contour(bowl(), cap=1.5).layout.coloraxis.cmax == 1.5


def test_rows_are_alpha_and_columns_beta() -> None:
    axis, other = np.array([0.0, 1.0, 2.0]), np.array([0.0, 5.0, 10.0])
    grid = axis[:, None] + 100 * other[None, :]
    trace = next(t for t in contour(Surface(grid, axis, other, 0.0)).data if t.type == "contour")
    assert list(trace.x) == list(axis)
    assert trace.z[2][0] == grid[0, 2]  # z has a row per β


def test_points_that_are_not_finite_are_grey_in_both_kinds_of_picture() -> None:
    surface = bowl()
    surface.grid[2, 3] = np.inf
    heat = next(t for t in contour(surface).data if t.type == "heatmap")
    assert np.argwhere(np.isfinite(np.asarray(heat.z, dtype=float))).tolist() == [[3, 2]]
    area = '<path d="M'
    assert svg(surface).count("h") < svg(bowl()).count("h")
    assert area in svg(surface)


def test_the_svg_is_well_formed_and_escapes_names() -> None:
    text = svg({"<a> & b": bowl().marked("x<y", (0.0, 0.0), (0.5, 0.5)), "c": bowl(2)}, title="t & u")
    root = ElementTree.fromstring(text)
    words = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"<a> & b", "x<y", "t & u", "c"} <= set(words)


def test_contour_lines_lie_on_their_level() -> None:
    surface = bowl()
    places = np.linspace(-1, 1, 7)
    fine = [point for segment in isolines(surface.grid, places, places, 0.5) for point in (segment[:2], segment[2:])]
    assert len(fine) >= 16
    radii = np.array([np.hypot(*point) for point in fine])
    # exact on grid lines for a function that is linear between points; x² is off by at most h²/4
    assert np.abs(radii**2 - 0.5).max() <= (1 / 3) ** 2 / 4 + 1e-12


def test_levels_are_round_and_inside() -> None:
    found = levels(0.13, 2.41)
    assert found[0] >= 0.13 and found[-1] <= 2.41
    assert np.allclose(np.diff(found), 0.2)


def test_html_is_one_self_contained_file(tmp_path: Path) -> None:
    text = save_picture(bowl(), tmp_path / "a" / "s.html").read_text()
    assert text.startswith("<!doctype html>")
    assert "src=" not in text.split("<body>")[0]
    assert text.count("Plotly.newPlot") == 2
