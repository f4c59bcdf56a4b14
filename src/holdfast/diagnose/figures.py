"""Paper 2's Figures 3 to 6 as Plotly figures, from a finished diagnosis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

Result = Mapping[str, Any]
TUNED, RESTORED, BASE, CONTROL = "#c4511d", "#0b6e75", "#17212b", "#8a97a3"
PALETTE = (TUNED, RESTORED, "#6a4c93", "#b8860b", "#2b6cb0", "#a83279", "#4a7c2c", "#7a7a7a")


class Figure(NamedTuple):
    """A titled figure: Plotly traces and layout."""

    title: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def label(name: str) -> str:
    """A user's name as Plotly text, which reads a part of HTML."""
    return escape(str(name))


def figures(result: Result, other: Result | None = None) -> list[Figure]:
    """Every figure of one diagnosis; ``other`` adds a second model's chain as Figure 6."""
    found = [*chain(result, "3"), *split(result), *alignment(result), *memorization(result)]
    if other is not None:
        found += chain(other, "6")
    return found


def ticks(result: Result) -> list[str]:
    """One label per checkpoint: its name, and the epoch where the Trainer wrote one."""
    return [
        label(point["name"]) + (f" (epoch {point['epoch']:g})" if point.get("epoch") else "")
        for point in result["checkpoints"]
    ]


def chain(result: Result, number: str) -> list[Figure]:
    """Figures 3 and 6: perplexity while restoring, perplexity along the run, and each benchmark's scores."""
    points, x = result["checkpoints"], ticks(result)
    restoring = [
        _line([share for share, _ in path], [value for _, value in path], name, PALETTE[index % len(PALETTE)])
        for index, (name, path) in enumerate(
            [(x[i], point["restored"].get("trajectory", [])) for i, point in enumerate(points)]
        )
    ]
    control = result["control"].get("trajectory", [])
    restoring.append(_line([s for s, _ in control], [v for _, v in control], "control (base)", CONTROL, dash="dot"))
    restoring.append(_level([0, 1], result["base"]["perplexity"], "base", BASE))
    along = [
        _line(x, [point["tuned"]["perplexity"] for point in points], "tuned", TUNED),
        _line(x, [point["restored"]["perplexity"] for point in points], "restored", RESTORED),
        _level(x, result["base"]["perplexity"], "base", BASE),
        _level(x, result["control"]["perplexity"], "control", CONTROL),
    ]
    made = [
        Figure(
            f"{number}a. Perplexity on the probing set while restoring",
            "It should fall to the base's level; where it does not, the verdict is withheld.",
            restoring,
            _layout("share of restoring done", "perplexity per token", log=True),
        ),
        Figure(
            f"{number}b. Perplexity on the probing set along the run",
            "The distance between tuned and base is the shift of the text pattern.",
            along,
            _layout("checkpoint", "perplexity per token", log=True),
        ),
    ]
    for index, task in enumerate(result["tasks"]):
        made.append(_scores(result, task["name"], f"{number}{chr(ord('c') + index)}", x))
    return made


def _scores(result: Result, task: str, number: str, x: Sequence[str]) -> Figure:
    points = result["checkpoints"]

    def of(role: str) -> list[float]:
        return [100 * point["decomposition"][task]["scores"][role] for point in points]

    data = [
        _line(x, of("tuned"), "tuned", TUNED),
        _line(x, of("restored"), "restored", RESTORED),
        _line(x, of("base"), "base", BASE, dash="dash"),
        _line(x, of("control"), "control", CONTROL, dash="dot"),
    ]
    layout = _layout("checkpoint", "score, percent")
    layout["shapes"] = _marks(result, ("actual_from",))
    return Figure(
        f"{number}. {task}: tuned, restored and base",
        "Between tuned and restored: pattern shift. Between restored and base: knowledge loss.",
        data,
        layout,
    )


