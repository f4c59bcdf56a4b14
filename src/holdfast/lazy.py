"""Names that are imported when they are first asked for, so that importing holdfast costs nothing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def lazily(package: str, public: Mapping[str, str], name: str) -> Any:
    """What ``package.name`` is, from the module that ``public`` gives for it: absolute, or relative to the package.

    Raises AttributeError for a name that is not public.
    """
    if name not in public:
        raise AttributeError(f"module '{package}' has no attribute {name!r}")
    module = public[name]
    return getattr(importlib.import_module(module if "." in module else f"{package}.{module}"), name)
