"""Where the stages of instruction tuning begin and end along a run's checkpoints (paper 2, sections 4 and 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

FORMAT_MASS = 0.95  # paper 2, section 5.2: probability that the next token is an answer at all
STEADY = 3  # points of decline in a row before the entropy counts as steadily declining


@dataclass(frozen=True)
class Marks:
    """Indices into the checkpoints (0 is the first after the base); None where a stage isn't reached.

    ``format_aligned``: from here on label mass stays above 0.95. ``entropy_declines``: from here on the entropy over
    the choices only falls. Both are means over the benchmarks answered by label (A to D), or over all if there is none.
    ``actual_from``: from here on every decided verdict is ``actual``, after one that was not. ``actual_throughout``:
    every decided verdict is ``actual``; the transition, if there was one, came earlier.
    """

    format_aligned: int | None
    entropy_declines: int | None
    actual_from: int | None
    actual_throughout: bool

    def to_dict(self) -> dict[str, int | bool | None]:
        return asdict(self)


def marks(label_mass: Sequence[float], entropy: Sequence[float], verdicts: Sequence[str]) -> Marks:
    """The stages in the order of the checkpoints; NaN (not measured) never counts as reached."""
    decided = [verdict for verdict in verdicts if verdict in ("none", "pseudo", "actual")]
    return Marks(
        format_aligned=_stays_above(label_mass, FORMAT_MASS),
        entropy_declines=_declines_from(entropy),
        actual_from=_transition(verdicts),
        actual_throughout=bool(decided) and all(verdict == "actual" for verdict in decided),
    )


def _stays_above(values: Sequence[float], threshold: float) -> int | None:
    start = None
    for index, value in enumerate(values):
        if value > threshold:
            start = index if start is None else start
        else:
            start = None
    return start


def _declines_from(values: Sequence[float]) -> int | None:
    """The start of the longest falling tail, if it has at least three points."""
    if not values or math.isnan(values[-1]):
        return None
    start = len(values) - 1
    while start > 0 and values[start - 1] > values[start]:
        start -= 1
    return start if len(values) - start >= STEADY else None


def _transition(verdicts: Sequence[str]) -> int | None:
    """The first ``actual`` after the last decided verdict that is something else; None without such a predecessor."""
    others = [index for index, verdict in enumerate(verdicts) if verdict in ("none", "pseudo")]
    if not others:
        return None
    later = [index for index, verdict in enumerate(verdicts) if verdict == "actual" and index > others[-1]]
    return later[0] if later else None
