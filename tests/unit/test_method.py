"""Composition, description and building of methods, without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from holdfast import EWC, METHODS, SAM, SFA, Method, Rehearsal, WiSEFT
from holdfast.errors import UserError
from holdfast.method import apply_checkpoint, apply_data, compose_gradient, describe, from_spec, seams


def test_seams_are_what_a_class_overrides() -> None:
    assert seams(SAM()) == {"gradient"} and seams(SFA()) == {"weights"} and seams(WiSEFT()) == {"checkpoint"}
    assert seams(Rehearsal()) == {"data"} and seams(Method()) == set()
    assert all(seams(kind(**({"source": "x"} if name == "general" else {}))) for name, kind in METHODS.items())


def test_description_is_the_formula() -> None:
    lines = describe([SAM(rho=0.05), EWC(weight=10), SFA(), WiSEFT(alpha=0.3), Rehearsal()], clip=1.0)
    assert lines == [
        "data: rehearsal(share=0.1)",
        "gradient: clip(1.0) ∘ ewc(λ=10, F=empirical) ∘ sam(ρ=0.05)",
        "weights: sfa(p=0.25, β=0.5)",
        "checkpoint: wiseft(α=0.3)",
    ]
    assert describe([SAM(every=10, reuse=0.7)]) == ["gradient: sam(ρ=0.05, every=10, reuse=0.7)"]
    assert describe([]) == []


def test_lists_compose_with_the_first_innermost() -> None:
    @dataclass
    class Note(Method):
        mark: str = ""

        def data(self, task: Any, memory: Any) -> Any:
            return f"{self.mark}({task})"

        def gradient(self, grad: Any, params: Any) -> Any:
            return lambda: f"{self.mark}({grad()})"

        def checkpoint(self, tuned: Any, anchor: Any) -> Any:
            return {"w": f"{self.mark}({tuned['w']},{anchor['w']})"}

    methods = [Note("a"), Note("b")]
    assert apply_data(methods, "task", {}) == "b(a(task))"
    assert compose_gradient(methods, lambda: "g", {})() == "b(a(g))"
    assert apply_checkpoint(methods, {"w": "t"}, {"w": "0"}) == {"w": "b(a(t,0),0)"}


def test_from_spec_builds_what_a_recipe_names() -> None:
    assert from_spec("sam", {"rho": 0.1}) == SAM(rho=0.1)
    assert from_spec("sam", {"rho": "1e-2"}) == SAM(rho=0.01), "YAML reads 1e-2 as text"
    assert from_spec("sam", {"adaptive": True}) == SAM(adaptive=True)
    assert from_spec("sfa") == SFA()
    assert from_spec("rehearsal", {"budget": 100, "weights_by_task": {"a": 1}}).settings()["budget"] == 100


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("samm", None, r"Unknown method 'samm'\. Did you mean 'sam'\?"),
        ("sam", {"roh": 1}, r"sam: unknown setting 'roh'\. Did you mean 'rho'\?"),
        ("sam", {"rho": "big"}, "sam: rho must be a number, got 'big'"),
        ("sam", {"rho": -1}, "sam: rho must be at least 0, got -1"),
        ("sam", {"every": 1.5}, "sam: every must be a whole number, got 1.5"),
        ("sam", {"every": True}, "sam: every must be a whole number, got True"),
        ("sam", {"adaptive": "samsung"}, "adaptive must be true or false or 'asam' or 'magnitude', got 'samsung'"),
        ("sam", {"scope": "("}, "no regular expression"),
        ("sam", {"reuse": 0.7}, "reuse must be 0 unless every > 1"),
        ("sfa", {"p": 0}, r"sfa: p must be in \(0, 1\], got 0"),
        ("sfa", {"p": 1.5}, r"sfa: p must be in \(0, 1\]"),
        ("rehearsal", {"share": 1.0}, r"rehearsal: share must be in \[0, 1\)"),
        ("rehearsal", {"mode": "mix"}, "mode must be 'replace' or 'add', got 'mix'"),
        ("general", {}, "general: the setting 'source' is required"),
        ("ewc", {"fisher": "full"}, "fisher must be 'empirical' or 'true' or 'batch'"),
        ("sam", [0.05], "settings must be a mapping"),
    ],
)
def test_bad_settings_are_one_clear_message(name: str, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_spec(name, settings)
