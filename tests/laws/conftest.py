"""Lets the law tests import the shared tiny world beside them."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import transformers  # noqa: F401  (what it allocates is what makes collections slow)

sys.path.insert(0, str(Path(__file__).parent))

# The Trainer collects garbage at every start, over everything ever imported: leave that out of it.
gc.freeze()
