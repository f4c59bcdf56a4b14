"""One table: every registered method with a setting that changes nothing and one that clearly acts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from holdfast import EMA, EWC, L2, SAM, SFA, Distill, FisherMerge, Freeze, Method, Rehearsal, WiSEFT
from holdfast.methods import L1, General, MomentumSAM, PseudoRehearsal

_SOURCE = Path(tempfile.mkdtemp(prefix="holdfast-laws-")) / "general.jsonl"
_SOURCE.write_text("".join(json.dumps({"prompt": "q", "completion": "rst"}) + "\n" for _ in range(9)))

ON_TEXT = {"general", "pseudo_rehearsal"}  # methods that need text: their laws run in TRL's trainer

NEUTRAL: dict[str, Callable[[], Method]] = {
    "sam": lambda: SAM(rho=0.0),
    "msam": lambda: MomentumSAM(rho=0.0),
    "l2": lambda: L2(weight=0.0),
    "l1": lambda: L1(weight=0.0),
    "ewc": lambda: EWC(weight=0.0),
    "distill": lambda: Distill(weight=0.0),
    "freeze": lambda: Freeze(),
    "sfa": lambda: SFA(beta=0.0),
    "ema": lambda: EMA(decay=0.0),
    "wiseft": lambda: WiSEFT(alpha=1.0),
    "fisher_merge": lambda: FisherMerge(anchor_weight=0.0),
    "rehearsal": lambda: Rehearsal(share=0.0),
    "general": lambda: General(source=str(_SOURCE), share=0.0),
    "pseudo_rehearsal": lambda: PseudoRehearsal(share=0.0),
}
ACTIVE: dict[str, Callable[[], Method]] = {
    "sam": lambda: SAM(rho=0.5),
    "msam": lambda: MomentumSAM(rho=0.5),
    "l2": lambda: L2(weight=1.0),
    "l1": lambda: L1(weight=0.03),
    "ewc": lambda: EWC(weight=1.0, samples=6),
    "distill": lambda: Distill(weight=2.0),
    "freeze": lambda: Freeze(layers=1, embeddings=True),
    "sfa": lambda: SFA(p=0.5),
    "ema": lambda: EMA(decay=0.7),
    "wiseft": lambda: WiSEFT(alpha=0.5),
    "fisher_merge": lambda: FisherMerge(samples=6, normalize=True),
    "rehearsal": lambda: Rehearsal(share=0.25),
    "general": lambda: General(source=str(_SOURCE), share=0.25),
    "pseudo_rehearsal": lambda: PseudoRehearsal(share=0.25, max_new_tokens=6),
}
LONGER: dict[str, Callable[[], Method]] = {  # settings with state that only some of their steps touch
    "looksam": lambda: SAM(rho=0.5, every=3, reuse=0.7, mask=0.5, mask_every=2),
    "random": lambda: SAM(rho=0.5, direction="random"),
    "rolling": lambda: SFA(p=0.4, anchor="rolling", moments="scale"),
    "continuous": lambda: SFA(p=0.4, mode="continuous"),
}


# Runs with each of them, and without any: (methods, in TRL's trainer on text).
RUNS: dict[str, tuple[Callable[[], list[Method]], bool]] = {
    "plain": (list, False),
    "plain text": (list, True),
    **{name: ((lambda make=make: [make()]), name in ON_TEXT) for name, make in sorted(ACTIVE.items())},
}
