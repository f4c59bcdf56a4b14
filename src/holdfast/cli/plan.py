"""``holdfast plan``: what a recipe would do, before it does anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.run import RecipeArgument, split_arguments

if TYPE_CHECKING:
    from rich.console import Console

    from holdfast.study import Prepared
    from holdfast.study.plan import Step


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def plan(
        recipe: RecipeArgument = None,
        out: Annotated[
            Path | None, typer.Option(help="A run directory: shows what of the plan is already done there.")
        ] = None,
        examples: Annotated[int, typer.Option(min=0, help="Decoded examples to show for each task.")] = 2,
    ) -> None:
        """Check a recipe and its data; show examples as the model sees them, the formulas and the steps to run."""
        from rich.console import Console

        from holdfast.recipe import load_recipe
        from holdfast.study import prepare
        from holdfast.study.quiet import quiet_libraries

        quiet_libraries()
        name, overrides = split_arguments(recipe)
        checked = load_recipe(name, overrides)
        prepared = prepare(checked)
        console = Console()
        _print_tasks(console, prepared, examples)
        _print_arms(console, prepared)
        _print_steps(console, prepared, out)


def _print_tasks(console: Console, prepared: Prepared, examples: int) -> None:
    from holdfast.data import preview
    from holdfast.models import load_tokenizer

    tokenizer = load_tokenizer(prepared.recipe.model)
    for task in prepared.tasks:
        test = task.test
        console.print(
            f"\nTask {task.name}: {len(task.train)} training rows, {len(test.items)} questions, "
            f"{test.metric} (chance {test.chance:g} %)",
            style="bold",
            markup=False,
        )
        for note in task.notes:
            console.print(f"note: {note}", style="yellow", markup=False)
        if examples:
            console.print(preview(task.train, tokenizer, examples))
            item = test.items[0]
            console.print(f"question as scored: {item.prompt!r} → {item.answer!r}", style="dim", markup=False)
    for test in prepared.panel:
        console.print(
            f"\nPanel {test.name}: {len(test.items)} items, {test.metric} (chance {test.chance:g} %)",
            style="bold",
            markup=False,
        )


def _print_arms(console: Console, prepared: Prepared) -> None:
    from holdfast.method import describe
    from holdfast.study.plan import build_methods

    console.print("\nArms", style="bold")
    clip = prepared.recipe.training.get("max_grad_norm", 1.0)
    for name, arm in prepared.recipe.arms.items():
        methods = build_methods(arm.methods)
        way = arm.train if arm.merge is None else f"{arm.train}, merged by {arm.merge.method}"
        since = f", its own way from task {arm.from_task}" if methods or arm.peft else ""
        console.print(f"  {name} ({way}{since})", markup=False)
        if arm.peft is not None:
            console.print(f"      peft: {arm.peft}", markup=False, style="dim")
        for line in describe(list(methods), clip=clip):
            console.print(f"      {line}", markup=False, style="dim")


def _print_steps(console: Console, prepared: Prepared, out: Path | None) -> None:
    from rich.table import Table

    from holdfast.study.store import Store

    store = Store(out) if out is not None else None
    users: dict[Step, list[str]] = {}
    for arm in prepared.plan.arms:
        for step in arm.steps():
            users.setdefault(step, []).append(f"{arm.arm}/{arm.seed}")
    table = Table(
        "step", "on", "seed", "used by (arm/seed)", "state", title="Steps, each run once", title_justify="left"
    )
    steps = [step for step in prepared.plan.steps() if step.kind != "base"]
    for step in steps:
        state = "done" if store is not None and store.has_step(step) else "to run"
        on = " + ".join(step.tasks) or " + ".join(t for i in step.inputs for t in i.tasks)
        table.add_row(step.kind, on, str(step.seed), ", ".join(users[step]), state)
    console.print()
    console.print(table)
    trainings = sum(step.kind == "train" for step in steps)
    questions = sum(len(task.items) for task in prepared.questions)
    checkpoints = len(prepared.plan.checkpoints())
    console.print(
        f"{trainings} trainings; {checkpoints} checkpoints measured on {questions} items each.",
        markup=False,
        highlight=False,
    )
