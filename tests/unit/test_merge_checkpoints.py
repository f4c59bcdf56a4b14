"""Merging checkpoint folders: the numbers of the pure functions, every layout and mismatch, and after kill -9."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from holdfast.errors import UserError
from holdfast.merge import (
    StateDict,
    dare,
    fisher,
    linear,
    merge_checkpoints,
    processes,
    slerp,
    task_arithmetic,
    ties,
    wise_ft,
)
from holdfast.merge import engine as engine_module
from holdfast.merge import plan as plan_module
from holdfast.merge import stage as stage_module
from holdfast.merge.stage import Stage

Tensors = dict[str, torch.Tensor]


def write(folder: Path, tensors: Tensors, shards: int = 1, **files: str) -> Path:
    """A checkpoint folder as transformers writes it."""
    folder.mkdir(parents=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            part = {name: tensor for j, (name, tensor) in enumerate(tensors.items()) if j % shards == i}
            name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file(part, folder / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, name))
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, text in {"config.json": "{}", **files}.items():
        (folder / name).write_text(text)
    return folder


def read(folder: Path) -> Tensors:
    """All tensors, by the safetensors library."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def model(seed: int, dtype: torch.dtype = torch.bfloat16, step: float = 1.0) -> Tensors:
    """A few odd shapes, one of them longer than a chunk, and a buffer of integers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (1000, 160), "norm.weight": (7,), "scalar": (), "conv.weight": (3, 2, 5), "empty": (0, 4)}
    tensors = {name: (step * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}
    return {**tensors, "positions": torch.arange(9)}


def near(base: Tensors, seed: int) -> Tensors:
    """A fine-tuned version."""
    noise = model(seed, torch.float32, step=0.05)
    return {n: (t.float() + noise[n]).to(t.dtype) if t.is_floating_point() else t for n, t in base.items()}


def same(a: Tensors, b: Tensors) -> bool:
    """Bit for bit."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(bits(a[n]), bits(b[n])) for n in a
    )


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("trio")
    base = model(0)
    return (
        write(root / "base", base, **{"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}"}),
        write(root / "a", near(base, 1), shards=2),
        write(root / "b", near(base, 2)),
    )


METHODS = {
    "linear": ({"weights": [0.3, 0.9]}, lambda o, a, b: linear([a, b], [0.3, 0.9])),
    "task_arithmetic": ({"weights": [0.3, 0.9]}, lambda o, a, b: task_arithmetic(o, [a, b], [0.3, 0.9])),
    "negation": ({"weights": [0.3, 0.9]}, lambda o, a, b: task_arithmetic(o, [a, b], [-0.3, -0.9])),
    "ties": ({"density": 0.3}, lambda o, a, b: ties(o, [a, b], density=0.3)),
    "ties-model": ({"density": 0.3, "scope": "model"}, lambda o, a, b: ties(o, [a, b], density=0.3, scope="model")),
    "dare": ({"density": 0.3, "seed": 5}, lambda o, a, b: {n: dare_one(n, o, a, b) for n in o}),
    "slerp": ({"t": 0.2}, lambda o, a, b: slerp(a, b, 0.2)),
}


def dare_one(name: str, o: Tensors, a: Tensors, b: Tensors) -> torch.Tensor:
    return dare({name: o[name]}, [{name: a[name]}, {name: b[name]}], density=0.3, seed=5)[name]


@pytest.mark.parametrize("method", METHODS)
def test_streaming_gives_the_numbers_of_the_pure_function(method, trio, tmp_path):
    base, a, b = trio
    arguments, pure = METHODS[method]
    merge_checkpoints(method.removesuffix("-model"), [a, b], tmp_path / "out", base, **arguments)
    assert same(read(tmp_path / "out"), pure(read(base), read(a), read(b)))


