"""``python -m holdfast`` is the ``holdfast`` command."""

from holdfast.cli import console

console()
