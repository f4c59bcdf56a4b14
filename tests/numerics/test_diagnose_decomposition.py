"""The decomposition against brute force, closed forms and simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from holdfast.diagnose import decompose, decompose_benchmarks
from holdfast.diagnose.bootstrap import _sign_p, contrasts
from holdfast.errors import UserError


def flip(scores: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(len(scores)) < share, 1 - scores, scores)


def resampled(probability: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (rng.random(len(probability)) < probability).astype(float)


def test_values_are_differences_of_means_and_add_up():
    rng = np.random.default_rng(0)
    base, tuned, restored, control = (rng.random(300) for _ in range(4))
    found = decompose(base, tuned, restored, control)
    assert found.drop.value == pytest.approx(base.mean() - tuned.mean(), abs=1e-12)
    assert found.pattern_shift.value == pytest.approx(restored.mean() - tuned.mean(), abs=1e-12)
    assert found.knowledge_loss.value == pytest.approx(base.mean() - restored.mean(), abs=1e-12)
    assert found.drop.value == pytest.approx(found.pattern_shift.value + found.knowledge_loss.value, abs=1e-12)
    assert found.control is not None and found.excess is not None
    assert found.control.value == pytest.approx(base.mean() - control.mean(), abs=1e-12)
    assert found.excess.value == pytest.approx(control.mean() - restored.mean(), abs=1e-12)


@pytest.mark.parametrize("binary", [True, False])
def test_interval_is_the_paired_bootstrap_of_a_plain_loop(binary):
    rng = np.random.default_rng(1)
    base = (rng.random(400) < 0.8).astype(float) if binary else rng.random(400)
    tuned = flip(base, 0.2, rng) if binary else base - rng.exponential(0.1, 400)
    found = decompose(base, tuned, base, resamples=10_000)
    means = []
    for _ in range(4000):
        picked = rng.integers(400, size=400)
        means.append((base[picked] - tuned[picked]).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.drop.low == pytest.approx(low, abs=0.004)
    assert found.drop.high == pytest.approx(high, abs=0.004)


def test_items_are_paired():
    """Shuffling the tuned model's items keeps the means but loses the pairing, and the interval widens."""
    rng = np.random.default_rng(2)
    base = (rng.random(1000) < 0.5).astype(float)
    tuned = flip(base, 0.05, rng)
    paired = decompose(base, tuned, base).drop
    unpaired = decompose(base, rng.permutation(tuned), base).drop
    assert unpaired.high - unpaired.low > 2 * (paired.high - paired.low)


@pytest.mark.parametrize(
    ("tuned_loss", "restored_loss", "verdict"), [(0.0, 0.0, "none"), (0.3, 0.01, "pseudo"), (0.3, 0.25, "actual")]
)
def test_clear_cases(tuned_loss, restored_loss, verdict):
    rng = np.random.default_rng(3)
    base = (rng.random(500) < 0.9).astype(float)
    drop = [np.where(rng.random(500) < loss, 0.0, base) for loss in (tuned_loss, restored_loss)]
    found = decompose(base, *drop, base)
    assert found.verdict == verdict, str(found)
    assert found.items_needed is None


def test_identical_models_are_none_on_any_number_of_items():
    for items in (1, 7, 5000):
        scores = np.arange(items) % 2
        found = decompose(scores, scores, scores, scores)
        assert found.verdict == "none"
        assert (found.drop.value, found.drop.low, found.drop.high) == (0.0, 0.0, 0.0)


def test_a_loss_that_the_control_shares_is_not_blamed_on_tuning():
    rng = np.random.default_rng(4)
    base = np.ones(400)
    tuned = (rng.random(400) > 0.4).astype(float)
    restored, control = ((rng.random(400) > 0.2).astype(float) for _ in range(2))
    assert decompose(base, tuned, restored).verdict == "actual"
    found = decompose(base, tuned, restored, control)
    assert found.verdict == "undecided"
    assert "control" in found.reason


def test_restoring_as_far_as_it_leaves_the_base_is_pseudo_only_beside_a_control():
    rng = np.random.default_rng(6)
    base = np.ones(600)
    tuned = (rng.random(600) > 0.5).astype(float)
    restored, control = ((rng.random(600) > 0.04).astype(float) for _ in range(2))  # restoring costs 4 points of 50
    assert decompose(base, tuned, restored).verdict == "actual"
    found = decompose(base, tuned, restored, control)
    assert found.knowledge_loss.low > 0
    assert (found.verdict, found.reason) == ("pseudo", "restoring brings the score as far as it leaves the base itself")


@pytest.mark.parametrize(
    ("items", "fallen", "lost", "verdict"),
    [
        (4000, 2000, 40, "pseudo"),  # 1 of 50 points: below the margin of 2 and far below half of the drop
        (4000, 2000, 100, "actual"),  # 2.5 of 50 points: as much as matters
        (4000, 40, 40, "actual"),  # 1 of 1 point: little, but all of the drop
        (400, 20, 6, "undecided"),  # 1.5 of 5 points, and 3 are not ruled out
    ],
)
def test_a_loss_that_is_shown_must_also_matter(items, fallen, lost, verdict):
    base, tuned, restored = (np.ones(items) for _ in range(3))
    tuned[:fallen], restored[:lost] = 0, 0
    for control in (None, base):
        found = decompose(base, tuned, restored, control)
        assert found.knowledge_loss.low > 0
        assert found.verdict == verdict, str(found)
        assert (found.items_needed or 0) > items or verdict != "undecided"
        assert verdict == "actual" or "a loss below 2.0 points" in found.reason
        assert ("beyond the control's" in found.reason) == (verdict != "actual" and control is not None)


