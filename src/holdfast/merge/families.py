"""The table of merge methods: what each takes, and the formula its settings make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.errors import UserError, did_you_mean
from holdfast.merge.formulas import Combination, Deltas, FisherMean, Formula, Slerp

TIES_DENSITY = 0.2  # the paper's k = 20 %
DARE_DENSITY = 0.5
PRUNE_DENSITY = 0.2

Weights = Sequence[float] | float | None


def _weights(count: int, weights: Weights, default: float = 1.0) -> tuple[float, ...]:
    if count == 0:
        raise UserError("a merge needs at least one model.")
    if weights is None:
        return (default,) * count
    if isinstance(weights, int | float):
        return (float(weights),) * count
    if len(weights) != count:
        raise UserError(f"{count} models but {len(weights)} weights: give one weight a model.")
    return tuple(float(weight) for weight in weights)


def _share(name: str, value: float, low_open: bool = True) -> float:
    if not (0 < value <= 1 if low_open else 0 <= value <= 1):
        raise UserError(f"{name} must be {'above 0 and' if low_open else 'between 0 and 1,'} at most 1, not {value}.")
    return float(value)


def _one_of(name: str, value: Any, options: Sequence[str]) -> Any:
    if value not in options:
        raise UserError(f"{name} '{value}' is unknown.{did_you_mean(str(value), options)}")
    return value


def linear(count: int, weights: Weights, normalize: bool = True) -> Combination:
    """Weights that sum to one, unless told otherwise."""
    given = _weights(count, weights)
    total = sum(given)
    if normalize and total == 0:
        raise UserError("the weights sum to 0, so they can't be normalised; use normalize=false or task_arithmetic.")
    return Combination(tuple(weight / total for weight in given) if normalize else given)


def wise_ft(alpha: float) -> Combination:
    """Inputs: base, tuned."""
    return Combination((1.0 - alpha, float(alpha)))


def task_arithmetic(count: int, weights: Weights) -> Combination:
    """Inputs: base, tuned…; θ₀ + Σ w(θ-θ₀) written as (1-Σw)θ₀ + Σ wθ, which loses nothing when Σw = 1."""
    given = _weights(count, weights)
    return Combination((1.0 - sum(given), *given))


def ties(count: int, weights: Weights, density: float, scope: str, scale: float) -> Deltas:
    """Inputs: base, tuned…"""
    _one_of("scope", scope, ("tensor", "model"))
    given = _weights(count, weights)
    return Deltas(given, _share("density", density), "magnitude", "elect", scope=scope, scale=float(scale))  # type: ignore[arg-type]


def dare(count: int, weights: Weights, density: float, seed: int, consensus: str, scale: float) -> Deltas:
    """Inputs: base, tuned…"""
    _one_of("consensus", consensus, ("linear", "ties"))
    how = "elect" if consensus == "ties" else "sum"
    given = _weights(count, weights)
    return Deltas(given, _share("density", density), "random", how, rescale=True, scale=float(scale), seed=int(seed))  # type: ignore[arg-type]


def magnitude_prune(count: int, weights: Weights, density: float, scope: str) -> Deltas:
    """Inputs: base, tuned…"""
    _one_of("scope", scope, ("tensor", "model"))
    return Deltas(_weights(count, weights), _share("density", density), "magnitude", "sum", scope=scope)  # type: ignore[arg-type]


def slerp(t: float) -> Slerp:
    """Inputs: a, b."""
    return Slerp(_share("t", t, low_open=False))


def fisher(count: int, weights: Weights, normalize: bool = False) -> FisherMean:
    """Inputs: models…, fishers…"""
    given = _weights(count, weights)
    if any(weight < 0 for weight in given) or sum(given) == 0:
        raise UserError(f"Fisher weights must not be negative nor all 0, got {list(given)}.")
    return FisherMean(given, normalize)


@dataclass(frozen=True)
class Family:
    """One row of the table: a name, its formula in words, its settings with defaults, and how to build it."""

    formula: str
    build: Callable[[int, Weights, Mapping[str, Any]], Formula]
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: bool = True  # is the base an input of the formula?
    models: tuple[int, int] = (1, 1000)  # fewest, most
    weighted: bool = True


METHODS: dict[str, Family] = {
    "linear": Family(
        "Σ wᵢθᵢ / Σ wᵢ", lambda n, w, s: linear(n, w, s["normalize"]), {"normalize": True}, base=False
    ),
    "wise_ft": Family(
        "(1-α)θ₀ + αθ", lambda n, w, s: wise_ft(s["alpha"]), {"alpha": 0.5}, models=(1, 1), weighted=False
    ),
    "slerp": Family(
        "sin((1-t)Ω)/sin Ω·θ₁ + sin(tΩ)/sin Ω·θ₂", lambda n, w, s: slerp(s["t"]), {"t": 0.5},
        base=False, models=(2, 2), weighted=False,
    ),
    "task_arithmetic": Family("θ₀ + Σ wᵢ(θᵢ-θ₀)", lambda n, w, s: task_arithmetic(n, w)),
    "negation": Family(
        "θ₀ - Σ wᵢ(θᵢ-θ₀)", lambda n, w, s: task_arithmetic(n, [-one for one in _weights(n, w)])
    ),
    "ties": Family(
        "θ₀ + scale·disjoint mean(elect sign(wᵢ·trim(θᵢ-θ₀)))",
        lambda n, w, s: ties(n, w, s["density"], s["scope"], s["scale"]),
        {"density": TIES_DENSITY, "scope": "tensor", "scale": 1.0},
    ),
    "dare": Family(
        "θ₀ + scale·consensus(wᵢ·mᵢ⊙(θᵢ-θ₀)/density)",
        lambda n, w, s: dare(n, w, s["density"], s["seed"], s["consensus"], s["scale"]),
        {"density": DARE_DENSITY, "seed": 0, "consensus": "linear", "scale": 1.0},
    ),
    "magnitude_prune": Family(
        "θ₀ + Σ wᵢ·trim(θᵢ-θ₀)", lambda n, w, s: magnitude_prune(n, w, s["density"], s["scope"]),
        {"density": PRUNE_DENSITY, "scope": "tensor"},
    ),
    "fisher": Family(
        "Σ wᵢFᵢθᵢ / Σ wᵢFᵢ", lambda n, w, s: fisher(n, w, s["normalize"]),
        {"fisher": (), "normalize": False}, base=False,
    ),
}  # fmt: skip


ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dare_linear": ("dare", {"consensus": "linear"}),
    "dare_ties": ("dare", {"consensus": "ties"}),
    "wiseft": ("wise_ft", {}),
    "sfa": ("wise_ft", {}),
}


def resolve(method: str, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Canonical name (``-`` and ``_`` are the same) and all settings; unknown ones raise ``UserError``."""
    name = method.lower().replace("-", "_")
    name, extra = ALIASES.get(name, (name, {}))
    if name not in METHODS:
        raise UserError(f"there is no merge method '{method}'.{did_you_mean(name, [*METHODS, *ALIASES])}")
    given = {key: value for key, value in {**extra, **settings}.items() if value is not None}
    if name == "wise_ft" and "beta" in given:  # the SFA paper's weight of the old model
        given["alpha"] = 1 - _number("beta", given.pop("beta"))
    known = METHODS[name].settings
    for key, value in given.items():
        if key not in known:
            raise UserError(f"method '{name}' has no setting '{key}'.{did_you_mean(key, known)}")
        if isinstance(known[key], float):
            given[key] = float(_number(key, value))
        elif type(known[key]) is int:
            given[key] = int(_number(key, value))
        elif isinstance(known[key], bool) and not isinstance(value, bool):
            raise UserError(f"{key} must be true or false, not {value!r}.")
    return name, {**known, **given}


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{key} must be a number, not {value!r}.")
    return value
