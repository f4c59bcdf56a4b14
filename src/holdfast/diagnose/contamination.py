"""Does the restoring text hold the benchmark? Restoring with it would teach what it is meant to measure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from holdfast.errors import UserError

if TYPE_CHECKING:
    from holdfast.evaluate.tasks import EvalTask, Item

NGRAM = 13  # words; the length that is usual for training data
SHORTEST = 5  # an item of fewer words is too common to look for
TEMPLATE_SHARE = 0.1  # an n-gram in more than this share of a task's items is its template, not its content
WORD = re.compile(r"\w+")


class Hit(NamedTuple):
    """An n-gram of a benchmark item that a passage holds."""

    task: str
    item: str
    words: str


class Benchmarks:
    """The word n-grams of benchmark items, to look up in passages.

    An item's text is its prompt and its right answer. Items shorter than ``ngram`` words are looked for whole, if they
    have at least 5 words. N-grams that more than a tenth of a task's items share (at least 3) are its template and
    don't count. Perplexity tasks have no answers and are left out. Memory: one entry per distinct n-gram of the
    benchmarks, whatever the size of the corpus.
    """

    def __init__(self, tasks: Sequence[EvalTask], ngram: int = NGRAM) -> None:
        if ngram < SHORTEST:
            raise UserError(f"an n-gram of {ngram} words finds chance matches; take {SHORTEST} or more")
        self.ngram = ngram
        self.grams: dict[int, dict[str, tuple[str, str]]] = {}
        self.items = 0
        for task in tasks:
            if task.kind == "perplexity":
                continue
            self.items += len(task.items)
            found: dict[tuple[int, str], tuple[str, str]] = {}
            shared: Counter[tuple[int, str]] = Counter()
            for item in task.items:
                grams = set(_grams(words_of(_text(item)), ngram))
                shared.update(grams)
                for gram in grams:
                    found.setdefault(gram, (task.name, item.id))
            template = max(2, int(TEMPLATE_SHARE * len(task.items)))
            for gram, owner in found.items():
                if shared[gram] <= template:
                    self.grams.setdefault(gram[0], {}).setdefault(gram[1], owner)

    def find(self, text: str) -> Hit | None:
        """The first benchmark n-gram in a passage, if it has any."""
        words = words_of(text)
        for size, known in self.grams.items():
            for start in range(len(words) - size + 1):
                phrase = " ".join(words[start : start + size])
                if phrase in known:
                    return Hit(*known[phrase], phrase)
        return None


def words_of(text: str) -> list[str]:
    """Lower-case words, without punctuation."""
    return WORD.findall(text.lower())


def _text(item: Item) -> str:
    if item.choices and isinstance(item.answer, int) and 0 <= item.answer < len(item.choices):
        return item.prompt + " " + item.choices[item.answer]
    return f"{item.prompt} {item.answer}" if isinstance(item.answer, str) else item.prompt


def _grams(words: list[str], ngram: int) -> Iterator[tuple[int, str]]:
    if SHORTEST <= len(words) < ngram:
        yield len(words), " ".join(words)
    for start in range(len(words) - ngram + 1):
        yield ngram, " ".join(words[start : start + ngram])


class Report:
    """What the check found: how many passages of how many overlap, which items they touch, and examples."""

    EXAMPLES = 10

    def __init__(self) -> None:
        self.passages = 0
        self.items: set[tuple[str, str]] = set()
        self.examples: list[dict[str, str]] = []

    def add(self, place: str, hit: Hit) -> None:
        self.passages += 1
        self.items.add((hit.task, hit.item))
        if len(self.examples) < self.EXAMPLES:
            self.examples.append({"passage": place, "task": hit.task, "item": hit.item, "words": hit.words})

    def to_dict(self) -> dict[str, object]:
        tasks: Counter[str] = Counter(task for task, _ in self.items)
        return {"passages": self.passages, "items": len(self.items), "tasks": dict(tasks), "examples": self.examples}


def overlap(passages: Iterable[str], tasks: Sequence[EvalTask], ngram: int = NGRAM) -> dict[str, object]:
    """How many of these texts share an n-gram of ``ngram`` words with the tasks' items, and which."""
    benchmarks, report = Benchmarks(tasks, ngram), Report()
    for index, text in enumerate(passages):
        if hit := benchmarks.find(text):
            report.add(str(index), hit)
    return report.to_dict()
