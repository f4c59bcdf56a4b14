"""People and things that the number stories and the math task are about."""

from __future__ import annotations

NAMES: tuple[str, ...] = ("Anna", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana")
NAMES += ("Ivan", "Jane", "Kai", "Lena", "Max", "Nora", "Omar", "Pia")
THINGS = ("apples", "pears", "plums", "pens", "books", "balls", "marbles", "cards", "eggs", "coins", "stamps", "shells")
