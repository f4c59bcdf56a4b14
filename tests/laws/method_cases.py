"""One table: every registered method with a setting that changes nothing and one that clearly acts."""

from __future__ import annotations

from collections.abc import Callable

from holdfast import L2, SAM, SFA, Method, Rehearsal, WiSEFT
from holdfast.methods import MomentumSAM

NEUTRAL: dict[str, Callable[[], Method]] = {
    "sam": lambda: SAM(rho=0.0),
    "msam": lambda: MomentumSAM(rho=0.0),
    "sfa": lambda: SFA(beta=0.0),
    "l2": lambda: L2(weight=0.0),
    "rehearsal": lambda: Rehearsal(share=0.0),
    "wiseft": lambda: WiSEFT(alpha=1.0),
}
ACTIVE: dict[str, Callable[[], Method]] = {
    "sam": lambda: SAM(rho=0.5),
    "msam": lambda: MomentumSAM(rho=0.5),
    "sfa": lambda: SFA(p=0.5),
    "l2": lambda: L2(weight=1.0),
    "rehearsal": lambda: Rehearsal(share=0.25),
    "wiseft": lambda: WiSEFT(alpha=0.5),
}
