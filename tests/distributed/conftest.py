"""Lets the distributed tests import the tiny world of the law tests."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import transformers  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent.parent / "laws"))

gc.freeze()
