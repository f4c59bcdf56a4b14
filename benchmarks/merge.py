"""Merging side by side with mergekit: time, peak memory and the numbers themselves, on the same inputs in one run.

    python benchmarks/merge.py --peer-python PEER/bin/python --work /tmp/merge-bench

The peer is an environment with mergekit installed; without it only holdfast is measured. The checkpoints are random
bfloat16 weights in the shapes of a 135M-parameter Llama, and two sharded ones of 3 GB; all are removed at the end.
Times are wall-clock of the whole command, so they include starting Python and importing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from holdfast.merge import StateDict

SHAPES = {"hidden": 576, "mlp": 1536, "layers": 30, "kv": 192, "vocab": 49152}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "tie_word_embeddings": True, "dtype": "bfloat16", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WRITE_TEN = """
import os, sys
block, (size, folder) = os.urandom(1 << 20), sys.argv[1:]
os.makedirs(folder)
for i in range(10):
    with open(os.path.join(folder, str(i)), "wb", buffering=0) as file:
        for _ in range(int(size) >> 20):
            file.write(block)
"""
LINEAR_WEIGHTS, ARITHMETIC_WEIGHTS, DENSITY = [0.3, 0.7], [0.4, 0.3, 0.6], 0.2


def llama(hidden: int, mlp: int, layers: int, kv: int, vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors."""
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield f"{at}self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{at}mlp.gate_proj.weight", (mlp, hidden)
        yield f"{at}mlp.up_proj.weight", (mlp, hidden)
        yield f"{at}mlp.down_proj.weight", (hidden, mlp)
        yield f"{at}input_layernorm.weight", (hidden,)
        yield f"{at}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


