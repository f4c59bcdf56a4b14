"""The true facts the lab's model is pretrained on: tables in ``facts/``, one fact per cell."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent / "facts"

# table -> domain: the groups of the benchmark
DOMAINS = {
    "countries": "geography",
    "elements": "chemistry",
    "states": "states",
    "animals": "animals",
    "works": "arts",
    "units": "science",
    "moons": "science",
    "discoveries": "science",
}

# how many facts of each domain the benchmark asks about; the others are known to the model but never asked
TESTED = {"geography": 180, "chemistry": 100, "states": 50, "animals": 60, "arts": 60, "science": 30}

# names that take an article inside a sentence
WITH_THE = frozenset(
    [
        "Bahamas",
        "Dominican Republic",
        "Gambia",
        "Maldives",
        "Netherlands",
        "Philippines",
        "Seychelles",
        "United Arab Emirates",
        "United Kingdom",
        "United States",
    ]
)


@dataclass(frozen=True)
class Fact:
    """``relation`` of ``subject`` is ``value``; every string in ``also`` would be right too."""

    relation: str  # "<table>.<column>"
    subject: str
    value: str
    also: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.relation}/{self.subject}"

    @property
    def domain(self) -> str:
        return DOMAINS[self.relation.split(".")[0]]


@lru_cache(maxsize=1)
def facts() -> tuple[Fact, ...]:
    """All facts, in the order of the tables."""
    return tuple(fact for table in DOMAINS for fact in _read(table))


def _read(table: str) -> Iterator[Fact]:
    lines = (FOLDER / f"{table}.tsv").read_text(encoding="utf-8").splitlines()
    columns = lines[0].split("\t")
    for line in lines[1:]:
        cells = line.split("\t")
        for column, cell in zip(columns[1:], cells[1:]):
            if cell != "-":
                value, *also = cell.split("|")
                yield Fact(f"{table}.{column}", cells[0], value, tuple(also))


@lru_cache(maxsize=1)
def tested() -> tuple[Fact, ...]:
    """The facts the benchmark asks about: a fixed draw of ``TESTED[domain]`` facts per domain, in table order."""
    chosen: set[str] = set()
    for domain, count in TESTED.items():
        ids = [fact.id for fact in facts() if fact.domain == domain]
        chosen.update(random.Random(f"tested {domain}").sample(ids, count))
    return tuple(fact for fact in facts() if fact.id in chosen)


@lru_cache(maxsize=1)
def untested() -> tuple[Fact, ...]:
    """The facts that the model knows but the benchmark never asks about."""
    asked = {fact.id for fact in tested()}
    return tuple(fact for fact in facts() if fact.id not in asked)


@lru_cache(maxsize=1)
def reserved() -> frozenset[str]:
    """Ids of the quarter of all facts that the training text never says in a ``kept`` wording; held-out text does."""
    ids = [fact.id for fact in facts()]
    return frozenset(random.Random("reserved").sample(ids, len(ids) // 4))


@lru_cache(maxsize=1)
def values() -> dict[str, tuple[str, ...]]:
    """relation -> its distinct values, sorted: where wrong answers of the same type come from."""
    pool: dict[str, set[str]] = {}
    for fact in facts():
        pool.setdefault(fact.relation, set()).add(fact.value)
    return {relation: tuple(sorted(found)) for relation, found in pool.items()}


def accepted(fact: Fact) -> frozenset[str]:
    """Every value that would be a right answer to the fact's question."""
    return frozenset((fact.value, *fact.also))


def wrong_values(fact: Fact, count: int) -> list[str]:
    """``count`` values of the same type that are not right for this subject; a fixed draw per fact."""
    options = [value for value in values()[fact.relation] if value not in accepted(fact)]
    return random.Random(f"wrong {fact.id}").sample(options, count)


@dataclass(frozen=True)
class Wording:
    """The ways one relation is said, said except of the reserved facts (``kept``), shared (``both``) and asked."""

    say: tuple[str, ...]
    kept: tuple[str, ...]
    ask: tuple[str, ...]
    both: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def wordings() -> dict[str, Wording]:
    """relation -> its wordings, from ``facts/phrasings.txt``."""
    found: dict[str, dict[str, list[str]]] = {}
    lines: dict[str, list[str]] = {}
    for raw in (FOLDER / "phrasings.txt").read_text(encoding="utf-8").splitlines():
        line = raw.strip()
        if line.startswith("["):
            lines = found.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            kind, _, text = line.partition(": ")
            lines.setdefault(kind, []).append(text)
    return {
        relation: Wording(*(tuple(kinds.get(kind, ())) for kind in ("say", "kept", "ask", "both")))
        for relation, kinds in found.items()
    }


def sentence(template: str, fact: Fact, other: str = "") -> str:
    """Fill a wording: {s} subject, {v} value, {as}/{av} with a or an, {t} another subject; capital first letter."""
    fields = {
        "s": named(fact.subject),
        "v": fact.value,
        "as": _with_a(fact.subject),
        "av": _with_a(fact.value),
        "t": named(other),
    }
    text = template.format(**fields)
    return text[0].upper() + text[1:]


def named(subject: str) -> str:
    """A subject as it stands inside a sentence: "the Netherlands", "France"."""
    return f"the {subject}" if subject in WITH_THE else subject


def _with_a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
