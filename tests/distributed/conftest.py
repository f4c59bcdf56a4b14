"""Lets the distributed tests import the tiny world of the law tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "laws"))
