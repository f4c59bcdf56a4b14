"""The gate: error rates by simulation, what it says about small panels, and its reports."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from holdfast.errors import UserError
from holdfast.evaluate.gate import POOLED, compare, simulate
from holdfast.evaluate.gate_report import headline, junit, markdown

SIZES = [100, 200, 300, 500, 817, 1172, 1838, 2376]


def table(scores: dict[str, np.ndarray], metric: str = "acc") -> pd.DataFrame:
    parts = [
        pd.DataFrame(
            {"task": task, "item": [str(k) for k in range(len(s))], "metric": metric, "score": s, "weight": 1.0}
        )
        for task, s in scores.items()
    ]
    return pd.concat(parts, ignore_index=True)


def pair(n: int, lost: int, won: int = 0) -> tuple[np.ndarray, np.ndarray]:
    before = np.zeros(n)
    before[: n // 2] = 1.0
    after = before.copy()
    after[:lost] = 0.0
    after[n - won :] = 1.0
    return before, after


@pytest.mark.parametrize("budget", [0.0, 1.0])
@pytest.mark.parametrize("discordance", [0.02, 0.05, 0.1])
def test_family_wise_false_alarms(budget: float, discordance: float) -> None:
    rate = simulate(SIZES, [0.0] * 8, discordance, max_drop=budget, runs=4000)
    assert rate <= 0.05


def test_power_grows_with_the_drop_and_the_panel() -> None:
    assert simulate([1000], [0.03], 0.05, max_drop=1.0, runs=1000) > 0.85
    assert simulate([250], [0.03], 0.05, max_drop=1.0, runs=1000) < 0.6
    assert simulate([1000], [0.05], 0.1, max_drop=1.0, runs=1000) > 0.97


def test_simulated_rule_is_the_gates_rule() -> None:
    generator = np.random.default_rng(0)
    for seed in range(12):
        before = generator.integers(0, 2, 400).astype(float)
        after = before.copy()
        flipped = generator.random(400) < 0.06
        after[flipped] = np.where(generator.random(flipped.sum()) < 0.9, 0.0, 1.0)
        report = compare(table({"t": before}), table({"t": after}), 1.0)
        lost, won = int((before > after).sum()), int((before < after).sum())
        from holdfast.evaluate.gate import _beyond

        rule = _beyond(np.array([lost]), np.array([won]), np.array([400.0]), 0.01, 0.05)
        assert report.failed == bool(rule[0]), seed


def test_planted_drop_fails_and_no_change_passes() -> None:
    before, after = pair(1000, 30)
    report = compare(table({"t": before}), table({"t": after}))
    assert report.failed
    assert report.rows[0].drop == pytest.approx(3.0)
    assert report.rows[0].low > 1.0
    assert not compare(table({"t": before}), table({"t": before})).failed


def test_a_drop_spread_over_tasks_is_seen_in_the_pooled_items() -> None:
    pairs = {f"t{k}": pair(125, 4, 0) for k in range(8)}
    report = compare(table({k: v[0] for k, v in pairs.items()}), table({k: v[1] for k, v in pairs.items()}))
    assert [row.name for row in report.rows if row.verdict == "fail"] == [POOLED]


def test_small_panels_say_so() -> None:
    before, after = pair(60, 1)
    report = compare(table({"t": before}), table({"t": after}))
    assert not report.failed
    assert report.unclear
    assert "too few for a budget" in markdown(report)
    assert "too small" in headline(report)
    assert report.rows[0].needed > 60


def test_perplexity_is_gated_only_on_request() -> None:
    nats = np.random.default_rng(0).uniform(50, 90, 40)
    before, after = table({"p": nats}, "perplexity"), table({"p": nats + 0.2}, "perplexity")
    assert compare(before, after).rows[0].verdict == "shown"
    assert compare(before, after, max_perplexity_rise=5.0).failed
    assert not compare(before, after, max_perplexity_rise=30.0).failed
    assert compare(before, after).rows[0].drop == pytest.approx(100 * np.expm1(0.2))


def test_errors_are_left_out_and_counted() -> None:
    before, after = pair(100, 0)
    after[3] = np.nan
    report = compare(table({"t": before}), table({"t": after}))
    assert report.skipped == 1
    assert report.rows[0].n == 99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.iloc[1:], "one side only"),
        (lambda t: t.assign(task="other"), "one side only"),
        (lambda t: t.drop(columns="score"), "no column 'score'"),
        (lambda t: pd.concat([t, t]), "more than once"),
        (lambda t: t.assign(score=np.nan), "no item"),
    ],
)
def test_what_can_not_be_paired_is_a_user_error(change: object, message: str) -> None:
    before = table({"t": pair(20, 0)[0]})
    with pytest.raises(UserError, match=message):
        compare(before, change(before))  # type: ignore[operator]


def test_reports() -> None:
    pairs = {"good": pair(400, 1, 1), "bad": pair(400, 40)}
    report = compare(table({k: v[0] for k, v in pairs.items()}), table({k: v[1] for k, v in pairs.items()}))
    text = markdown(report, "a", "b")
    assert "| bad (acc) | 400 | 50.00 | 40.00 | +10.00 |" in text
    suite = ElementTree.fromstring(junit(report).split("\n", 1)[1])
    assert suite.get("tests") == "3"
    failures = [case.get("name") for case in suite if case.find("failure") is not None]
    assert failures == [POOLED, "bad"]
    assert suite.get("failures") == "2"
