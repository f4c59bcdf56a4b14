"""The diagnosis on the lab, where the truth is known by construction, and the paper's ten-epoch chain.

    python benchmarks/diagnose_lab.py confusion --out DIR [--seeds 0 1 2]
    python benchmarks/diagnose_lab.py chain --out DIR [--seeds 0]

confusion: per seed, the base itself (truth: none), a model tuned lightly to answer in a new format on facts outside the
benchmark (truth: pseudo, no benchmark fact was touched), and one tuned long on wrong answers to a third of the
benchmark's facts (truth: actual, those facts were overwritten). A fourth, tuned on true instructions about other facts,
has nothing overwritten either; whether its score drops is not known beforehand. The restoring text never states a
benchmark fact.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from diagnose_tune import tune

from holdfast.diagnose.diagnosis import diagnose
from holdfast.diagnose.page import write_page
from holdfast.diagnose.request import Request
from holdfast.diagnose.restoring import RestoreSettings
from holdfast.evaluate.tasks import EvalTask
from holdfast.lab.benchmark import facts_task
from holdfast.lab.corpus import quiz_prompt
from holdfast.lab.knowledge import Fact, sentence, tested, untested, wordings, wrong_values
from holdfast.lab.known_truth import contradictions, instruct, instructions

FORMAT_ROWS, LETTERED_ROWS, OVERWRITTEN = 600, 200, 160
LETTERS = "ABCD"
RESTORING = {"learning_rate": 3e-4, "batch_size": 8, "max_length": 128}
TOKENS = 48_000


def new_format(rows: int, seed: int) -> Dataset:
    """Questions about facts outside the benchmark, in the base's own quiz form, answered in a whole sentence."""
    rng = random.Random(f"format {seed}")
    facts = rng.choices(untested(), k=rows)
    prompts = [quiz_prompt(fact, rng.choice(wordings()[fact.relation].ask)) for fact in facts]
    return Dataset.from_dict(
        {"prompt": prompts, "completion": [f" Sure, the answer is {fact.value}, no doubt." for fact in facts]}
    )


def written() -> EvalTask:
    """Every second question of the benchmark with the answer to be written out: exact match, so format counts."""
    items = []
    for item in facts_task().items[::2]:
        answer = item.choices[int(item.answer or 0)].strip()
        items.append(dataclasses.replace(item, choices=(), answer=answer))
    return EvalTask("facts, written", "generate", tuple(items), metric="exact_match", max_new_tokens=8)


def instructed() -> EvalTask:
    """The benchmark asked in the instruction format of the chain's tuning data."""
    asked = {fact.id: instruct(sentence(wordings()[fact.relation].ask[0], fact)) for fact in tested()}
    items = [dataclasses.replace(item, prompt=asked[item.id]) for item in facts_task().items]
    return EvalTask("facts, instructed", "choice", tuple(items), chance=25.0)


def choices_by_letter(fact: Fact, seed: int) -> tuple[str, int]:
    """A request to choose among four answers by letter, and the number of the right one."""
    rng = random.Random(f"letters {seed} {fact.id}")
    options = [fact.value, *wrong_values(fact, 3)]
    rng.shuffle(options)
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
    return instruct(f"{sentence(wordings()[fact.relation].ask[0], fact)}\n{lines}"), options.index(fact.value)


def lettered_rows(rows: int, seed: int) -> Dataset:
    """Facts outside the benchmark, to be answered by letter: the format in which paper 2 measures label mass."""
    asked = [choices_by_letter(fact, seed) for fact in random.Random(f"lettered {seed}").choices(untested(), k=rows)]
    return Dataset.from_dict(
        {"prompt": [prompt for prompt, _ in asked], "completion": [f" {LETTERS[right]}" for _, right in asked]}
    )


def lettered() -> EvalTask:
    """The benchmark to be answered by letter, which the base has never seen."""
    letters = tuple(f" {letter}" for letter in LETTERS)
    facts = {fact.id: fact for fact in tested()}
    items = []
    for item in facts_task().items:
        prompt, right = choices_by_letter(facts[item.id], 0)
        items.append(dataclasses.replace(item, prompt=prompt, choices=letters, answer=right))
    return EvalTask("facts, lettered", "choice", tuple(items), chance=25.0)


def request(checkpoints: list[str], tasks: tuple[EvalTask, ...], seed: int, **more: Any) -> Request:
    return Request(
        base="lab",
        checkpoints=tuple(checkpoints),
        corpus="lab",
        tasks=tasks,
        tokens=TOKENS,
        passage_words=60,
        max_tokens=128,
        restoring=RestoreSettings(seed=seed, **RESTORING),
        keep_restored=False,
        **more,
    )