@settings(max_examples=8, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    shards=st.integers(1, 3),
    weight=st.floats(0.1, 0.9),
    seed=st.integers(0, 99),
)
def test_laws_over_shapes_dtypes_shardings_and_weights(shapes, dtype, shards, weight, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = ({f"t{i}": torch.randn(s, generator=generator).to(dtype) for i, s in enumerate(shapes)} for _ in range(2))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        first, second = write(root / "x", x, min(shards, len(x))), write(root / "y", y, 1)
        merge_checkpoints("linear", [first, second], root / "one-zero", weights=[1, 0])
        assert same(read(root / "one-zero"), x)
        assert sorted(p.name for p in (root / "one-zero").glob("*.safetensors")) == sorted(
            p.name for p in first.glob("*.safetensors")
        )
        if dtype != torch.float64:
            merge_checkpoints("linear", [first, first], root / "same", weights=[weight, 1 - weight])
            assert same(read(root / "same"), x)
        merge_checkpoints("linear", [first, second], root / "xy", weights=[weight, 1])
        merge_checkpoints("linear", [second, first], root / "yx", weights=[1, weight])
        assert same(read(root / "xy"), read(root / "yx"))


def test_the_folder_is_complete_and_says_how_it_was_made(trio, tmp_path):
    base, a, b = trio
    result = merge_checkpoints("ties", [a, b], tmp_path / "out", base, density=0.5)
    out = tmp_path / "out"
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "README.md", "merge.json"} <= {
        p.name for p in out.iterdir()
    }
    record = json.loads((out / "merge.json").read_text())
    assert record["method"] == "ties" and record["settings"] == {"density": 0.5, "scope": "tensor", "scale": 1.0}
    import hashlib

    digest = hashlib.sha256((b / "model.safetensors").read_bytes()).hexdigest()
    assert record["inputs"][str(b / "model.safetensors")] == digest
    assert len(record["inputs"]) == 4  # base, two shards of a, b
    assert digest in (out / "README.md").read_text()
    assert not result.already_done and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert merge_checkpoints("ties", [a, b], out, base, density=0.5).already_done
    with pytest.raises(UserError, match="exists and is not this merge"):
        merge_checkpoints("ties", [a, b], out, base, density=0.6)
    merge_checkpoints("ties", [a, b], out, base, density=0.6, overwrite=True)
    assert json.loads((out / "merge.json").read_text())["settings"]["density"] == 0.6


def test_shards_and_index_of_the_base_are_kept(trio, tmp_path):
    _, a, b = trio
    merge_checkpoints("linear", [a, b], tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((a / "model.safetensors.index.json").read_text())["weight_map"]
    with StateDict.open(tmp_path / "out") as merged:
        assert set(merged) == set(index["weight_map"])
        assert index["metadata"]["total_size"] == sum(info.nbytes for info in merged.infos.values())
        assert torch.equal(merged["positions"], torch.arange(9))


def test_dtype_and_half_precision_overflow(trio, tmp_path):
    base, a, _ = trio
    merge_checkpoints("wise_ft", [a], tmp_path / "wide", base, dtype="float32", alpha=0.3)
    x, y = read(base), read(a)
    wide = read(tmp_path / "wide")
    assert wide["embed.weight"].dtype == torch.float32
    expected = wise_ft(x["embed.weight"].float(), y["embed.weight"].float(), 0.3)
    assert torch.equal(wide["embed.weight"], expected)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    big = write(tmp_path / "big", {"w": torch.full((3,), 60000.0, dtype=torch.float16)})
    with pytest.raises(UserError, match="too large for float16"):
        merge_checkpoints("linear", [big], tmp_path / "no", weights=[2.0], normalize=False)
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".no*"))


