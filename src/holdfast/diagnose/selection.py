"""The lowest-perplexity passages up to a token budget, and a disjoint set to probe with (paper 2, 3.1 and 3.3)."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.diagnose.contamination import Benchmarks, Report
from holdfast.diagnose.corpus import Passage
from holdfast.diagnose.ranking import ScoreLog
from holdfast.errors import UserError
from holdfast.files import write_text

PROBE_SHARE = 5  # one passage in five is held out for probing: the paper's 10,000 beside 40,000


@dataclass(frozen=True)
class Chosen:
    """A selected passage with its perplexity under the base model."""

    perplexity: float
    key: int
    tokens: int
    text: str
    place: str


class Lowest:
    """The longest run of lowest-perplexity passages that fits a token budget, from a stream in any order.

    Equal texts count once. Memory: the passages kept, so the budget bounds it. Cost: O(log kept) a passage.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.tokens = 0
        self.keys: set[int] = set()
        self.heap: list[tuple[float, int, Chosen]] = []  # worst on top: negated order
        self.limit: tuple[float, int] | None = None  # best (perplexity, key) that didn't fit: nothing after it may

    def add(self, chosen: Chosen) -> None:
        order = (chosen.perplexity, chosen.key)
        if chosen.key in self.keys or (self.limit is not None and order >= self.limit):
            return
        heapq.heappush(self.heap, (-chosen.perplexity, -chosen.key, chosen))
        self.keys.add(chosen.key)
        self.tokens += chosen.tokens
        while self.tokens > self.budget:
            worst = heapq.heappop(self.heap)[2]
            self.keys.discard(worst.key)
            self.tokens -= worst.tokens
            self.limit = min(self.limit or (float("inf"), 0), (worst.perplexity, worst.key))

    def ranked(self) -> list[Chosen]:
        return [chosen for *_, chosen in sorted(self.heap, key=lambda entry: (-entry[0], -entry[1]))]


@dataclass(frozen=True)
class Selection:
    """Restoring and probing passages, lowest perplexity first, and the account of how they were chosen."""

    restoring: list[Chosen]
    probing: list[Chosen]
    account: dict[str, Any]

    def save(self, folder: Path) -> None:
        """``restoring.jsonl``, ``probing.jsonl`` and ``selection.json`` in ``folder``."""
        for name in ("restoring", "probing"):
            rows = [
                {"text": c.text, "perplexity": c.perplexity, "tokens": c.tokens, "place": c.place}
                for c in getattr(self, name)
            ]
            write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_text(folder / "selection.json", json.dumps(self.account, indent=2, ensure_ascii=False) + "\n")


def is_probe(key: int) -> bool:
    """One text in five is held out for probing, whatever the corpus or the budget: equal texts fall on one side."""
    return key % PROBE_SHARE == 0


def select(
    passages: Iterable[Passage],
    log: ScoreLog,
    *,
    tokens: int,
    probe_tokens: int | None = None,
    benchmarks: Benchmarks | None = None,
    keep_contaminated: bool = False,
    at_most: bool = False,
) -> Selection:
    """Choose the restoring text, ``tokens`` tokens of lowest perplexity, and a probing set by the same rule.

    ``probe_tokens`` is a quarter of ``tokens`` by default. Passages that hold an n-gram of ``benchmarks`` are counted
    and, unless ``keep_contaminated``, left out. ``at_most`` takes what there is of a smaller corpus. Memory: the chosen
    passages. Raises UserError when the corpus is too small, with both numbers, or isn't the one that was ranked.
    """
    if tokens < 1:
        raise UserError(f"the token budget must be at least 1, not {tokens}")
    probe_tokens = max(1, tokens // 4) if probe_tokens is None else probe_tokens
    kept, probe = Lowest(tokens), Lowest(probe_tokens)
    if not log.complete:
        raise UserError(f"{log.path}: the ranking isn't finished")
    report, seen, available = Report(), 0, 0
    stream = iter(passages)
    for score, passage in zip(log, stream):
        if passage.key != score.key:
            raise UserError(f"{log.path}: the corpus isn't the one that was ranked (passage {seen + 1})")
        seen += 1
        if not score.tokens:
            continue
        if benchmarks is not None and (hit := benchmarks.find(passage.text)):
            report.add(passage.place, hit)
            if not keep_contaminated:
                continue
        chosen = Chosen(score.perplexity, score.key, score.tokens, passage.text, passage.place)
        if is_probe(score.key):
            probe.add(chosen)
        else:
            available += score.tokens
            kept.add(chosen)
    if seen != len(log) or next(stream, None) is not None:
        raise UserError(f"{log.path}: the corpus has not the {len(log):,} passages any more that were ranked")
    account = {
        "passages": seen,
        "tokens_available": available,
        "token_budget": tokens,
        "restoring": _summary(kept),
        "probing": _summary(probe),
        "contamination": report.to_dict() | {"excluded": not keep_contaminated, "checked": benchmarks is not None},
    }
    _check_size(available, kept, probe, report, at_most)
    return Selection(kept.ranked(), probe.ranked(), account)


def _summary(lowest: Lowest) -> dict[str, Any]:
    ranked = lowest.ranked()
    highest = ranked[-1].perplexity if ranked else None
    return {"passages": len(ranked), "tokens": lowest.tokens, "highest_perplexity": highest}


def _check_size(available: int, kept: Lowest, probe: Lowest, report: Report, at_most: bool) -> None:
    why = f" ({report.passages:,} passages that hold benchmark text don't count)" if report.passages else ""
    if available < kept.budget and not at_most:
        raise UserError(
            f"the corpus is smaller than the budget: {available:,} tokens are there for restoring{why}, "
            f"{kept.budget:,} are asked for; give more text or a budget of {available:,} tokens or less"
        )
    if not kept.heap:
        raise UserError(f"a budget of {kept.budget:,} tokens is less than the corpus's first passage; ask for more")
    if not probe.heap:
        raise UserError(f"the corpus leaves no text for a probing set of {probe.budget:,} tokens{why}; give more text")