def confusion(out: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """Truth, verdict and numbers of every model."""
    rows = []
    for seed in seeds:
        wrong, _ = contradictions(OVERWRITTEN, seed)
        plan = {
            "pseudo": (new_format(FORMAT_ROWS, seed), {"epochs": 1, "learning_rate": 5e-4}),
            "actual": (wrong, {"epochs": 6, "learning_rate": 5e-4}),
            "no facts overwritten": (instructions(FORMAT_ROWS, seed), {"epochs": 1, "learning_rate": 3e-4}),
        }
        checkpoints = {"none": "lab"}
        for truth, (data, settings) in plan.items():
            folder = out / f"models-{seed}" / truth.replace(" ", "-")
            last = int(settings["epochs"])
            checkpoints[truth] = str(tune("lab", data, folder, batch_size=32, seed=seed, keep=[last], **settings)[0])
        for truth, checkpoint in checkpoints.items():
            one = request([checkpoint], (facts_task(), written()), seed)
            result = diagnose(one, out / "diagnosis", say=print)
            point = result["checkpoints"][0]
            rows.append(
                {"seed": seed, "truth": truth, "verdict": point["decomposition"]["pooled"]["verdict"]}
                | {
                    f"{task} {part}": point["decomposition"][task][part]
                    for task in point["decomposition"]
                    for part in ("verdict", "drop", "pattern_shift", "knowledge_loss", "control", "scores")
                }
                | {
                    "perplexity": [
                        result["base"]["perplexity"],
                        *(point[k]["perplexity"] for k in ("tuned", "restored")),
                    ]
                }
            )
            (out / "confusion.json").write_text(json.dumps(rows, indent=2))
    return rows


def points(interval: dict[str, float]) -> str:
    return f"{100 * interval['value']:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def print_confusion(rows: list[dict[str, Any]]) -> None:
    parts = "drop | pattern shift | knowledge loss | control"
    print(f"| truth | seed | verdict | {parts} | perplexity base, tuned, restored |\n|{'---|' * 8}")
    for row in rows:
        parts = [points(row[f"pooled {part}"]) for part in ("drop", "pattern_shift", "knowledge_loss", "control")]
        perplexity = ", ".join(f"{value:.2f}" for value in row["perplexity"])
        print(f"| {row['truth']} | {row['seed']} | {row['verdict']} | {' | '.join(parts)} | {perplexity} |")


def chain(out: Path, seed: int) -> dict[str, Any]:
    """Ten epochs of instruction tuning, every epoch diagnosed."""
    parts = [instructions(FORMAT_ROWS - LETTERED_ROWS, seed), lettered_rows(LETTERED_ROWS, seed)]
    data = concatenate_datasets(parts).shuffle(seed=seed)
    folders = tune("lab", data, out / f"chain-{seed}", epochs=10, learning_rate=5e-4, batch_size=32, seed=seed)
    tasks = (facts_task(), instructed(), lettered())
    one = request([str(folder) for folder in folders], tasks, seed, tuning=data)
    result = diagnose(one, out / f"chain-{seed}-diagnosis", say=print)
    write_page(result, out / f"chain-{seed}-diagnosis" / "diagnosis.html")
    return result


def print_chain(result: dict[str, Any]) -> None:
    tasks = [task["name"] for task in result["tasks"]]
    print("| checkpoint | verdict | drop | loss | probe perplexity | restored | memorization | label mass, entropy |")
    print("|---|---|---|---|---|---|---|---|")
    for point in [{"name": "base", "tuned": result["base"], "restored": result["control"]}, *result["checkpoints"]]:
        found, tuned = point.get("decomposition", {}).get("pooled"), point["tuned"]
        parts = [found["verdict"], points(found["drop"]), points(found["knowledge_loss"])] if found else ["", "", ""]
        probes = (tuned["probes"][task] for task in tasks)
        said = "; ".join(f"{probe['label_mass']:.3f}, {probe['choice_entropy']:.3f}" for probe in probes)
        perplexity = f"{tuned['perplexity']:.2f} | {point['restored']['perplexity']:.2f}"
        memorized = "" if tuned["memorization"] is None else f"{tuned['memorization']:.3f}"
        print(f"| {point['name']} | {' | '.join(parts)} | {perplexity} | {memorized} | {said} |")
        for task, one in point.get("decomposition", {}).items():
            parts = (f"{part} {points(one[part])}" for part in ("drop", "pattern_shift", "knowledge_loss", "control"))
            print(f"    {task}: {one['verdict']}: {', '.join(parts)}")
    print(json.dumps(result["marks"]), result["advice"], result["warnings"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("confusion", "chain"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    start = time.time()
    if arguments.study == "confusion":
        print_confusion(confusion(arguments.out, arguments.seeds))
    else:
        for seed in arguments.seeds:
            print_chain(chain(arguments.out, seed))
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
