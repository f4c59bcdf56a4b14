"""Data: the field's formats -> the columns TRL understands, with errors that name file and line."""

from __future__ import annotations

from holdfast.data.files import read_text
from holdfast.data.read import raw_rows, read_examples, train_test
from holdfast.data.supervision import Preview, Supervision, check_supervised, for_tokenizer, preview
from holdfast.data.templates import fill_template

__all__ = [
    "Preview",
    "Supervision",
    "check_supervised",
    "fill_template",
    "for_tokenizer",
    "preview",
    "raw_rows",
    "read_examples",
    "read_text",
    "train_test",
]