def test_a_sweep_equals_single_merges(trio, tmp_path):
    base, a, b = trio
    result = merge_checkpoints("wise_ft", [a], tmp_path / "sweep", base, sweep={"beta": [0.0, 0.25, 1.0]})
    assert list(result.outputs) == ["beta=0", "beta=0.25", "beta=1"]
    merge_checkpoints("wise_ft", [a], tmp_path / "single", base, beta=0.25)
    assert same(read(result.outputs["beta=0.25"]), read(tmp_path / "single"))
    assert same(read(result.outputs["beta=1"]), read(base)) and same(read(result.outputs["beta=0"]), read(a))
    result = merge_checkpoints(
        "ties", [a, b], tmp_path / "grid", base, sweep={"density": [0.1, 0.9], "weight": [0.5, 1.0]}
    )
    merge_checkpoints("ties", [a, b], tmp_path / "cell", base, weights=0.5, density=0.9)
    assert same(read(result.outputs["density=0.9,weight=0.5"]), read(tmp_path / "cell"))
    assert merge_checkpoints("wise_ft", [a], tmp_path / "sweep", base, sweep={"beta": [0.0, 0.25, 1.0]}).already_done


def test_fisher_files(trio, tmp_path):
    _, a, b = trio
    files = []
    for seed in (3, 4):
        estimate = {n: t.float().square() for n, t in model(seed).items() if t.is_floating_point()}
        files.append(tmp_path / f"fisher{seed}.safetensors")
        save_file(estimate, files[-1])
    merge_checkpoints("fisher", [a, b], tmp_path / "out", weights=[1, 2], fisher=files)
    merged, x, y, f, g = read(tmp_path / "out"), read(a), read(b), *(load_file(path) for path in files)
    for name in f:
        expected = fisher([x[name].float(), y[name].float()], [f[name], g[name]], [1, 2])
        assert torch.allclose(merged[name].float(), expected, rtol=2**-8)
    with pytest.raises(UserError, match=r"lacks 1 tensors of .*: norm.weight"):
        save_file({n: t for n, t in f.items() if n != "norm.weight"}, tmp_path / "less.safetensors")
        merge_checkpoints("fisher", [a, b], tmp_path / "no", fisher=[files[0], tmp_path / "less.safetensors"])
    with pytest.raises(UserError, match="one Fisher file per model"):
        merge_checkpoints("fisher", [a, b], tmp_path / "no", fisher=files[:1])


# ---- what does not fit -------------------------------------------------------------------------------------------


def test_mismatches_are_listed_together_and_policies_exist(tmp_path):
    base = {"embed.weight": torch.zeros(4, 2), "w": torch.zeros(3), "only.base": torch.ones(2)}
    tuned = {"embed.weight": torch.ones(6, 2), "w": torch.ones(3), "extra": torch.ones(1)}
    x, y = write(tmp_path / "x", base), write(tmp_path / "y", tuned)
    with pytest.raises(UserError) as caught:
        merge_checkpoints("linear", [x, y], tmp_path / "out")
    for part in (
        "lacks 1 tensors",
        "only.base",
        "has 1 tensors",
        "extra",
        "(4, 2)",
        "(6, 2)",
        "--allow-missing",
        "--embeddings",
    ):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="a different vocabulary"):
        merge_checkpoints("linear", [x, y], tmp_path / "out", allow_missing=True)
    assert not (tmp_path / "out").exists()
    result = merge_checkpoints("linear", [x, y], tmp_path / "kept", allow_missing=True, embeddings="base")
    assert read(tmp_path / "kept")["embed.weight"].tolist() == [[0, 0]] * 4
    assert result.plan.notes() == ["kept from the base: embed.weight, only.base", "left out: extra"]
    merge_checkpoints("linear", [y, x], tmp_path / "shared", allow_missing=True, embeddings="overlap")
    assert read(tmp_path / "shared")["embed.weight"].tolist() == [[0.5, 0.5]] * 4 + [[1, 1]] * 2


def test_vocabularies_with_the_same_size_and_other_tokens(tmp_path):
    def tokenizer(*words: str) -> str:
        return json.dumps({"model": {"vocab": {word: i for i, word in enumerate(words)}}})

    x = write(tmp_path / "x", {"w": torch.zeros(3)}, **{"tokenizer.json": tokenizer("a", "b", "c")})
    y = write(tmp_path / "y", {"w": torch.zeros(3)}, **{"tokenizer.json": tokenizer("a", "c", "b")})
    with pytest.raises(UserError, match=r"vocabularies of .* differ in 2 tokens.*: 'b', 'c'"):
        merge_checkpoints("linear", [x, y], tmp_path / "out")
    merge_checkpoints("linear", [x, y], tmp_path / "out", embeddings="base")


