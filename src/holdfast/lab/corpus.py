"""Plain text made of the facts: what the lab's model reads in pretraining, and text it has never seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Literal

from holdfast.errors import UserError, did_you_mean
from holdfast.lab.knowledge import FOLDER, Fact, facts, reserved, sentence, untested, wordings
from holdfast.lab.words import coding

Split = Literal["train", "heldout", "restore"]
ROUNDS = 12  # times that the training text goes through every fact, each time in other words and another order
HELDOUT_PASSAGES = 150
RESTORE_ROUNDS = 3
HOW_TOS = 250  # sentences about code in each round
CODING = (
    "To {request} you write {program} in code.",
    "In code {program} is how to {request}.",
    "Programmers write {program} to {request}.",
)
LARGEST_NUMBER = 10  # the number sentences stay within 0..10


def corpus(split: Split = "train") -> Iterator[str]:
    """Plain-text passages of one to six sentences, always the same ones in the same order.

    ``train``: what the packaged model was pretrained on. ``heldout``: known facts in wordings that the training text
    uses for other facts only. ``restore``: the training wordings, drawn anew, of only those facts that the benchmark
    does not ask about; text to restore a tuned model with that can't teach it the benchmark.
    Raises UserError for another split.
    """
    makers: dict[str, Callable[[], Iterator[str]]] = {"train": _train, "heldout": _heldout, "restore": _restore}
    if split not in makers:
        raise UserError(f"the lab has no text split '{split}'.{did_you_mean(split, makers)}")
    return makers[split]()


def _train() -> Iterator[str]:
    for turn in range(ROUNDS):
        yield from _round(facts(), random.Random(f"train {turn}"))


def _restore() -> Iterator[str]:
    for turn in range(RESTORE_ROUNDS):
        yield from _round(untested(), random.Random(f"restore {turn}"))


def _round(known: Sequence[Fact], rng: random.Random) -> list[str]:
    """Every fact once in a paragraph and once in a quiz, the number sentences and the everyday sentences; shuffled."""
    passages = [_paragraph(group, rng) for group in _by_subject(known)]
    passages += _quizzes(known, rng)
    passages += _pairs(known, rng)
    passages += _in_groups(_number_sentences(), 4, rng)
    passages += _in_groups([_how_to(rng) for _ in range(HOW_TOS)], 2, rng)
    passages += _in_groups(world_sentences(), 3, rng)
    rng.shuffle(passages)
    return passages


def _by_subject(known: Sequence[Fact]) -> list[list[Fact]]:
    def subject(fact: Fact) -> tuple[str, str]:
        return fact.relation.split(".")[0], fact.subject

    return [list(group) for _, group in groupby(known, key=subject)]


def _paragraph(group: Sequence[Fact], rng: random.Random) -> str:
    order = rng.sample(group, len(group))
    return " ".join(sentence(rng.choice(_sayings(fact)), fact) for fact in order)


def _sayings(fact: Fact) -> tuple[str, ...]:
    """The wordings that training text may use for a fact."""
    wording = wordings()[fact.relation]
    return wording.say if fact.id in reserved() else wording.say + wording.kept


def _quizzes(known: Sequence[Fact], rng: random.Random) -> list[str]:
    """Questions and answers, one to three to a passage."""
    lines = [quiz(fact, rng.choice(wordings()[fact.relation].ask)) for fact in rng.sample(known, len(known))]
    return _in_groups(lines, 3, rng, join="\n")


def quiz(fact: Fact, ask: str) -> str:
    """A quiz question in the pretraining style, with its answer."""
    return f"{quiz_prompt(fact, ask)} {fact.value}"


def quiz_prompt(fact: Fact, ask: str) -> str:
    """The part of a quiz question before its answer (the answer carries the leading space)."""
    return f"Question: {sentence(ask, fact)}\nAnswer:"


def _pairs(known: Sequence[Fact], rng: random.Random) -> list[str]:
    """Sentences that connect two subjects with the same value, for relations that have a wording for it."""
    same: dict[tuple[str, str], list[Fact]] = {}
    for fact in known:
        if wordings()[fact.relation].both:
            same.setdefault((fact.relation, fact.value), []).append(fact)
    made = []
    for (relation, _), members in same.items():
        for first, second in zip(members, rng.sample(members, len(members))):
            if first != second and rng.random() < 0.3:
                made.append(sentence(rng.choice(wordings()[relation].both), first, other=second.subject))
    return made


def _number_sentences() -> list[str]:
    """The tables of plus, minus and times within 0..10, and the order of the numbers."""
    limit = range(LARGEST_NUMBER + 1)
    made = [f"{a} plus {b} is {a + b}." for a in limit for b in limit if a + b <= LARGEST_NUMBER]
    made += [f"{a} minus {b} is {a - b}." for a in limit for b in limit if b <= a]
    made += [f"{a} times {b} is {a * b}." for a in limit for b in limit if a * b <= LARGEST_NUMBER]
    made += [f"After {a} comes {a + 1}." for a in limit]
    return made


def _how_to(rng: random.Random) -> str:
    """A sentence that says what a piece of code is for."""
    request, program = coding(rng)
    return rng.choice(CODING).format(request=request, program=program)


def world_sentences() -> list[str]:
    """The everyday sentences of ``facts/world.txt``."""
    lines = (FOLDER / "world.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _in_groups(lines: Sequence[str], most: int, rng: random.Random, join: str = " ") -> list[str]:
    left = rng.sample(lines, len(lines))
    made = []
    while left:
        size = rng.randint(1, most)
        made.append(join.join(left[:size]))
        left = left[size:]
    return made


def _heldout() -> Iterator[str]:
    """Paragraphs about one subject that say its reserved facts in wordings which training keeps for other facts."""
    rng = random.Random("heldout")
    subjects = [group for group in _by_subject(facts()) if any(fact.id in reserved() for fact in group)]
    for group in rng.sample(subjects, HELDOUT_PASSAGES):
        parts = []
        for fact in rng.sample(group, len(group)):
            wording = wordings()[fact.relation]
            parts.append(sentence(rng.choice(wording.kept if fact.id in reserved() else wording.say), fact))
        yield " ".join(parts)
