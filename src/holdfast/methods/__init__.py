"""Every method by its recipe name. A new one: a file here, a line in ``METHODS``, a page in docs, a reference test."""

from __future__ import annotations

from holdfast.method import Method
from holdfast.methods.averaging import SFA, WiSEFT
from holdfast.methods.penalty import L2
from holdfast.methods.rehearsal import Rehearsal
from holdfast.methods.sam import SAM, MomentumSAM

METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (SAM, MomentumSAM, SFA, L2, Rehearsal, WiSEFT)}

__all__ = ["L2", "METHODS", "SAM", "SFA", "MomentumSAM", "Rehearsal", "WiSEFT"]
