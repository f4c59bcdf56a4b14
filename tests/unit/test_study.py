"""Studies: what arms share, what a second run costs, and that stopping anywhere changes no number."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from holdfast.errors import UserError
from holdfast.recipe import MergeSpec, load_recipe
from holdfast.study import Study, prepare
from holdfast.study.merging import merge_content
from holdfast.study.plan import Step

Recipe = Callable[..., dict[str, Any]]


def trainings(mapping: dict[str, Any]) -> set[str]:
    """Keys of the trainings that a recipe needs."""
    return {step.key for step in prepare(load_recipe(mapping)).plan.steps() if step.kind == "train"}


def numbers(study: Study) -> dict[str, Any]:
    """study.json without what a clock or the environment decides."""
    data = json.loads(json.dumps(study.data))
    for step in data["steps"].values():
        step.pop("seconds")
        for entry in step.get("history", []):
            for key in [k for k in entry if k.endswith(("runtime", "per_second"))]:
                entry.pop(key)
    for arm in data["arms"].values():
        for seed in study.seeds:
            arm[str(seed)].pop("seconds")
    data.pop("environment")
    return data


class TestPlan:
    def test_six_arms_train_six_times_a_seed(self, tiny_recipe: Recipe) -> None:
        # task 1 once for all, task 2 for sequential, rehearsal, SAM and SFA, joint once; WiSE-FT merges
        assert len(trainings(tiny_recipe())) == 6
        assert len(trainings(tiny_recipe(seeds=[0, 1]))) == 12

    def test_adding_an_arm_costs_one_training_and_an_alpha_none(self, tiny_recipe: Recipe) -> None:
        before, arms = trainings(tiny_recipe()), tiny_recipe()["arms"]
        more = trainings(tiny_recipe(arms={**arms, "l2": [{"l2": {"weight": 0.1}}]}))
        assert before < more and len(more) == len(before) + 1
        assert trainings(tiny_recipe(arms={**arms, "wiseft-3": [{"wiseft": {"alpha": 0.3}}]})) == before

    def test_independent_arms_share_the_first_task_and_train_the_others_from_the_base(
        self, tiny_recipe: Recipe
    ) -> None:
        arms = tiny_recipe()["arms"]
        merged = {"ta": "independent", "ties": {"train": "independent", "merge": {"method": "ties", "density": 0.2}}}
        assert len(trainings(tiny_recipe(arms={**arms, **merged}))) == 7

    def test_a_merge_of_some_models_takes_their_weights_and_dare_the_studys_seed(self) -> None:
        weighted = MergeSpec(method="task_arithmetic", settings={"weights": [1.0, 0.5, 0.25]})
        assert merge_content(weighted, 2, 3, seed=7)["settings"] == {"weights": [1.0, 0.5]}
        assert merge_content(MergeSpec(method="dare_ties"), 2, 3, seed=7)["settings"] == {"seed": 7}
        fixed = MergeSpec(method="dare", settings={"seed": 1})
        assert merge_content(fixed, 2, 3, seed=7)["settings"] == {"seed": 1}

    def test_a_default_written_out_is_the_same_step(self, tiny_recipe: Recipe) -> None:
        short = trainings(tiny_recipe(arms={"sfa": [{"sfa": {"p": 0.25}}]}))
        assert trainings(tiny_recipe(arms={"other": [{"sfa": {"p": 0.25, "beta": 0.5}}]})) == short

    @pytest.mark.parametrize(
        "change",
        [
            {"seeds": [1]},
            {"training": {"learning_rate": 0.004, "max_steps": 4, "per_device_train_batch_size": 8, "max_length": 32}},
            {"dtype": "bfloat16"},
        ],
    )
    def test_what_decides_the_result_decides_the_key(self, tiny_recipe: Recipe, change: dict[str, Any]) -> None:
        assert not trainings(tiny_recipe()) & trainings(tiny_recipe(**change))

    def test_the_data_decide_the_key_not_their_place(self, tiny_recipe: Recipe, tmp_path: Path) -> None:
        recipe = tiny_recipe()
        copy = tmp_path / "elsewhere.jsonl"
        copy.write_bytes(Path(recipe["tasks"][0]["train"]).read_bytes())
        moved = tiny_recipe(tasks=[{**recipe["tasks"][0], "train": str(copy)}, recipe["tasks"][1]])
        assert trainings(moved) == trainings(recipe)
        copy.write_text(copy.read_text().replace("echo", "ecHo", 1))
        assert not trainings(moved) & trainings(recipe)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study") / "run"


class TestRun:
    def test_everything_is_measured_and_kept(self, tiny_recipe: Recipe, finished: Path) -> None:
        study = Study.run(tiny_recipe(), out=finished)
        assert study.trainings == 6
        matrix = study.matrix("sequential", 0)
        assert list(matrix.index) == list(matrix.columns) == ["echo", "flip"]
        assert list(study.matrix("joint", 0).index) == ["joint"]
        assert study.abilities("sam", 0)["text"].gt(1).all()
        assert list(study.table().index) == ["sequential", "rehearsal", "sam", "sfa", "wiseft", "joint"]
        items = study.items()
        assert set(items["after"]) == {"base", "echo", "flip", "joint"}
        per_arm = items[(items["arm"] == "sam") & (items["after"] == "flip") & (items["task"] == "flip")]
        assert per_arm["score"].mean() * 100 == pytest.approx(study.matrix("sam", 0).loc["flip", "flip"])
        assert Study.load(finished).data == json.loads(json.dumps(study.data))
        assert yaml.safe_load((finished / "recipe.yaml").read_text())["name"] == "tiny"
        assert "torch" in json.loads((finished / "environment.json").read_text())["versions"]
        assert not (finished / "work").exists() or not list((finished / "work").iterdir())

    def test_arms_share_the_checkpoint_of_task_one(self, tiny_recipe: Recipe, finished: Path) -> None:
        data = Study.run(tiny_recipe(), out=finished).data
        assert len({data["arms"][arm]["0"]["checkpoints"][0]["step"] for arm in ("sequential", "sam", "sfa")}) == 1

    def test_a_second_run_computes_nothing_and_a_wiseft_alpha_trains_nothing(
        self, tiny_recipe: Recipe, finished: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = Study.run(tiny_recipe(), out=finished)

        def never(*_: Any, **__: Any) -> None:
            raise AssertionError("trained again")

        monkeypatch.setattr("holdfast.study.training.train", never)
        assert numbers(Study.run(tiny_recipe(), out=finished)) == numbers(first)
        arms = {**tiny_recipe()["arms"], "wiseft-3": [{"wiseft": {"alpha": 0.3}}]}
        study = Study.run(tiny_recipe(arms=arms), out=finished)
        assert "wiseft-3" in study.arms and study.trainings == 6

    def test_wiseft_is_the_average_of_the_two_checkpoints(self, tiny_recipe: Recipe, finished: Path) -> None:
        from safetensors.torch import load_file

        study = Study.run(tiny_recipe(), out=finished)
        steps = [study.data["arms"][arm]["0"]["checkpoints"] for arm in ("sequential", "wiseft")]
        first, tuned = (steps[0][i]["step"] for i in (0, 1))
        weights = [
            load_file(finished / "steps" / name / "model" / "model.safetensors")
            for name in (f"train-{first}", f"train-{tuned}", f"edit-{steps[1][1]['step']}")
        ]
        for name, merged in weights[2].items():
            np.testing.assert_allclose(merged, (weights[0][name] + weights[1][name]) / 2, rtol=0, atol=1e-7)

    def test_stopped_anywhere_and_run_again_equals_uninterrupted(
        self, tiny_recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = Study.run(tiny_recipe(), out=finished)
        made: list[Step] = []
        from holdfast.study.run import Runner

        original = Runner._measure

        def stop_after_two(self: Runner, step: Step, name: str) -> None:
            original(self, step, name)
            made.append(step)
            if len(made) % 2 == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(Runner, "_measure", stop_after_two)
        for _ in range(20):
            try:
                study = Study.run(tiny_recipe(), out=tmp_path / "stopped")
                break
            except KeyboardInterrupt:
                continue
        assert numbers(study) == numbers(whole)
        pd.testing.assert_frame_equal(study.items(), whole.items())

    def test_stopped_inside_a_training_goes_on_from_its_last_checkpoint(
        self, tiny_recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import TrainerCallback

        from holdfast.study import training

        whole, stopped, resumed = Study.run(tiny_recipe(), out=finished), set(), []
        clock, find = training._checkpoints, training.last_complete

        def also_stop(step: Step) -> list[Any]:
            class StopOnce(TrainerCallback):
                def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                    if state.global_step == 3 and step.key not in stopped:
                        stopped.add(step.key)
                        raise KeyboardInterrupt

            return [*clock(step), StopOnce()]

        def found(work: Path) -> str | None:
            resumed.append(find(work))
            return resumed[-1]

        monkeypatch.setattr(training, "SAVE_SECONDS", 0)
        monkeypatch.setattr(training, "_checkpoints", also_stop)
        monkeypatch.setattr(training, "last_complete", found)
        for _ in range(7):
            try:
                study = Study.run(tiny_recipe(), out=tmp_path / "stopped")
            except KeyboardInterrupt:
                continue
        assert [Path(folder).name for folder in resumed if folder] == ["checkpoint-2"] * 6
        assert numbers(study)["arms"] == numbers(whole)["arms"]
        pd.testing.assert_frame_equal(study.items(), whole.items())

    def test_a_directory_of_another_recipe_is_refused(
        self, tiny_recipe: Recipe, finished: Path, tmp_path: Path
    ) -> None:
        Study.run(tiny_recipe(), out=finished)
        other = tiny_recipe()
        other["training"]["max_steps"] = 5
        with pytest.raises(UserError, match=r"different recipe: 'training\.max_steps' was 4, is 5"):
            Study.run(other, out=finished)
        (tmp_path / "precious.txt").write_text("mine")
        with pytest.raises(UserError, match="not empty and holds no holdfast study"):
            Study.run(tiny_recipe(), out=tmp_path)
        assert (tmp_path / "precious.txt").read_text() == "mine"

    def test_anchors_of_a_base_that_is_no_folder(self, tiny_recipe: Recipe, tmp_path: Path) -> None:
        """`lab` is a name: methods of the first task, the stream's base and pseudo-rehearsal must find its weights."""
        arms = {
            "l2": {"methods": [{"l2": {"weight": 1.0}}], "from_task": 1},
            "base": [{"l2": {"anchor": "base"}}, {"sfa": {"anchor": "base"}}],
            "pseudo": [{"pseudo_rehearsal": {"max_new_tokens": 4}}],
        }
        changes = {"learning_rate": 0.003, "max_steps": 2, "per_device_train_batch_size": 8, "max_length": 32}
        study = Study.run(tiny_recipe(model="lab", arms=arms, panel=None, training=changes), out=tmp_path)
        assert study.trainings == 5

    def test_answers_can_be_compared_as_numbers(self, tiny_recipe: Recipe) -> None:
        recipe = tiny_recipe(arms={"sequential": []})
        recipe["tasks"][0]["metric"] = "numeric_match"
        questions = {task.name: task.metric for task in prepare(load_recipe(recipe)).questions}
        assert (questions["echo"], questions["flip"]) == ("numeric_match", "exact_match")

    def test_methods_that_need_the_past_get_it_and_adapters_are_merged_into_their_arm(
        self, tiny_recipe: Recipe, finished: Path, tmp_path: Path
    ) -> None:
        """EWC and Fisher merging see the first task's data; an arm may train through LoRA, OSF or KappaTune."""
        arms = {
            "sequential": [],
            "ewc": {"methods": [{"ewc": {"samples": 4}}], "from_task": 1},
            "fisher": [{"fisher_merge": {"samples": 4}}],
            "lora": {"peft": {"rank": 2}},
            "osf": {"peft": {"type": "osf", "effective_rank": 0.5}},
            "kappa": {"peft": {"rank": 2, "targets": {"kappa": 0.3}}, "methods": [{"sam": {"rho": 0.05}}]},
        }
        study = Study.run(tiny_recipe(arms=arms), out=tmp_path)
        assert study.trainings == 7
        ends = {arm: study.data["arms"][arm]["0"]["checkpoints"][-1]["step"] for arm in arms}
        firsts = {study.data["arms"][arm]["0"]["checkpoints"][0]["step"] for arm in arms}
        assert len(set(ends.values())) == 6 and len(firsts) == 1
        folders = {path.name.split("-")[1]: path for path in (tmp_path / "steps").iterdir()}
        for arm in ("lora", "osf", "kappa"):
            assert not list(folders[ends[arm]].rglob("adapter*")), arm
        with pytest.raises(UserError, match="ewc: needs past tasks' data, and `train: joint` has no past tasks"):
            prepare(load_recipe(tiny_recipe(arms={"x": {"train": "joint", "methods": ["ewc"], "from_task": 1}})))

    def test_a_loss_without_logits_is_refused_before_any_training(self, tiny_recipe: Recipe, tmp_path: Path) -> None:
        recipe = tiny_recipe(arms={"distilled": [{"distill": {}}]})
        recipe["training"]["loss_type"] = "dft"
        with pytest.raises(UserError, match="distill: TRL's loss_type='dft' never makes logits"):
            Study.run(recipe, out=tmp_path)
        assert not list((tmp_path / "steps").glob("*"))

    def test_no_finished_study(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no finished study"):
            Study.load(tmp_path)

    def test_independent_arms_are_merged_from_the_base(self, tiny_recipe: Recipe, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        settings = {"method": "task_arithmetic", "weights": [1.0, 0.5]}
        arms = {"ta": {"train": "independent", "merge": settings}}
        study = Study.run(tiny_recipe(arms=arms), out=tmp_path / "run")
        steps = tmp_path / "run" / "steps"
        merged = next(steps.glob("merge-*")) / "model" / "model.safetensors"
        trained = {
            json.loads((folder / "step.json").read_text())["content"]["data"][0]: load_file(
                folder / "model" / "model.safetensors"
            )
            for folder in steps.glob("train-*")
        }
        data = study.data["data"]
        base = load_file(Path(tiny_recipe()["model"]) / "model.safetensors")
        for name, value in load_file(merged).items():
            first, second = (trained[data[task]["hash"]][name] - base[name] for task in ("echo", "flip"))
            np.testing.assert_allclose(value, base[name] + first + 0.5 * second, rtol=0, atol=1e-6)
        assert list(study.matrix("ta", 0).index) == ["echo", "flip"]

    def test_every_checkpoint_is_measured_on_the_gpu_where_there_is_one(
        self, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moved: list[Any] = []
        monkeypatch.setattr("holdfast.probe.on_device", lambda model: moved.append(model) or model)
        Study.run(tiny_recipe(arms={"sequential": []}), out=tmp_path)
        assert len(moved) == 3  # the base, after echo, after flip

    @pytest.mark.parametrize("normalize", [False, True])
    def test_fisher_merging_of_independent_arms_weighs_each_model_by_its_own_tasks_fisher(
        self, tiny_recipe: Recipe, tmp_path: Path, normalize: bool
    ) -> None:
        from safetensors.torch import load_file

        from holdfast.merge import compute_fisher
        from holdfast.models import load_model

        merge = {"method": "fisher", "samples": 3, "weights": [1.0, 0.5], "normalize": normalize}
        recipe = tiny_recipe(arms={"fisher": {"train": "independent", "merge": merge}})
        Study.run(recipe, out=tmp_path / "run")
        tasks = {task.train_hash: task for task in prepare(load_recipe(recipe)).tasks}
        steps = tmp_path / "run" / "steps"
        models, fishers = {}, {}
        for folder in steps.glob("train-*"):
            task = tasks[json.loads((folder / "step.json").read_text())["content"]["data"][0]]
            model, tokenizer = load_model(folder / "model", dtype="float32")
            models[task.name] = load_file(folder / "model" / "model.safetensors")
            fishers[task.name] = compute_fisher(model, tokenizer, task.train, samples=3, max_length=32)
        merged = load_file(next(steps.glob("merge-*")) / "model" / "model.safetensors")
        sizes = {
            task: sum(float(part.double().square().sum()) for part in found.values()) ** 0.5 if normalize else 1.0
            for task, found in fishers.items()
        }
        for name, value in merged.items():
            first, second = (fishers[task][name].double() / sizes[task] for task in ("echo", "flip"))
            second *= 0.5
            mean = (models["echo"][name].double() + 0.5 * models["flip"][name].double()) / 1.5
            total = first + second
            expected = (first * models["echo"][name] + second * models["flip"][name]) / total.where(total > 0, 1)
            np.testing.assert_allclose(value, expected.where(total > 0, mean), rtol=0, atol=2e-6)

    @pytest.mark.parametrize(
        ("merge", "message"),
        [
            ("tiess", "merge: there is no merge method 'tiess'. Did you mean 'ties'?"),
            (
                {"method": "ties", "densty": 0.2},
                "merge: method 'ties' has no setting 'densty'. Did you mean 'density'?",
            ),
            ({"method": "ties", "density": 2}, "merge: density must be above 0 and at most 1, not 2.0."),
            ({"method": "ties", "weights": [1, 1, 1]}, "merge: 3 weights for 2 tasks: give one weight a task."),
            ("wise_ft", "merge: method 'wise_ft' takes 1 model, not 2."),
            ({"method": "fisher", "sample": 3}, "'sample' in a study. Did you mean 'samples'?"),
            ({"method": "fisher", "samples": 0}, "samples must be a whole number of at least 1, not 0."),
            ({"method": "fisher", "kind": "tru"}, "kind 'tru' is unknown. Did you mean 'true'?"),
        ],
    )
    def test_a_merge_that_would_be_refused_is_refused_before_any_training(
        self, tiny_recipe: Recipe, tmp_path: Path, merge: Any, message: str
    ) -> None:
        arms = {"merged": {"train": "independent", "merge": merge}}
        with pytest.raises(UserError, match=re.escape(message)):
            Study.run(tiny_recipe(arms=arms), out=tmp_path)
        assert not list((tmp_path / "steps").glob("*"))
