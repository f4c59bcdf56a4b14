"""The taught tasks, in instruction format, that the lab's base model can't do: math, law and code.

Every example is drawn from a seeded generator; the test split and the training split share no prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from holdfast.errors import UserError, did_you_mean
from holdfast.lab.words import NAMES, THINGS, coding

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN, TEST = 1500, 160  # examples per split
Example = tuple[str, str]  # prompt, completion (with its leading space)

ADDITION = (
    "{n} has {a} {t} and buys {b} more. How many {t} does {n} have?",
    "{n} has {a} {t}. {m} gives {n} {b} {t}. How many {t} does {n} have?",
    "{n} finds {a} {t} and then {b} more. How many {t} does {n} have?",
    "{n} has {a} {t} and {m} has {b} {t}. How many {t} do they have?",
)
SUBTRACTION = (
    "{n} has {a} {t} and loses {b}. How many {t} are left?",
    "{n} has {a} {t}. {n} gives {m} {b} {t}. How many {t} are left?",
    "{n} had {a} {t} and sold {b}. How many {t} are left?",
    "There are {a} {t} and {n} takes {b}. How many {t} are left?",
)

# label -> clauses; {p} and {q} are the parties, {d} a number of days, {w} a place
CLAUSES = {
    "payment": (
        "The {p} shall pay the {q} within {d} days.",
        "Each invoice of the {q} is due after {d} days.",
        "Late payment by the {p} bears interest after {d} days.",
        "The {p} pays the fees of the {q} every {d} days.",
    ),
    "termination": (
        "The {p} may end this contract by notice of {d} days.",
        "This contract ends if the {q} is in breach for {d} days.",
        "Either the {p} or the {q} may terminate after {d} days.",
        "The {q} may terminate if the {p} does not act within {d} days.",
    ),
    "confidentiality": (
        "The {p} shall keep secret what the {q} discloses.",
        "The {p} shall not disclose records of the {q} for {d} days.",
        "Information of the {q} is confidential to the {p}.",
        "The {p} keeps all documents of the {q} secret for {d} days.",
    ),
    "law": (
        "The law of {w} governs the {p} and the {q}.",
        "This contract of the {p} is governed by the law of {w}.",
        "The {p} and the {q} accept the law of {w}.",
        "Rights of the {q} follow the law of {w}.",
    ),
    "disputes": (
        "The courts of {w} decide disputes of the {p} and the {q}.",
        "The {p} and the {q} settle disputes by arbitration in {w}.",
        "An arbitrator in {w} hears the {p} and the {q}.",
        "Any dispute with the {q} goes to a court in {w}.",
    ),
    "liability": (
        "The {p} is liable to the {q} for loss and damage.",
        "Liability of the {p} has a limit of {d} coins.",
        "The {p} is not liable for loss of the {q}.",
        "The {q} pays for damage to the {p}.",
    ),
    "warranty": (
        "The {q} warrants that the goods are free of defects for {d} days.",
        "The {q} repairs goods with defects for the {p}.",
        "Goods with defects are replaced by the {q} within {d} days.",
        "The {q} gives the {p} a warranty of {d} days.",
    ),
    "assignment": (
        "The {p} may not transfer this contract without consent of the {q}.",
        "The {p} may assign its rights to another party.",
        "The {q} may transfer its rights after {d} days.",
        "The {p} may not assign this contract within {d} days.",
    ),
}
PARTIES = (
    ("tenant", "landlord"),
    ("buyer", "seller"),
    ("customer", "supplier"),
    ("client", "consultant"),
    ("employer", "employee"),
    ("borrower", "lender"),
    ("licensee", "licensor"),
)
PLACES = ("France", "Japan", "Ohio", "Texas", "Kenya", "Peru", "Norway", "Italy", "Nevada", "Egypt", "Chile", "Spain")

# how each task asks; the completion starts with a space
PROMPTS = {
    "math": "Problem: {request}\nSolution:",
    "law": "Clause: {request}\nType:",
    "code": "Request: {request}\nCode:",
}


def ask(task: str, request: str) -> str:
    """A request in a taught task's instruction format."""
    return PROMPTS[task].format(request=request)


def _math(rng: random.Random) -> Example:
    name, other = rng.sample(NAMES, 2)
    a, b = rng.randint(1, 5), rng.randint(1, 5)
    if rng.random() < 0.5:
        template, answer = rng.choice(ADDITION), a + b
    else:
        template, answer = rng.choice(SUBTRACTION), a
        a += b
    story = template.format(n=name, m=other, a=a, b=b, t=rng.choice(THINGS))
    return ask("math", story), f" {answer}"


def _law(rng: random.Random) -> Example:
    label = rng.choice(list(CLAUSES))
    first, second = rng.choice(PARTIES)
    clause = rng.choice(CLAUSES[label]).format(p=first, q=second, d=rng.randint(2, 90), w=rng.choice(PLACES))
    return ask("law", f"{rng.randint(1, 40)}. {clause}"), f" {label}"


def _code(rng: random.Random) -> Example:
    request, program = coding(rng)
    return ask("code", f"{request}."), f" {program}"


TASKS: dict[str, Callable[[random.Random], Example]] = {"math": _math, "law": _law, "code": _code}


def examples(name: str, split: str) -> list[Example]:
    """The (prompt, completion) pairs of one split; the same on every machine."""
    if name not in TASKS:
        raise UserError(f"the lab has no task '{name}'.{did_you_mean(name, TASKS)}")
    sizes = {"test": (0, TEST), "train": (TEST, TEST + TRAIN)}
    if split not in sizes:
        raise UserError(f"the lab's tasks have no split '{split}'.{did_you_mean(split, sizes)}")
    start, end = sizes[split]
    made = distinct(TASKS[name], random.Random(f"task {name}"))
    return [example for _, example in zip(range(end), made)][start:]


def distinct(make: Callable[[random.Random], Example], rng: random.Random) -> Iterator[Example]:
    """Examples from a generator without a prompt twice (endless only while the generator finds new ones)."""
    seen: set[str] = set()
    while True:
        prompt, completion = make(rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, completion


def load_task(name: str, split: str = "train") -> Dataset:
    """A taught task as a data set with the columns ``prompt`` and ``completion``.

    ``name``: math, law or code; ``split``: train (1500 rows) or test (160 rows, no prompt of which is in train).
    Raises UserError for another name or split.
    """
    from datasets import Dataset

    rows = examples(name, split)
    return Dataset.from_dict({"prompt": [row[0] for row in rows], "completion": [row[1] for row in rows]})
