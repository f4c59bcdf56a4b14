"""``holdfast init``: a commented recipe for the user's own model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def init(
        path: Annotated[Path, typer.Argument(help="The recipe file to write.")] = Path("recipe.yaml"),
        model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file of a causal LM.")] = "lab",
        train: Annotated[
            list[str] | None,
            typer.Option(help="Training file of one task, repeated for more: FILE or NAME=FILE.", show_default=False),
        ] = None,
        test: Annotated[
            list[str] | None, typer.Option(help="Test file of each task, in the same order.", show_default=False)
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    ) -> None:
        """Write a commented recipe; with --train and --test it is filled in from what the files hold."""
        from holdfast.errors import UserError
        from holdfast.files import write_text

        if path.exists() and not force:
            raise UserError(f"{path} exists; --force overwrites it.")
        trains, tests = train or [], test or []
        if len(trains) != len(tests):
            raise UserError(f"each --train needs its --test: got {len(trains)} and {len(tests)}.")
        write_text(path, recipe_text(path.stem, model, list(zip(trains, tests))))
        typer.echo(f"Wrote {path}. Look at it, then: holdfast plan {path} && holdfast run {path}")


def recipe_text(name: str, model: str, files: list[tuple[str, str]]) -> str:
    """The YAML text of a new recipe."""
    tasks = "\n".join(_task(train, test) for train, test in files) if files else LAB_TASKS
    panel = "lab" if model == "lab" else "quick"
    return TEMPLATE.format(name=name, model=_quoted(model), tasks=tasks, panel=panel)


def _task(train: str, test: str) -> str:
    from holdfast.data import raw_rows

    label, separator, file = train.partition("=")
    if not separator:
        label, file = Path(train).name.split(".")[0], train
    rows = raw_rows(file, limit=1)
    columns = list(rows[0]) if rows else []
    lines = [
        f"  - name: {_quoted(label)}",
        f"    train: {_quoted(file)}",
        f"    test: {_quoted(test.partition('=')[2] or test)}",
    ]
    lines.append(f"    # columns in the file: {', '.join(columns)}")
    lines += _template_lines(columns)
    return "\n".join(lines)


def _template_lines(columns: list[str]) -> list[str]:
    """Templates where the columns are not a format that is recognised by itself."""
    known = (
        {"prompt", "completion"},
        {"messages"},
        {"conversations"},
        {"text"},
        {"instruction", "output"},
        {"instruction", "response"},
    )
    if any(form <= set(columns) for form in known):
        return ["    # the format is recognised from the columns; `prompt` and `completion` templates override it"]
    first, last = (columns[0], columns[-1]) if len(columns) > 1 else ("question", "answer")
    return [
        f"    prompt: {_quoted('{' + first + '}')}      # what the model is given; any text with {{column}} names",
        f"    completion: {_quoted(' {' + last + '}')}  # what it should answer; only this is trained on",
    ]


def _quoted(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


LAB_TASKS = """  - source: "lab:math"
  - source: "lab:law\""""

TEMPLATE = """# A holdfast recipe: one model, a stream of tasks, once for every arm; measures what is forgotten.
#   holdfast plan {name}.yaml    checks it and shows the examples as the model sees them
#   holdfast run {name}.yaml     runs it; run it again to continue, or to add arms and seeds
# Any key can be set on the command line: holdfast run {name}.yaml training.learning_rate=1e-5 "seeds=[0,1,2]"

name: {name}
model: {model}          # hub id, local folder, .gguf file, or lab (the small model that comes with holdfast)

tasks:                  # taught one after the other
{tasks}
    # train_limit: 2000         # a fixed random subset of the training rows
    # test_limit: 200           # and of the questions
    # extract: "#### (-?[0-9.,]+)"   # compare only this part of the answer
    # choices: [" yes", " no"]  # score these answers by likelihood instead of generating

panel: {panel}          # general abilities, measured at every checkpoint: lab, quick, sfa, paper1, or tasks of your own

arms:                   # each is a list of methods (holdfast list shows them all), or joint / independent
  sequential: []                      # plain fine-tuning: what is forgotten without help
  rehearsal: [{{rehearsal: {{share: 0.1}}}}]
  sam: [{{sam: {{rho: 0.05}}}}]
  sfa: [{{sfa: {{p: 0.25, beta: 0.5}}}}]
  wiseft: [{{wiseft: {{alpha: 0.5}}}}]    # no training of its own: merges the sequential checkpoint
  joint: joint                        # all tasks at once: the upper bound

seeds: [0]              # three or more before you believe a difference

training:               # any setting of TRL's SFTConfig
  learning_rate: 1.0e-5
  num_train_epochs: 1
  per_device_train_batch_size: 8
  gradient_accumulation_steps: 2
  lr_scheduler_type: cosine
  warmup_steps: 10
  max_length: 1024
  # bf16: true                  # bf16 compute over fp32 weights
  # gradient_checkpointing: true
  # save_steps: 200             # an interrupted training continues from here
"""
