"""What the user got wrong, in one clear message: never a traceback, exit code 2 on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input that can't be used. The message names the file, line or key, and what was expected."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest valid name, or the list of valid names if none is near."""
    valid = sorted(options)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Valid: {', '.join(valid)}." if valid else ""
