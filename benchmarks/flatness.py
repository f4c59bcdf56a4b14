"""Does flatness before tuning predict forgetting after it (the claim of 2406.04836, section 2)?

    python benchmarks/flatness.py --model lab --first lab:math --second lab:law --seeds 0 1 2 --out flatness.jsonl
    python benchmarks/flatness.py --report flatness.jsonl

Every arm trains the first task in its own way (learning rate, batch size, SAM), over several seeds. Then the flatness
of that model is measured, and every model is tuned on the second task in one and the same plain way. Forgetting is
the drop of the first task's score, and of the packaged benchmark's, that this second tuning causes. One line of JSON
per model is written as soon as it is done; finished ones are not done again. The report gives Spearman's correlation of
each flatness measure with each forgetting measure, with a 95 % bootstrap interval that draws whole arms.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

# name: (settings of the first task's training, methods)
ARMS: dict[str, tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]] = {
    "plain": ({}, []),
    "low rate": ({"learning_rate": 0.4}, []),  # times the base rate
    "high rate": ({"learning_rate": 2.5}, []),
    "small batch": ({"per_device_train_batch_size": 0.25}, []),
    "SAM 0.05": ({}, [("sam", {"rho": 0.05})]),
    "SAM 0.2": ({}, [("sam", {"rho": 0.2})]),
}
FLATNESS = ("sc", "ag", "mag", "worst", "average", "gradient", "text worst", "text average")
FORGETTING = ("task drop", "task loss rise", "facts drop", "text loss rise")


def train(model: Any, tokenizer: Any, data: Any, seed: int, settings: dict[str, Any], methods: list[Any]) -> Any:
    """One task through TRL's trainer with holdfast's methods inside."""
    import torch
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from holdfast.trainer import with_methods

    cpu = not torch.accelerator.is_available()
    with tempfile.TemporaryDirectory() as work:
        arguments = SFTConfig(output_dir=work, seed=seed, data_seed=seed, bf16=False, report_to="none",
                              save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, logging_steps=1000,
                              use_cpu=cpu, dataloader_pin_memory=not cpu, **settings)  # fmt: skip
        trainer = with_methods(SFTTrainer)(
            model=model, args=arguments, train_dataset=data, processing_class=tokenizer, methods=methods
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


def flatness_of(model: Any, objective: Any, prefix: str, options: argparse.Namespace) -> dict[str, float]:
    from holdfast.landscape import sharpness, summarize, surfaces

    rise = sharpness(model, objective, rho=options.rho, directions=4)
    average = sharpness(model, objective, rho=options.average_rho, directions=8).average
    numbers = {"worst": rise.worst, "gradient": rise.gradient_norm, "average": average.mean, "loss": rise.centre}
    if not prefix:
        planes = surfaces(model, objective, seeds=range(options.planes), grid=options.grid, range=options.range)
        found = summarize(planes)
        numbers |= {"sc": found.sc.mean, "ag": found.ag.mean, "mag": found.mag.mean,
                    "excluded": found.excluded, "sc deviation": found.sc.deviation}  # fmt: skip
    return {prefix + name: value for name, value in numbers.items()}


def tokenized(task: Any, tokenizer: Any) -> Any:
    """The task as token ids with the prompt masked, once for all trainings."""
    from datasets import Dataset

    prompts = tokenizer(list(task["prompt"]))["input_ids"]
    wholes = tokenizer([row["prompt"] + row["completion"] for row in task])["input_ids"]
    ids = [[*whole, tokenizer.eos_token_id] for whole in wholes]
    labels = [[-100] * len(p) + i[len(p) :] for p, i in zip(prompts, ids, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


class World:
    """The model, the tasks and what is measured on every checkpoint."""

    def __init__(self, options: argparse.Namespace) -> None:
        from holdfast import lab
        from holdfast.landscape import token_loss
        from holdfast.models import load_model

        self.options, self.lab = options, lab
        _, self.tokenizer = load_model(options.model)
        first, second = (lab.load_task(name.removeprefix("lab:")) for name in (options.first, options.second))
        self.first, self.second = (tokenized(task, self.tokenizer) for task in (first, second))
        self.first_eval = lab.eval_task(options.first.removeprefix("lab:"))
        self.facts = next(task for task in lab.panel() if task.kind == "choice")
        text = next(task for task in lab.panel() if task.kind == "perplexity")
        subset = {"examples": options.examples, "max_length": options.max_length}
        self.task_loss = token_loss(first, self.tokenizer, **subset)
        self.text_loss = token_loss(
            [{"text": item.prompt or item.answer} for item in text.items], self.tokenizer, **subset
        )

    def fresh(self) -> Any:
        from holdfast.models import load_model

        return load_model(self.options.model)[0]

    def settings(self, scale: dict[str, Any], epochs: float) -> dict[str, Any]:
        base = {"learning_rate": self.options.rate, "per_device_train_batch_size": self.options.batch}
        return {
            "num_train_epochs": epochs,
            **{name: type(value)(value * scale.get(name, 1)) for name, value in base.items()},
        }  # fmt: skip

    def score(self, model: Any) -> dict[str, float]:
        from holdfast.evaluate import measure
        from holdfast.landscape import evaluation_loss

        items = measure(model, self.tokenizer, [self.first_eval, self.facts])
        means = items.groupby("task")["score"].mean() * 100
        return {"task": float(means[self.first_eval.name]), "facts": float(means[self.facts.name]),
                "task loss": evaluation_loss(model, self.task_loss),
                "text loss": evaluation_loss(model, self.text_loss)}  # fmt: skip

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        from holdfast.methods import METHODS

        scale, methods = ARMS[arm]
        started = time.perf_counter()
        model = train(self.fresh(), self.tokenizer, self.first, seed, self.settings(scale, self.options.epochs),
                      [METHODS[name](**fields) for name, fields in methods])  # fmt: skip
        before = self.score(model)
        row: dict[str, Any] = {"arm": arm, "seed": seed, "before": before}
        row |= flatness_of(model, self.task_loss, "", self.options)
        row |= flatness_of(model, self.text_loss, "text ", self.options)
        train(model, self.tokenizer, self.second, seed, self.settings({}, self.options.second_epochs), [])
        after = self.score(model)
        row |= {"after": after, "task drop": before["task"] - after["task"],
                "facts drop": before["facts"] - after["facts"],
                "task loss rise": after["task loss"] - before["task loss"],
                "text loss rise": after["text loss"] - before["text loss"],
                "seconds": time.perf_counter() - started}  # fmt: skip
        return row


def report(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per arm, and one per pair of measures."""
    from holdfast.landscape import rank_correlation

    lines = [
        "| arm | seeds | task before | " + " | ".join(FORGETTING) + " | SC | MAG | worst |",
        "|---|" + "---|" * (len(FORGETTING) + 5),
    ]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm]
        scores = [row["before"]["task"] for row in mine]
        cells = [arm, str(len(mine)), _mean(scores), *(_mean([row[name] for row in mine]) for name in FORGETTING)]
        lines.append("| " + " | ".join([*cells, *(_mean([r[n] for r in mine]) for n in ("sc", "mag", "worst"))]) + " |")
    lines += ["", "| flatness before | " + " | ".join(FORGETTING) + " |", "|---|" + "---|" * len(FORGETTING)]
    groups = [row["arm"] for row in rows]
    for flat in FLATNESS:
        cells = []
        for name in FORGETTING:
            found = rank_correlation([row[flat] for row in rows], [row[name] for row in rows], groups)
            cells.append(f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]")
        lines.append(f"| {flat} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.3g} ({np.min(values):.3g} to {np.max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lab")
    parser.add_argument("--first", default="lab:math")
    parser.add_argument("--second", default="lab:law")
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--second-epochs", type=float, default=1)
    parser.add_argument("--grid", type=int, default=5)
    parser.add_argument("--planes", type=int, default=3)
    parser.add_argument("--range", type=float, default=0.5)
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--average-rho", type=float, default=5.0, help="a random direction needs a longer way")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("flatness.jsonl"))
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    path = options.report or options.out
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if options.report is None:
        world, done = World(options), {(row["arm"], row["seed"]) for row in rows}
        for seed in options.seeds:
            for arm in options.arms:
                if (arm, seed) not in done:
                    rows.append(world.run(arm, seed))
                    with path.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(f"{arm}, seed {seed}: {rows[-1]}", flush=True)
    if len(rows) >= 3:
        print(report(rows))


if __name__ == "__main__":
    main()
