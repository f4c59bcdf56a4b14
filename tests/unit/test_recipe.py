"""Recipes: short forms, overrides, and one clear message for every slip."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.errors import UserError
from holdfast.recipe import load_recipe
from holdfast.recipe_file import builtin_recipes

MINIMAL = {"model": "lab", "tasks": ["lab:math", {"source": "lab:law"}], "arms": {"sequential": []}}


def test_short_forms_are_spelled_out() -> None:
    recipe = load_recipe(
        {
            **MINIMAL,
            "panel": "lab",
            "arms": {
                "plain": None,
                "sam": ["sam"],
                "both": [{"sfa": {"p": 0.5}}, {"l2": {"weight": 0.1}}],
                "all": "joint",
            },
        }
    )
    assert [task.name for task in recipe.tasks] == ["math", "law"]
    assert recipe.panel is not None and recipe.panel.name == "lab"
    assert recipe.arms["sam"].methods == [{"sam": {}}]
    assert recipe.arms["both"].methods == [{"sfa": {"p": 0.5}}, {"l2": {"weight": 0.1}}]
    assert recipe.arms["all"].train == "joint"
    assert recipe.arms["plain"].from_task == 2


def test_overrides_reach_every_place_and_keep_yaml_types() -> None:
    recipe = load_recipe(
        MINIMAL,
        [
            "training.learning_rate=1e-4",
            "seeds=[1,2]",
            "tasks.math.train_limit=7",
            "tasks.1.test_limit=3",
            "arms.wide=[{sam: {rho: 0.2}}]",
            "panel.limit=5",
            "panel.name=lab",
        ],
    )
    assert float(recipe.training["learning_rate"]) == 1e-4
    assert recipe.seeds == [1, 2]
    assert (recipe.tasks[0].train_limit, recipe.tasks[1].test_limit) == (7, 3)
    assert recipe.arms["wide"].methods == [{"sam": {"rho": 0.2}}]
    assert recipe.panel is not None and recipe.panel.limit == 5


def test_an_override_finds_an_existing_key_with_dots_in_its_name() -> None:
    mapping = {**MINIMAL, "arms": {"sfa-0.25": {"methods": [{"sfa": {"p": 0.25}}]}}}
    recipe = load_recipe(mapping, ["arms.sfa-0.25.training.learning_rate=0.5", "arms.plain=[]"])
    assert recipe.arms["sfa-0.25"].training == {"learning_rate": 0.5}
    assert set(recipe.arms) == {"sfa-0.25", "plain"}


def test_an_override_into_a_short_panel_keeps_its_name() -> None:
    recipe = load_recipe({**MINIMAL, "panel": "lab"}, ["panel.limit=5"])
    assert recipe.panel is not None and (recipe.panel.name, recipe.panel.limit) == ("lab", 5)


BAD: list[tuple[dict[str, object], list[str]]] = [
    ({"modle": "lab"}, ["unknown key 'modle'", "Did you mean 'model'?"]),
    ({"tasks": [{"source": "lab:math", "trian_limit": 3}]}, ["tasks.0.trian_limit", "Did you mean 'train_limit'?"]),
    ({"arms": {"a": {"form_task": 1}}}, ["arms.a.form_task", "Did you mean 'from_task'?"]),
    ({"panel": {"limt": 3}}, ["panel.limt", "Did you mean 'limit'?"]),
    ({"arms": {"a": ["smm"]}}, ["arms.a", "'smm'", "Did you mean 'sam'?"]),
    ({"arms": {"a": [{"sam": {"roh": 1}}]}}, ["arms.a", "'roh'", "Did you mean 'rho'?"]),
    ({"arms": {"a": [{"sfa": {"p": 1.5}}]}}, ["arms.a", "sfa", "p", "1.5"]),
    ({"arms": {"a": [{"rehearsal": {"share": 1.0}}]}}, ["arms.a", "rehearsal", "share", "1.0"]),
    ({"training": {"learning_rat": 1}}, ["training.learning_rat", "Did you mean 'learning_rate'?"]),
    ({"training": {"seed": 1}}, ["training.seed", "seeds"]),
    ({"training": {"deepspeed": "x"}}, ["training.deepspeed", "FSDP2"]),
    ({"seeds": []}, ["seeds"]),
    ({"seeds": [1, 1]}, ["seeds", "twice"]),
    ({"arms": {}}, ["arms"]),
    ({"tasks": ["lab:math", "lab:math"]}, ["math", "twice"]),
    ({"tasks": [{"name": "x", "test": "a.jsonl"}]}, ["tasks.0", "train"]),
    ({"tasks": [{"name": "x", "train": "a.jsonl", "test": "b.jsonl", "extract": "("}]}, ["extract"]),
    ({"arms": {"j": {"train": "joint", "methods": ["sam"]}}}, ["arms.j", "from_task: 1"]),
    ({"arms": {"a/b": []}}, ["arms"]),
]


@pytest.mark.parametrize(
    ("change", "expected"), BAD, ids=[str(next(iter(change))) + str(i) for i, (change, _) in enumerate(BAD)]
)
def test_bad_input_names_the_key_and_the_way_out(change: dict[str, object], expected: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_recipe({**MINIMAL, **change})
    for text in expected:
        assert text in str(error.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: lab\ntasks: [\n")
    with pytest.raises(UserError, match=r"broken\.yaml:3: not valid YAML"):
        load_recipe(broken)
    broken.write_text("just text\n")
    with pytest.raises(UserError, match="mapping of keys"):
        load_recipe(broken)
    with pytest.raises(UserError, match="Did you mean 'quickstart'"):
        load_recipe("quickstrat")
    with pytest.raises(UserError, match="written key=value"):
        load_recipe(MINIMAL, ["seeds"])
    with pytest.raises(UserError, match=r"no entry 'mth'.*Did you mean 'math'"):
        load_recipe(MINIMAL, ["tasks.mth.train_limit=1"])


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipe_that_ships_is_valid(name: str) -> None:
    assert load_recipe(name).name == name
