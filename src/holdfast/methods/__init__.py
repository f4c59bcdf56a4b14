"""Every method by its recipe name. A new one: a file here, a line in ``METHODS``, a page in docs, a reference test."""

from __future__ import annotations

from holdfast.method import Method
from holdfast.methods.averaging import EMA, SFA, WiSEFT
from holdfast.methods.distill import Distill
from holdfast.methods.fisher_merge import FisherMerge
from holdfast.methods.freeze import Freeze
from holdfast.methods.general import General, PseudoRehearsal
from holdfast.methods.penalty import EWC, L1, L2
from holdfast.methods.rehearsal import Rehearsal
from holdfast.methods.sam import SAM, MomentumSAM

METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (
        *(SAM, MomentumSAM, L2, L1, EWC, Distill, Freeze),
        *(SFA, EMA, WiSEFT, FisherMerge),
        *(Rehearsal, PseudoRehearsal, General),
    )
}

__all__ = [
    "EMA",
    "EWC",
    "L1",
    "L2",
    "METHODS",
    "SAM",
    "SFA",
    "Distill",
    "FisherMerge",
    "Freeze",
    "General",
    "MomentumSAM",
    "PseudoRehearsal",
    "Rehearsal",
    "WiSEFT",
]