def test_integers_must_agree_and_nan_is_named(tmp_path):
    x = write(tmp_path / "x", {"w": torch.zeros(300), "ids": torch.arange(3)})
    y = write(tmp_path / "y", {"w": torch.zeros(300), "ids": torch.arange(3) + 1})
    bad = torch.zeros(300)
    bad[17] = float("nan")
    z = write(tmp_path / "z", {"w": bad, "ids": torch.arange(3)})
    with pytest.raises(UserError, match=r"'ids' \(I64\) differs between"):
        merge_checkpoints("linear", [x, y], tmp_path / "out")
    for method in ("linear", "ties"):
        with pytest.raises(UserError, match=r"z: tensor 'w' holds NaN or inf \(1 from flat index 17 on\)"):
            merge_checkpoints(method, [x, z], tmp_path / "out", x)
    result = merge_checkpoints("linear", [x, z], tmp_path / "out", allow_nonfinite=True)
    assert result.nonfinite == {f"{z}: w": 1}
    assert torch.isnan(read(tmp_path / "out")["w"]).nonzero().tolist() == [[17]]


def test_a_tied_tensor_that_one_side_stores_twice_is_no_mismatch(tmp_path):
    tensors = {"embed.weight": torch.randn(5, 4), "w": torch.randn(3)}
    x = write(tmp_path / "x", tensors)
    y = write(tmp_path / "y", {**tensors, "lm_head.weight": tensors["embed.weight"].clone()})
    merge_checkpoints("linear", [x, y], tmp_path / "xy")
    assert same(read(tmp_path / "xy"), tensors)
    merge_checkpoints("linear", [y, x], tmp_path / "yx")
    assert torch.equal(read(tmp_path / "yx")["lm_head.weight"], tensors["embed.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "tise"}, "Did you mean 'ties'"),
        ({"method": "ties"}, "needs the base model"),
        ({"method": "linear", "densty": 1}, "no setting 'densty'"),
        ({"method": "ties", "base": "a", "density": "much"}, "density must be a number"),
        ({"method": "wise_ft", "base": "a"}, "takes 1 model, not 2"),
        ({"method": "slerp", "weights": [1, 2]}, "takes no weights"),
        ({"method": "linear", "weights": [1]}, "2 models but 1 weights"),
        ({"method": "linear", "dtype": "int8"}, "dtype 'int8'"),
        ({"method": "linear", "embeddings": "bse"}, "Did you mean 'base'"),
        ({"method": "linear", "models": ["a", "nowhere"]}, "no such file or folder"),
        ({"method": "linear", "models": ["a", "pickled"]}, "save it as safetensors"),
        ({"method": "linear", "models": ["a", "cut"]}, "is damaged or cut short"),
        ({"method": "linear", "models": ["a", "text"]}, "is not a safetensors file"),
        ({"method": "linear", "models": ["a", "lost"]}, "names 1 missing files"),
        ({"method": "linear", "out": None}, "give the output folder"),
    ],
)
def test_what_the_user_gets_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write(Path(name), {"w": torch.ones(4)})
    Path("pickled").mkdir()
    Path("pickled/pytorch_model.bin").write_bytes(b"")
    write(Path("cut"), {"w": torch.ones(4)})
    whole = Path("cut/model.safetensors").read_bytes()
    Path("cut/model.safetensors").write_bytes(whole[:-3])
    write(Path("text"), {"w": torch.ones(4)})
    Path("text/model.safetensors").write_text("version https://git-lfs")
    Path("lost").mkdir()
    Path("lost/model.safetensors.index.json").write_text('{"weight_map": {"w": "model-1.safetensors"}}')
    with pytest.raises(UserError, match=message):
        merge_checkpoints(**{"models": ["a", "b"], "out": "out", **arguments})
    assert not Path("out").exists() and not Path(".out.merging").exists()