def test_a_loss_hidden_by_better_format_is_actual_only_with_a_control():
    rng = np.random.default_rng(5)
    base = (rng.random(800) < 0.7).astype(float)
    lost = rng.random(800) < 0.15
    restored = np.where(lost, 0.0, base)
    tuned = np.where(rng.random(800) < 0.4, 1.0, restored)  # better format more than makes up for it
    assert decompose(base, tuned, restored).verdict == "none"
    assert decompose(base, tuned, restored, base).verdict == "actual"


def test_few_changed_items_show_nothing():
    """Four losses among 500 items exclude zero by bootstrap (e^-4 < 2.5 %) but not by the sign test (1/16)."""
    base = np.ones(500)
    four, six = base.copy(), base.copy()
    four[:4], six[:6] = 0, 0
    assert decompose(base, four, base).drop.low <= 0
    assert decompose(base, six, base).drop.low > 0
    assert decompose(np.ones(3), np.zeros(3), np.zeros(3)).verdict == "undecided"


def test_one_gain_among_fifty_items_rules_out_no_drop():
    base = np.ones(50)
    base[0] = 0
    assert decompose(base, np.ones(50), np.ones(50)).verdict == "undecided"


def test_items_needed_decides():
    """Ten times the same items, if at least that many are asked for, give a verdict; fewer than asked do not."""
    rng = np.random.default_rng(6)
    base = (rng.random(60) < 0.8).astype(float)
    tuned = base.copy()
    tuned[np.flatnonzero(base)[:5]] = 0
    tuned[np.flatnonzero(base == 0)[:1]] = 1
    found = decompose(base, tuned, tuned)
    assert found.verdict == "undecided" and found.items_needed is not None
    assert 60 < found.items_needed < 600
    enough = math.ceil(found.items_needed * 1.2 / 60)
    few = max(1, math.floor(found.items_needed * 0.6 / 60))
    assert decompose(np.tile(base, enough), np.tile(tuned, enough), np.tile(tuned, enough)).verdict == "actual"
    assert decompose(np.tile(base, few), np.tile(tuned, few), np.tile(tuned, few)).verdict == "undecided"


def test_sign_test_closed_form_and_its_approximation():
    assert _sign_p(5, 0, True) == pytest.approx(1 / 32)
    assert _sign_p(3, 1, True) == pytest.approx(5 / 16)
    assert _sign_p(0, 0, True) == 1.0
    exact = _sign_p(1990, 1900, True)
    approximate = 0.5 * math.erfc((1990 - 0.5 - 1945) / math.sqrt(1945))
    assert exact == pytest.approx(approximate, rel=1e-3)


def test_many_distinct_rows_and_few_agree():
    """The multinomial draw over patterns and the draw of indices are the same bootstrap."""
    rng = np.random.default_rng(7)
    table = (rng.random((300, 3)) < 0.6).astype(float)
    noisy = table + rng.normal(0, 1e-9, table.shape)
    signs = {"d": (1, -1, 0, 0)}
    few, many = (contrasts([t], signs, confidence=0.95, resamples=20_000, seed=0)["d"].interval for t in (table, noisy))
    assert few.low == pytest.approx(many.low, abs=3e-3)
    assert few.high == pytest.approx(many.high, abs=3e-3)


def test_pooled_weighs_benchmarks_equally():
    small = {"base": np.ones(50), "tuned": np.zeros(50), "restored": np.ones(50)}
    large = {"base": np.ones(5000), "tuned": np.ones(5000), "restored": np.ones(5000)}
    found = decompose_benchmarks({"small": small, "large": large})
    assert found["small"].verdict == "pseudo" and found["large"].verdict == "none"
    assert found["pooled"].drop.value == pytest.approx(0.5)
    assert found["pooled"].items == 5050


def test_seeded():
    rng = np.random.default_rng(8)
    arrays = [(rng.random(200) < 0.5).astype(float) for _ in range(4)]
    assert decompose(*arrays) == decompose(*arrays)
    assert decompose(*arrays, seed=1) != decompose(*arrays)


@pytest.mark.parametrize("items", [100, 1000])
def test_under_the_null_a_verdict_of_forgetting_is_rare(items):
    """Base, tuned, restored and control all drawn from the same item probabilities: none or undecided in >= 95 %."""
    rng = np.random.default_rng(9)
    verdicts = []
    for simulation in range(200):
        probability = rng.beta(2, 1, size=items)
        models = [resampled(probability, rng) for _ in range(4)]
        verdicts.append(decompose(*models, resamples=2000, seed=simulation).verdict)
    assert sum(verdict in ("none", "undecided") for verdict in verdicts) >= 190


def test_intervals_cover():
    """95 % intervals hold the true drop in 95 % of 1,000 draws of items, up to simulation error."""
    rng = np.random.default_rng(10)
    covered = 0
    for simulation in range(1000):
        base = (rng.random(300) < 0.8).astype(float)
        tuned = np.where(rng.random(300) < 0.15, 0.0, base)
        drop = decompose(base, tuned, base, resamples=1000, seed=simulation).drop
        covered += drop.low <= 0.12 <= drop.high
    assert 930 <= covered <= 970


def test_bad_arrays_are_clear_errors():
    with pytest.raises(UserError, match="same items"):
        decompose([1, 0], [1], [1, 0])
    with pytest.raises(UserError, match="no items"):
        decompose([], [], [])
    with pytest.raises(UserError, match="not finite"):
        decompose([1, float("nan")], [1, 0], [1, 0])
    with pytest.raises(UserError, match="for all or for none"):
        one = {"base": [1], "tuned": [1], "restored": [1]}
        decompose_benchmarks({"a": one, "b": one | {"control": [1]}})
    with pytest.raises(UserError, match="restored"):
        decompose_benchmarks({"a": {"base": [1], "tuned": [1]}})
