"""Templates over a row's columns: ``"Question: {question}\\nAnswer:"``."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from holdfast.errors import UserError, did_you_mean

NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?")


def fill_template(template: str, row: Mapping[str, Any], where: str = "template") -> str:
    """Fill a template with a row's values; ``{{`` and ``}}`` are braces.

    ``{column}`` is the value, ``{column[0]}`` an element of a list. After a colon come a Python format
    (``{score:.1f}``), words for values (``{label:0=no,1=yes}``), ``number`` (``4.0`` -> ``4``, ``1,200`` -> ``1200``),
    ``letter`` (``2`` -> ``C``) or ``lettered`` (a list as lines ``A. …``).
    Raises UserError with ``where``, the columns that are there and the nearest name.
    """
    return _compiled(template)(row, where)


def template_columns(template: str) -> list[str]:
    """The columns that a template uses, in order."""
    return [_root(field) for _, field, _, _ in _parts(template) if field is not None]


@lru_cache(maxsize=64)
def _parts(template: str) -> tuple[tuple[str, str | None, str, str | None], ...]:
    try:
        parts = tuple(
            (literal, field, spec or "", conversion)
            for literal, field, spec, conversion in string.Formatter().parse(template)
        )
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}; write {{{{ and }}}} for braces in the text") from error
    for _, field, spec, _ in parts:
        if field is not None and (not _root(field) or "{" in spec):
            raise UserError(f"template {template!r}: a field needs a column's name, for example {{question}}")
    return parts


def _root(field: str) -> str:
    return re.split(r"[.\[]", field, maxsplit=1)[0].strip()


@lru_cache(maxsize=64)
def _compiled(template: str) -> Callable[[Mapping[str, Any], str], str]:
    parts = _parts(template)
    formatter = string.Formatter()

    def fill(row: Mapping[str, Any], where: str) -> str:
        text = []
        for literal, field, spec, conversion in parts:
            text.append(literal)
            if field is None:
                continue
            root = _root(field)
            if root not in row:
                raise UserError(missing_column(root, row, where))
            value = row[root]
            try:
                if field != root:
                    value = formatter.get_field(field, (), row)[0]
                if conversion:
                    value = formatter.convert_field(value, conversion)
                text.append(_format(value, spec))
            except UserError as error:
                raise UserError(f"{where}: column '{root}': {error}") from None
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise UserError(
                    f"{where}: column '{root}': {{{field}:{spec}}} doesn't fit {value!r:.60}: {error}"
                ) from error
        return "".join(text)

    return fill


def missing_column(name: str, row: Mapping[str, Any], where: str) -> str:
    """The message for a column that a row lacks: what is there, and the nearest name."""
    near = did_you_mean(name, row) if row else ""
    return (
        f"{where}: no column '{name}'; there are: {', '.join(map(str, row)) or 'none'}.{near if 'Did' in near else ''}"
    )


def _format(value: Any, spec: str) -> str:
    if value is None:
        raise UserError("is empty (null)")
    if not spec:
        return value if isinstance(value, str) else str(value)
    if ("=" in spec and "," in spec) or re.fullmatch(r"[^=]+=.*", spec):
        return _word(value, spec)
    if special := SPECIAL.get(spec):
        return special(value)
    return format(value, spec)


def _word(value: Any, spec: str) -> str:
    words = dict(pair.split("=", 1) for pair in re.split(r",(?=[^,=]+=)", spec))  # a word may hold commas
    key = str(int(value)) if isinstance(value, bool) and str(value) not in words else str(value)
    if key not in words:
        raise UserError(f"{value!r:.40} is none of {', '.join(words)}")
    return words[key]


def _number(value: Any) -> str:
    """A number as it is written by hand, without thousands separators and ``.0``; other text as it stands.

    Answer columns mix both ("4.0" beside "B"), so text is no error here.
    """
    text = str(value).strip()
    if not NUMBER.fullmatch(text):
        return text
    plain = text.replace(",", "").removeprefix("+")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def _letter(value: Any) -> str:
    index = int(value)
    if not 0 <= index < 26:
        raise UserError(f"{value!r:.40} has no letter (0 is A, 25 is Z)")
    return string.ascii_uppercase[index]


def _lettered(value: Any) -> str:
    if not isinstance(value, list):
        raise UserError(f"{value!r:.40} is not a list")
    return "\n".join(f"{_letter(i)}. {choice}" for i, choice in enumerate(value))


SPECIAL: dict[str, Callable[[Any], str]] = {"number": _number, "letter": _letter, "lettered": _lettered}