def test_a_full_disk_is_refused_before_and_leaves_nothing_during(trio, tmp_path, monkeypatch):
    import errno

    _, a, b = trio
    full = type("Usage", (), {"free": 10})
    with monkeypatch.context() as patch:
        patch.setattr(plan_module.shutil, "disk_usage", lambda _: full)
        with pytest.raises(UserError, match=r"needs 0.00 GB, but only 0.00 GB are free"):
            merge_checkpoints("linear", [a, b], tmp_path / "out")

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(engine_module.Writer, "write", no_space)
    with pytest.raises(UserError, match="disk is full"):
        merge_checkpoints("linear", [a, b], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- interruption ------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from holdfast.merge import stage
from holdfast.merge.checkpoints import merge_checkpoints
plain, left = stage.Stage.finish_job, [int(sys.argv[4])]
def finish(self, number):
    plain(self, number)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
stage.Stage.finish_job = finish
merge_checkpoints("ties", [sys.argv[2]], sys.argv[3], sys.argv[1], threads=2, density=0.4)
"""


@pytest.mark.parametrize("jobs", [1, 3])
def test_killed_merges_continue_and_give_the_same_bytes(jobs, trio, tmp_path):
    base, a, _ = trio
    process = subprocess.run([sys.executable, "-c", KILLED, base, a, tmp_path / "out", str(jobs)], check=False)
    assert process.returncode == -9
    assert not (tmp_path / "out").exists()
    journal = tmp_path / ".out.merging" / "journal"
    journal.write_bytes(journal.read_bytes() + b"1")  # a line that was cut short does not count
    resumed = merge_checkpoints("ties", [a], tmp_path / "out", base, density=0.4)
    assert resumed.resumed and not (tmp_path / ".out.merging").exists()
    merge_checkpoints("ties", [a], tmp_path / "whole", base, density=0.4)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_changed_plan_does_not_continue_the_old_one(trio, tmp_path, monkeypatch):
    base, a, b = trio
    with monkeypatch.context() as patch:
        patch.setattr(engine_module.Engine, "_copy", lambda *_: (_ for _ in ()).throw(RuntimeError("power")))
        with pytest.raises(RuntimeError, match="power"):
            merge_checkpoints("linear", [a, b], tmp_path / "out")
    assert (tmp_path / ".out.merging").is_dir()
    assert not merge_checkpoints("wise_ft", [b], tmp_path / "out", base).resumed


def test_one_merge_at_a_time_writes_a_folder(trio, tmp_path, monkeypatch):
    _, a, b = trio
    monkeypatch.setattr(stage_module, "PATIENCE", 0.1)
    with Stage(tmp_path / "out", "x"), pytest.raises(UserError, match="another merge is writing"):
        merge_checkpoints("linear", [a, b], tmp_path / "out")


@pytest.mark.parametrize("forks", [False, True])
def test_the_number_of_workers_does_not_change_the_bytes(trio, tmp_path, monkeypatch, forks):
    monkeypatch.setattr(processes, "can_fork", lambda: forks)
    base, a, b = trio
    for threads in (1, 4):
        merge_checkpoints("dare", [a, b], tmp_path / str(threads), base, consensus="ties", threads=threads)
    assert same(read(tmp_path / "1"), read(tmp_path / "4"))
    hashes = [json.loads((tmp_path / n / "merge.json").read_text())["inputs"] for n in "14"]
    assert hashes[0] == hashes[1]


# ---- reader ------------------------------------------------------------------------------------------------------


def test_the_reader_is_a_lazy_mapping(trio):
    _, a, _ = trio
    with StateDict.open(a) as state:
        expected = read(a)
        assert same(dict(state), expected) and len(state) == 6 and "norm.weight" in state
        assert state.array("embed.weight").dtype == np.uint16
        with pytest.raises(KeyError):
            state["nothing"]
    merged = wise_ft(StateDict.open(a), expected, 0.5)
    assert same(merged, expected)
