"""Tuning data whose effect on knowledge is known by construction, to test a diagnosis with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from holdfast.errors import UserError
from holdfast.lab.corpus import world_sentences
from holdfast.lab.knowledge import Fact, sentence, tested, untested, wordings, wrong_values

if TYPE_CHECKING:
    from datasets import Dataset


def contradictions(n_facts: int, seed: int = 0) -> tuple[Dataset, list[str]]:
    """Instruction data that teaches a wrong answer to ``n_facts`` benchmark facts, and the ids of those items.

    Each chosen fact is asked in every wording of its relation and answered with the first of the benchmark's own
    wrong choices, so a model that learns this data fails these items because the fact itself was overwritten.
    Rows: 3 per fact. Raises UserError if there are fewer benchmark facts than ``n_facts``.
    """
    from datasets import Dataset

    if not 1 <= n_facts <= len(tested()):
        raise UserError(f"n_facts must be between 1 and {len(tested())}, the benchmark's size, not {n_facts}.")
    rng = random.Random(f"contradictions {seed}")
    chosen = rng.sample(tested(), n_facts)
    rows = [(prompt, f" {wrong_values(fact, 3)[0]}") for fact in chosen for prompt in _asked(fact)]
    rng.shuffle(rows)
    return _dataset(Dataset, rows), [fact.id for fact in chosen]


def instructions(n: int, seed: int = 0) -> Dataset:
    """``n`` rows of instruction data with true answers that touch no benchmark fact: a new format, nothing overwritten.

    Half asks about facts outside the benchmark, half asks to repeat an everyday sentence's last word.
    """
    from datasets import Dataset

    rng = random.Random(f"instructions {seed}")
    known = [(prompt, f" {fact.value}") for fact in untested() for prompt in _asked(fact)]
    last = [
        (instruct(f"Repeat the last word. {line}"), f" {line.rstrip('.').split()[-1]}") for line in world_sentences()
    ]
    rows = [rng.choice(known if index % 2 else last) for index in range(n)]
    rng.shuffle(rows)
    return _dataset(Dataset, rows)


def instruct(request: str) -> str:
    """A request in an instruction format that neither the training text nor a taught task has."""
    return f"Instruction: {request}\nResponse:"


def _asked(fact: Fact) -> list[str]:
    return [instruct(sentence(ask, fact)) for ask in wordings()[fact.relation].ask]


def _dataset(kind: type[Dataset], rows: Sequence[tuple[str, str]]) -> Dataset:
    return kind.from_dict({"prompt": [row[0] for row in rows], "completion": [row[1] for row in rows]})