def split(result: Result) -> list[Figure]:
    """Drop = pattern shift + knowledge loss, pooled, with 95 % intervals."""
    points, x = result["checkpoints"], ticks(result)
    data = []
    for part, name, colour in (
        ("drop", "drop", BASE),
        ("pattern_shift", "pattern shift", RESTORED),
        ("knowledge_loss", "knowledge loss", TUNED),
    ):
        found = [point["decomposition"]["pooled"][part] for point in points]
        data.append(
            _line(x, [100 * one["value"] for one in found], name, colour)
            | {
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [100 * (one["high"] - one["value"]) for one in found],
                    "arrayminus": [100 * (one["value"] - one["low"]) for one in found],
                    "thickness": 1,
                }
            }
        )
    layout = _layout("checkpoint", "points")
    layout["shapes"] = _marks(result, ("actual_from",))
    layout["annotations"] = [
        {
            "x": tick,
            "y": 1.06,
            "yref": "paper",
            "showarrow": False,
            "text": label(point["decomposition"]["pooled"]["verdict"]),
        }
        for tick, point in zip(x, points)
    ]
    caption = "Pooled over the benchmarks; above each checkpoint its verdict."
    return [Figure("The drop and its two parts", caption, data, layout)]


def alignment(result: Result) -> list[Figure]:
    """Figure 4: probability mass on the answer labels and entropies, one figure per benchmark."""
    made = []
    x = ["base", *ticks(result)]
    for index, task in enumerate(result["tasks"]):
        probes = [result["base"]["probes"][task["name"]]]
        probes += [point["tuned"]["probes"][task["name"]] for point in result["checkpoints"]]
        data = []
        for probe, name, colour, axis in (
            ("label_mass", "label mass", TUNED, "y"),
            ("confidence", "confidence", "#b8860b", "y"),
            ("choice_entropy", "entropy over the choices", RESTORED, "y2"),
            ("vocab_entropy", "entropy over the vocabulary", "#6a4c93", "y2"),
        ):
            values = [one[probe] for one in probes]
            if any(value is not None for value in values):
                data.append(_line(x, values, name, colour) | {"yaxis": axis})
        if not data:
            continue
        layout = _layout("checkpoint", "probability")
        layout["yaxis"]["range"] = [0, 1.02]
        layout["yaxis2"] = {"title": {"text": "nats"}, "overlaying": "y", "side": "right", "rangemode": "tozero"}
        layout["shapes"] = _marks(result, ("format_aligned", "entropy_declines"), first=1)
        made.append(
            Figure(
                f"4{chr(ord('a') + index)}. {task['name']}: format and knowledge alignment",
                "Lines mark where label mass stays above 0.95 and where the entropy only declines.",
                data,
                layout,
            )
        )
    return made


def memorization(result: Result) -> list[Figure]:
    """Figure 5: exact memorization of the tuning data."""
    points, x = result["checkpoints"], ["base", *ticks(result)]
    if result["base"]["memorization"] is None:
        return []
    data = [_line(x, [result["base"]["memorization"], *(p["tuned"]["memorization"] for p in points)], "tuned", TUNED)]
    restored = [result["control"]["memorization"], *(point["restored"]["memorization"] for point in points)]
    data.append(_line(x, restored, "restored", RESTORED))
    caption = "Share of the answers' tokens that are the argmax given everything before them."
    return [Figure("5. Exact memorization of the tuning data", caption, data, _layout("checkpoint", "share of tokens"))]


MARK_NAMES = {
    "format_aligned": "format aligned",
    "entropy_declines": "entropy declines",
    "actual_from": "actual forgetting",
}


def _marks(result: Result, names: Sequence[str], first: int = 0) -> list[dict[str, Any]]:
    """Vertical lines at the marks; ``first`` is the position of the first checkpoint on the axis."""
    return [
        {
            "type": "line",
            "x0": result["marks"][name] + first,
            "x1": result["marks"][name] + first,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"dash": "dot", "width": 1.5, "color": BASE},
            "label": {"text": MARK_NAMES[name], "textposition": "end", "font": {"size": 11}},
        }
        for name in names
        if result["marks"][name] is not None
    ]


def _line(x: Sequence[Any], y: Sequence[Any], name: str, colour: str, dash: str = "solid") -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(x),
        "y": list(y),
        "name": name,
        "line": {"color": colour, "dash": dash},
    }


def _level(x: Sequence[Any], value: float, name: str, colour: str) -> dict[str, Any]:
    return _line(x, [value] * len(x), name, colour, dash="dash") | {"mode": "lines"}


def _layout(x: str, y: str, log: bool = False) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {"title": {"text": y}, "automargin": True} | ({"type": "log"} if log else {}),
        "margin": {"t": 40, "r": 60, "b": 60, "l": 60},
        "legend": {"orientation": "h", "y": -0.25},
        "plot_bgcolor": "#fff",
        "font": {"family": "system-ui, sans-serif", "size": 13},
    }