def make_small(folder: Path, models: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> list[Path]:
    """A base and models around it, as bfloat16 checkpoints; in float32, no two magnitudes tie at TIES's threshold."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in llama(**SHAPES)}
    paths = []
    for i in range(models + 1):
        path = folder / f"model{i}"
        path.mkdir(parents=True)
        noise = 0.002 if i else 0.0
        tensors = {n: (t + noise * torch.randn(t.shape, generator=generator)).to(dtype) for n, t in base.items()}
        if i and dtype == torch.float32:
            for name, tensor in tensors.items():
                untie(tensor, base[name])
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(CONFIG))
        paths.append(path)
    return paths


def untie(model: torch.Tensor, base: torch.Tensor) -> None:
    """Move numbers of the model until exactly k of them are as far from the base as the k-th farthest."""
    keep = max(1, int(DENSITY * base.numel()))
    while True:
        size = (model - base).abs()
        threshold = size.flatten().kthvalue(base.numel() - keep + 1).values
        if int((size >= threshold).sum()) == keep:
            return
        tied = size == threshold
        tied.view(-1)[int(tied.flatten().int().argmax())] = False  # one stays, the others move away from the base
        model[tied] += 0.01 * (model - base)[tied]


def make_large(folder: Path, gigabytes: float, seed: int) -> Path:
    """A sharded bfloat16 checkpoint of about that size; the values repeat, the bytes are real."""
    folder.mkdir(parents=True)
    block = (0.05 * torch.randn(4096, 4096, generator=torch.Generator().manual_seed(seed))).bfloat16()
    count, shards, weight_map = round(gigabytes * 1e9 / block.nbytes), 6, {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {f"layers.{i}.weight": block.roll(i, 0).clone() for i in range(shard, count, shards)}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": count * block.nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


class Run(NamedTuple):
    """What one command cost. CPU seconds hardly depend on what else the machine does."""

    seconds: float
    memory: float
    cpu: float


# A child's peak memory starts at that of the process that forked it, so a small process stands in between. It adds up
# the resident memory of the child and its children, which counts twice what they share.
LAUNCHER = """
import json, os, sys, time
def resident(process):
    try:
        with open(f"/proc/{process}/statm") as file:
            pages = int(file.read().split()[1])
        with open(f"/proc/{process}/task/{process}/children") as file:
            return pages + sum(map(resident, file.read().split()))
    except OSError:
        return 0
started, peak, done = time.perf_counter(), 0, 0
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
while not done:
    peak = max(peak, resident(child))
    time.sleep(0.01)
    done, status, usage = os.wait4(child, os.WNOHANG)
seconds = time.perf_counter() - started
memory = max(usage.ru_maxrss * 1024, peak * os.sysconf("SC_PAGE_SIZE"))
print(json.dumps([seconds, memory / 1e9, usage.ru_utime + usage.ru_stime, status]))
"""


def run(command: list[str | Path], out: Path | None = None) -> Run:
    """Wall seconds, peak resident memory (GB) and CPU seconds of a command; ``out`` is removed first."""
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
    words = [shutil.which(str(command[0])) or str(command[0]), *map(str, command[1:])]
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *words], capture_output=True, text=True, check=True)
    seconds, memory, cpu, status = json.loads(done.stdout.splitlines()[-1])
    if status:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return Run(seconds, memory, cpu)


def holdfast(*words: str | Path) -> list[str | Path]:
    """The command line in this environment."""
    return [Path(sys.executable).with_name("holdfast"), "merge", *words]


def peer_config(
    method: str, base: Path, models: list[Path], weights: list[float], path: Path, dtype: str = "float32"
) -> Path:
    """mergekit's YAML (JSON is YAML) for the same merge, computed in ``dtype``."""
    entries = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, weights)]
    config: dict[str, object] = {"merge_method": method, "models": entries, "dtype": dtype, "out_dtype": "bfloat16"}
    if method != "linear":
        config["base_model"] = str(base)
    if method == "ties":
        config["parameters"] = {"density": DENSITY}
    path.write_text(json.dumps(config))
    return path


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of bfloat16 bit patterns in units of the last place."""
    x, y = (np.where(bits & 0x8000, 0x8000 - bits.astype(np.int32), bits.astype(np.int32)) for bits in (a, b))
    return np.abs(x - y)


def decoded(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def compare(ours: Path, theirs: Path, inputs: list[Path], density: float | None) -> str:
    """How far two results are apart, and why where it is more than one ulp.

    Two reasons are harmless. Cancellation: the merged number is so near 0 that the inputs' float32 rounding shows
    (difference at most 2^-22 of the inputs' magnitudes). Ties: a magnitude equals the trim threshold exactly, and an
    unstable sort may keep any of the equal ones.
    """
    counts = dict.fromkeys(("equal", "one", "cancelled", "tied", "unexplained", "all"), 0)
    with contextlib.ExitStack() as stack:
        first, second, *rest = (stack.enter_context(StateDict.open(path)) for path in (ours, theirs, *inputs))
        for name in first:
            a, b = first.array(name), second.array(name)
            distance = ulps(a, b)
            far = distance > 1
            values = [decoded(one.array(name)) for one in rest]
            scale = sum(np.abs(value) for value in values)
            cancelled = far & (np.abs(decoded(a) - decoded(b)) <= 2.0**-22 * scale)
            tied = np.zeros(far.shape, bool)
            if density is not None:
                for value in values[1:]:
                    size = np.abs(value - values[0])
                    keep = max(1, int(density * size.size))
                    tied |= size == np.partition(size.ravel(), size.size - keep)[size.size - keep]
            tied &= far & ~cancelled
            found = (distance == 0, distance == 1, cancelled, tied, far & ~cancelled & ~tied, np.ones_like(far))
            for key, mask in zip(counts, found):
                counts[key] += int(mask.sum())
    return (
        f"{counts['equal'] / counts['all']:.4%} identical, {counts['one']} of {counts['all']} differ by 1 ulp, "
        f"{counts['cancelled']} by more after cancellation, {counts['tied']} at tied thresholds, "
        f"{counts['unexplained']} unexplained"
    )


def spread(values: list[float], unit: str = "s") -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} {unit} ({min(values):.2f}-{max(values):.2f})"


def cost(runs: list[Run]) -> str:
    """Wall and CPU seconds, peak memory."""
    peak = max(one.memory for one in runs)
    return f"{spread([one.seconds for one in runs])}, {spread([one.cpu for one in runs])} of CPU, peak {peak:.3f} GB"


def against_peer(paths: list[Path], work: Path, peer: Path | None, repeats: int) -> None:
    """The three methods that both have, alternating."""
    base, *models = paths
    cases = [
        ("linear", models[:2], LINEAR_WEIGHTS, []),
        ("task_arithmetic", models, ARITHMETIC_WEIGHTS, ["--base", base]),
        ("ties", models, [1.0, 1.0, 1.0], ["--base", base, f"density={DENSITY}"]),
    ]
    for method, chosen, weights, extra in cases:
        mine, theirs = work / f"{method}-holdfast", work / f"{method}-mergekit"
        ours_runs, peer_runs = [], []
        weight = ",".join(map(str, weights))
        for _ in range(repeats):
            ours_runs.append(run(holdfast(method, *chosen, "--weight", weight, "--out", mine, *extra), mine))
            if peer:
                config = peer_config(method, base, chosen, weights, work / "peer.yaml")
                peer_runs.append(
                    run([peer, "-m", "mergekit.scripts.run_yaml", config, theirs, "--no-copy-tokenizer"], theirs)
                )
        print(f"{method} of {len(chosen)} x 135M")
        print(f"  holdfast {cost(ours_runs)}")
        if peer:
            wall, cpu = (
                statistics.median([one[i] for one in peer_runs]) / statistics.median([one[i] for one in ours_runs])
                for i in (0, 2)
            )
            print(f"  mergekit {cost(peer_runs)}")
            print(f"  {wall:.1f}x faster, {cpu:.1f}x less CPU")
            print(f"  {compare(mine, theirs, paths, DENSITY if method == 'ties' else None)}")


def identical(paths: list[Path], work: Path, peer: Path) -> None:
    """The same merges where both programs' arithmetic leaves nothing to chance.

    Weights that binary floating point holds exactly, mergekit in float64 as holdfast sums, and for TIES float32 models
    in which no magnitude ties at the threshold.
    """
    untied = make_small(work / "untied", len(paths) - 1, seed=1, dtype=torch.float32)
    cases = [
        ("linear", paths, 2, [0.25, 0.75], "float64"),
        ("task_arithmetic", paths, 3, [0.5, 0.25, 0.625], "float64"),
        ("ties", untied, 3, [1.0, 1.0, 1.0], "float32"),
    ]
    for method, (base, *models), count, weights, dtype in cases:
        mine, theirs = work / "mine", work / "theirs"
        extra = [] if method == "linear" else ["--base", base]
        extra += [f"density={DENSITY}", "--dtype", "bfloat16"] if method == "ties" else []
        weight = ",".join(map(str, weights))
        run(holdfast(method, *models[:count], "--weight", weight, "--out", mine, *extra), mine)
        config = peer_config(method, base, models[:count], weights, work / "peer.yaml", dtype)
        run([peer, "-m", "mergekit.scripts.run_yaml", config, theirs, "--no-copy-tokenizer"], theirs)
        with StateDict.open(mine) as first, StateDict.open(theirs) as second:
            distance = [ulps(first.array(name), second.array(name)) for name in first]
        total, apart = sum(d.size for d in distance), sum(int((d > 0).sum()) for d in distance)
        worst = max(int(d.max()) for d in distance)
        print(f"{method}, nothing left to chance: {apart} of {total} differ, by at most {worst} ulp")


def model_scope(paths: list[Path], work: Path) -> None:
    """TIES over the whole model against the paper's formula, computed plainly over the concatenated task vectors."""
    base, *models = paths
    out = work / "ties-model"
    seconds, memory, _ = run(
        holdfast("ties", *models, "--base", base, "--out", out, f"density={DENSITY}", "scope=model"), out
    )
    with StateDict.open(base) as origin:
        names = list(origin)
        theta = {name: origin[name].float() for name in names}
    thresholds, tuned = [], []
    for path in models:
        with StateDict.open(path) as opened:
            deltas = {name: opened[name].float() - theta[name] for name in names}
        flat = torch.cat([deltas[name].abs().flatten() for name in names]).numpy()
        keep = int(DENSITY * flat.size)
        flat.partition(flat.size - keep)
        thresholds.append(float(flat[flat.size - keep]))
        tuned.append(
            {
                name: delta.bfloat16() if bool((delta.bfloat16() == delta).all()) else delta
                for name, delta in deltas.items()
            }
        )
    worst, equal, total = 0, 0, 0
    with StateDict.open(out) as merged:
        for name in names:
            kept = torch.stack([d[name].float() * (d[name].float().abs() >= t) for d, t in zip(tuned, thresholds)])
            elected = kept.sum(0).sign()
            agree = kept.sign() == elected
            mean = (kept * agree).sum(0) / (agree & (kept != 0)).sum(0).clamp(min=1)
            expected = (theta[name] + mean).bfloat16().view(torch.int16).numpy().view(np.uint16)
            distance = ulps(merged.array(name), expected)
            worst, equal, total = (
                max(worst, int(distance.max())),
                equal + int((distance == 0).sum()),
                total + distance.size,
            )
    print(f"ties scope=model: {seconds:.2f} s, peak {memory:.3f} GB")
    print(f"  against the paper's formula: max {worst} ulp, {equal / total:.4%} identical")


def sweep(paths: list[Path], work: Path, repeats: int) -> None:
    """Ten values of beta in one pass, against one merge and against writing the same ten files."""
    base, tuned = paths[:2]
    one, many, copies = work / "one", work / "many", work / "copies"
    single, swept, writing = [], [], []
    for _ in range(repeats):
        single.append(run(holdfast("wise_ft", tuned, "--base", base, "--out", one, "beta=0.3"), one)[0])
        swept.append(
            run(holdfast("wise_ft", tuned, "--base", base, "--out", many, "--sweep", "beta=0.05:0.95:0.1"), many)
        )
        sizes = (one / "model.safetensors").stat().st_size
        writing.append(run([sys.executable, "-c", WRITE_TEN, str(sizes), copies], copies)[0])
        shutil.rmtree(copies)
    seconds = [s for s, *_ in swept]
    assert len(list(many.glob("beta=*/model.safetensors"))) == 10
    print(f"beta sweep of 10: {spread(seconds)}, peak {max(m for _, m, _ in swept):.3f} GB")
    print(f"  one merge {spread(single)}, writing 10 files {spread(writing)}; 2 x one + writing = "
          f"{2 * statistics.median(single) + statistics.median(writing):.2f} s")  # fmt: skip
    shutil.rmtree(many)


def large(work: Path, gigabytes: float, repeats: int) -> None:
    """Two large sharded checkpoints against cp of the same bytes."""
    inputs = [make_large(work / f"large{i}", gigabytes, seed=i) for i in range(2)]
    out, copy = work / "large-merged", work / "large-copy"
    merges, copies = [], []
    for _ in range(repeats):
        copy.mkdir()
        copies.append(run(["cp", "-r", *inputs, copy]))
        shutil.rmtree(copy)
        merges.append(run(holdfast("linear", *inputs, "--out", out), out))
        shutil.rmtree(out)
    size = sum(path.stat().st_size for folder in inputs for path in folder.iterdir()) / 1e9
    merge_s, copy_s = (statistics.median([s for s, *_ in runs]) for runs in (merges, copies))
    peak = max(m for _, m, _ in merges)
    print(f"linear of 2 x {gigabytes} GB sharded: {spread([s for s, *_ in merges])}, peak {peak:.3f} GB")
    print(f"  cp of the same {size:.1f} GB: {spread([s for s, *_ in copies])}")
    # A merge of two reads two and writes one; cp reads two and writes two.
    for what, ours, theirs in (("input", 1.0, 1.0), ("read and written", 1.5, 2.0)):
        mine, cp = ours * size / merge_s, theirs * size / copy_s
        print(f"  bytes {what}: merge {mine:.2f} GB/s, cp {cp:.2f} GB/s: {mine / cp:.0%}")


def killed(paths: list[Path], work: Path) -> None:
    """kill -9 in the middle, run again, compare the bytes with those of an undisturbed run."""
    base, *models = paths
    whole, broken = work / "whole", work / "broken"
    words = ["ties", *models, "--base", base, f"density={DENSITY}", "--out"]
    run(holdfast(*words, whole), whole)
    process = subprocess.Popen([str(word) for word in holdfast(*words, broken)], stdout=subprocess.DEVNULL)
    journal = work / ".broken.merging" / "journal"
    while process.poll() is None and not (journal.is_file() and journal.stat().st_size > 100):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(journal.read_text().splitlines()) if journal.is_file() else 0
    looks_finished = broken.exists()
    run(holdfast(*words, broken))
    same = (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    print(f"kill -9 after {before} of the jobs: output folder existed {looks_finished}, rerun byte-identical {same}")


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="Python of an environment with mergekit")
    parser.add_argument("--work", type=Path, required=True, help="empty scratch folder, removed at the end (25 GB)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of each large checkpoint")
    parser.add_argument("--only", nargs="*", default=["peer", "identical", "model", "sweep", "killed", "large"])
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    try:
        if set(options.only) - {"large"}:
            paths = make_small(options.work, 3, seed=0)
            if "peer" in options.only:
                against_peer(paths, options.work, options.peer_python, options.repeats)
            if "identical" in options.only and options.peer_python:
                identical(paths, options.work, options.peer_python)
            if "model" in options.only:
                model_scope(paths, options.work)
            if "sweep" in options.only:
                sweep(paths, options.work, options.repeats)
            if "killed" in options.only:
                killed(paths, options.work)
        if "large" in options.only:
            large(options.work, options.gigabytes, options.repeats)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)


if __name__ == "__main__":
    main()
