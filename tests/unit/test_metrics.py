"""Forgetting metrics against hand-computed matrices, and paper 1's Table 5 against its Table 2."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.errors import UserError
from holdfast.metrics import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forgetting_per_task,
    forward_transfer,
    group_table,
    learning_accuracy,
    relative_drop,
)

R = [[80.0, 10.0, 20.0], [85.0, 70.0, 30.0], [60.0, 50.0, 90.0]]
INITIAL = [40.0, 5.0, 15.0]


def test_averages() -> None:
    assert average_accuracy(R) == pytest.approx(200 / 3)
    assert learning_accuracy(R) == pytest.approx(80.0)
    assert average_incremental_accuracy(R) == pytest.approx((80 + (85 + 70) / 2 + 200 / 3) / 3)


def test_each_forgetting_convention_by_hand() -> None:
    assert forgetting(R, "last") == pytest.approx(((80 - 60) + (70 - 50)) / 2)
    assert forgetting(R, "chaudhry") == pytest.approx(((85 - 60) + (70 - 50)) / 2)
    assert forgetting(R, "drop") == pytest.approx(20.0)
    assert forgetting(R, "drop", initial=INITIAL) == pytest.approx(((40 - 60) + (5 - 50)) / 2)
    assert forgetting_per_task(R, "chaudhry").tolist() == [25.0, 20.0]
    assert forgetting(R, "chaudhry", initial=[95.0, 5.0, 15.0]) == pytest.approx(((95 - 60) + (70 - 50)) / 2)


def test_transfer_by_hand() -> None:
    assert backward_transfer(R) == pytest.approx(-20.0)
    assert forward_transfer(R, INITIAL) == pytest.approx(((10 - 5) + (30 - 15)) / 2)
    assert backward_transfer(R) == -forgetting(R, "last")


def test_untrained_benchmarks_all_count() -> None:
    before, after = [50.0, 60.0, 70.0], [[40.0, 60.0, 50.0]]
    assert forgetting(after, "drop", initial=before) == pytest.approx(10.0)


def test_one_task_can_not_be_forgotten_yet() -> None:
    assert np.isnan(forgetting([[50.0]]))
    assert np.isnan(forward_transfer([[50.0]], [1.0]))


def test_unmeasured_scores_may_be_nan() -> None:
    nan = float("nan")
    assert forgetting([[80.0, nan], [60.0, 70.0]], "chaudhry") == pytest.approx(20.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: forgetting(R, "chaudry"),  # type: ignore[arg-type]
        lambda: forgetting([[1.0, 2.0]]),
        lambda: forgetting(R, initial=[1.0]),
        lambda: average_accuracy([1.0, 2.0]),
        lambda: group_table({"a": {"mmlu": 1.0}}),
    ],
)
def test_wrong_input_is_a_user_error(call: object) -> None:
    with pytest.raises(UserError):
        call()  # type: ignore[operator]


def test_relative_drop() -> None:
    assert relative_drop(51.92, 45.84) == pytest.approx(11.71, abs=0.005)
    assert np.isnan(relative_drop(0.0, 1.0))


COLUMNS = [
    *("mmlu_stem", "mmlu_humanities", "mmlu_social_sciences", "mmlu_other"),
    *("race_middle", "race_high", "openbookqa_fact", "csl_dev", "arc_challenge"),
    *("boolq", "ax_b", "ax_g", "rte", "copa", "hellaswag", "siqa"),
]
# arXiv 2406.04836, Table 5 (Llama2-7b) as printed
TABLE_5 = {
    "Alpaca": "31.60 43.03 47.23 43.94 55.22 55.22 66.4 58.13 45.08 78.29 59.42 60.67 61.37 65.00 65.00 53.53",
    "ShareGPT": "22.69 29.72 23.57 29.20 50.7 47.4 57 56.25 45.76 75.20 57.70 50.00 47.65 60.00 73.81 46.42",
    "ShareGPT+SAM": "31.08 42.82 47.24 42.96 55.43 51.49 66.6 58.13 44.41 77.92 59.33 56.46 61.37 65.00 73.18 53.22",
    "Platypus": "25.44 34.70 34.20 32.50 46.31 44.54 53.8 58.13 37.97 78.20 59.24 50.00 50.18 69.00 73.16 47.85",
    "Platypus+SAM": "32.18 43.56 48.11 44.15 56.34 51.69 67.6 57.5 45.08 79.11 59.06 63.76 58.48 65.00 73.49 52.61",
    "MetaMath": "26.57 34.77 39.93 34.19 56.55 51.8 45.2 56.88 36.27 69.60 58.42 50.00 47.65 64.00 72.09 47.49",
    "MetaMath+SAM": "28.48 34.84 39.50 38.82 53.2 49.69 65.2 55 42.71 77.61 58.88 53.65 53.43 70.00 71.70 51.43",
}
# Table 2 (a): DK, Understanding, Reasoning, Exams, AVG, delta
TABLE_2 = {
    "Alpaca": (40.53, 58.74, 63.33, 45.08, 51.92, None),
    "ShareGPT": (26.08, 52.84, 58.68, 45.76, 45.84, -6.08),
    "ShareGPT+SAM": (40.08, 57.91, 63.78, 44.41, 51.55, 5.71),
    "Platypus": (31.13, 50.70, 61.09, 37.97, 45.22, -6.70),
    "Platypus+SAM": (41.07, 58.28, 64.50, 45.08, 52.23, 7.01),
    "MetaMath": (33.13, 52.61, 58.46, 36.27, 45.12, -6.80),
    "MetaMath+SAM": (34.79, 55.77, 62.38, 42.71, 48.91, 3.79),
}
BASELINE = {name: name.removesuffix("+SAM") if "+SAM" in name else "Alpaca" for name in TABLE_5 if name != "Alpaca"}


def test_group_table_gives_table_2_from_table_5() -> None:
    rows = {name: dict(zip(COLUMNS, map(float, line.split()))) for name, line in TABLE_5.items()}
    table = group_table(rows, "paper1", baseline=BASELINE)
    for name, printed in TABLE_2.items():
        for column, value in zip(("DK", "Understanding", "Reasoning", "Exams", "AVG", "delta"), printed):
            if value is None:
                assert np.isnan(table.loc[name, column])
                continue
            # Half a unit of the last printed digit, and as much again for the rounding of Table 5's own numbers.
            assert table.loc[name, column] == pytest.approx(value, abs=0.0101), (name, column)
    assert table.loc["ShareGPT", "relative_delta"] == pytest.approx(-11.71, abs=0.01)


def test_group_table_takes_mmlu_itself_and_one_baseline() -> None:
    benchmarks = dict.fromkeys(COLUMNS[4:], 50.0)
    table = group_table({"a": {"mmlu": 50.0, **benchmarks}, "b": {"mmlu": 40.0, **benchmarks}}, baseline="a")
    assert table.loc["b", "delta"] == pytest.approx(-2.5)
    assert np.isnan(table.loc["a", "delta"])
    assert list(table.columns) == ["DK", "Understanding", "Reasoning", "Exams", "AVG", "delta", "relative_delta"]
