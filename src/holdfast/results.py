"""The numbers of a study as data frames, from what its run directory holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from holdfast import metrics

LOWER_IS_BETTER = {"perplexity"}


@dataclass(frozen=True)
class Results:
    """A study's results, as ``study.json`` holds them.

    Scores are percents (accuracy, exact match) or perplexities. Forgetting is ``drop``: the score just after a task was
    taught minus the score at the end (the papers'), averaged over the tasks before the last.
    """

    data: dict[str, Any]

    @property
    def tasks(self) -> list[str]:
        return [task["name"] for task in self.data["tasks"]]

    @property
    def panel(self) -> list[str]:
        return [task["name"] for task in self.data["panel"]]

    @property
    def arms(self) -> list[str]:
        return list(self.data["arms"])

    @property
    def seeds(self) -> list[int]:
        return list(self.data["seeds"])

    @property
    def trainings(self) -> int:
        """How many trainings the whole study needs; arms that agree share theirs."""
        return sum(1 for step in self.data["steps"].values() if step["kind"] == "train")

    def metric(self, task: str) -> str:
        """The metric of a task of the stream or the panel."""
        return next(t["metric"] for t in (*self.data["tasks"], *self.data["panel"]) if t["name"] == task)

    def _scores(self, arm: str, seed: int) -> list[dict[str, Any]]:
        try:
            return self.data["arms"][arm][str(seed)]["checkpoints"]
        except KeyError:
            raise KeyError(f"no arm '{arm}' with seed {seed}; arms: {self.arms}, seeds: {self.seeds}") from None

    def base(self) -> pd.Series[float]:
        """The base model's score on every task and on the panel."""
        return pd.Series({task: entry["value"] for task, entry in self.data["base"].items()}, dtype=float)

    def matrix(self, arm: str, seed: int) -> pd.DataFrame:
        """R[i, j], the score on task j after task i: rows "after …", columns tasks.

        A joint arm has one row, its one checkpoint.
        """
        return self._frame(arm, seed, self.tasks)

    def abilities(self, arm: str, seed: int) -> pd.DataFrame:
        """The panel's scores after each task: rows "after …", columns the panel's tasks."""
        return self._frame(arm, seed, self.panel)

    def _frame(self, arm: str, seed: int, columns: list[str]) -> pd.DataFrame:
        rows = {
            checkpoint["after"]: [checkpoint["scores"][name]["value"] for name in columns]
            for checkpoint in self._scores(arm, seed)
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns, dtype=float)

    # ------------------------------------------------------------ one line per arm

    def runs(self) -> pd.DataFrame:
        """One row per arm and seed with the columns of ``table``."""
        rows = [self._run(arm, seed) for arm in self.arms for seed in self.seeds]
        return pd.DataFrame(rows).set_index(["arm", "seed"])

    def _run(self, arm: str, seed: int) -> dict[str, Any]:
        checkpoints = self._scores(arm, seed)
        last = checkpoints[-1]["scores"]
        joint = checkpoints[0]["after"] not in self.tasks
        row: dict[str, Any] = {"arm": arm, "seed": seed}
        for i, task in enumerate(self.tasks):
            row[f"{task} taught"] = math.nan if joint else checkpoints[i]["scores"][task]["value"]
            row[f"{task} end"] = last[task]["value"]
        for name in self.panel:
            row[f"{name} before"], row[f"{name} after"] = self.data["base"][name]["value"], last[name]["value"]
        row["average"] = sum(last[task]["value"] for task in self.tasks) / len(self.tasks)
        row["forgetting (drop)"] = math.nan if joint else metrics.forgetting(self.matrix(arm, seed), "drop")
        row["panel drop"] = self._panel_drop(last)
        row["seconds"] = self.data["arms"][arm][str(seed)]["seconds"]
        return row

    def _panel_drop(self, last: dict[str, Any]) -> float:
        """Mean drop over the panel's accuracies; perplexities have their own columns."""
        scored = [name for name in self.panel if self.metric(name) not in LOWER_IS_BETTER]
        drops = [self.data["base"][name]["value"] - last[name]["value"] for name in scored]
        return sum(drops) / len(drops) if drops else math.nan

    def table(self) -> pd.DataFrame:
        """One row per arm, mean over seeds; with several seeds also ``<column> min`` and ``<column> max``."""
        groups = self.runs().groupby(level="arm", sort=False)
        table = groups.mean()
        if len(self.seeds) > 1:
            low, high = groups.min().add_suffix(" min"), groups.max().add_suffix(" max")
            table = pd.concat([table, low, high], axis=1)
        return table

    # ------------------------------------------------------------ what the study can't tell

    def warnings(self) -> list[str]:
        """Why this study may be unable to tell methods apart; empty when nothing speaks against it."""
        found = [f"'{name}': {note}." for name, data in self.data["data"].items() for note in data["notes"]]
        for task in self.data["tasks"]:
            name, base = task["name"], self.data["base"][task["name"]]
            if task["metric"] in LOWER_IS_BETTER:
                continue
            if base["value"] >= 80:
                found.append(
                    f"The base model already scores {base['value']:.1f} % on '{name}': little is left to teach, so "
                    "arms can hardly differ there."
                )
        for arm in self.arms:
            about = self.data["arms"][arm]
            if about.get("train") == "sequential" and not about.get("methods") and not about.get("peft"):
                found += self._plain_arm_warnings(arm)
        return found

    def _plain_arm_warnings(self, arm: str) -> list[str]:
        """The arm without methods must learn and forget, or there is nothing to prevent."""
        found = []
        for seed in self.seeds:
            checkpoints = self._scores(arm, seed)
            for i, task in enumerate(self.data["tasks"]):
                name = task["name"]
                taught, base = checkpoints[i]["scores"][name], self.data["base"][name]
                if task["metric"] not in LOWER_IS_BETTER and taught["low"] <= base["value"]:
                    found.append(
                        f"'{arm}', seed {seed}: '{name}' was not measurably learned "
                        f"({base['value']:.1f} → {taught['value']:.1f} %)."
                    )
            drops = self.data["arms"][arm][str(seed)].get("drops", {})
            if drops and all(drop["low"] <= 0 for drop in drops.values()):
                found.append(
                    f"'{arm}', seed {seed}: no drop is measurable (every 95 % interval reaches 0), so the order of "
                    "the arms is noise. Train longer or at a higher learning rate, or measure more items."
                )
        return found
