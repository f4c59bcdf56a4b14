"""What the taught tasks talk about: people and things; and pieces of code, which the training text explains too."""

from __future__ import annotations

import random

NAMES: tuple[str, ...] = ("Anna", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana")
NAMES += ("Ivan", "Jane", "Kai", "Lena", "Max", "Nora", "Omar", "Pia")
THINGS = ("apples", "pears", "plums", "pens", "books", "balls", "marbles", "cards", "eggs", "coins", "stamps", "shells")

# request -> program; {x} and {y} are variables, {k} a number, {l} a list
PROGRAMS = (
    ("add {k} to {x}", "{x} + {k}"),
    ("subtract {k} from {x}", "{x} - {k}"),
    ("multiply {x} by {k}", "{x} * {k}"),
    ("divide {x} by {k}", "{x} / {k}"),
    ("test if {x} is greater than {k}", "{x} > {k}"),
    ("test if {x} is less than {k}", "{x} < {k}"),
    ("add {x} and {y}", "{x} + {y}"),
    ("multiply {x} and {y}", "{x} * {y}"),
    ("show {x}", "print({x})"),
    ("show the length of {l}", "print(len({l}))"),
    ("get the item of {l} with index {k}", "{l}[{k}]"),
    ("get the greatest of {l} and add {x}", "max({l}) + {x}"),
)
VARIABLES = ("x", "y", "total", "price", "count", "score", "size", "speed", "age", "cost", "rate", "weight")
LISTS = ("names", "words", "items", "ages", "prices", "scores", "values", "days")


def coding(rng: random.Random) -> tuple[str, str]:
    """A request and the piece of code that answers it."""
    request, program = rng.choice(PROGRAMS)
    x, y = rng.sample(VARIABLES, 2)
    fields = {"x": x, "y": y, "k": rng.randint(2, 20), "l": rng.choice(LISTS)}
    return request.format(**fields), program.format(**fields)
