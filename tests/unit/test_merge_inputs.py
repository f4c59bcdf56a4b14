"""Inputs that are not plain checkpoints: LoRA adapters against PEFT's own merge, and distributed (DCP/FSDP) folders."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.errors import UserError
from holdfast.merge import StateDict, merge_checkpoints, open_checkpoint, processes
from holdfast.merge.dcp import Piece, _runs
from holdfast.merge.scratch import Scratch


def llama(seed: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


ADAPTERS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["v_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 32},
    },
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "dora": {"target_modules": ["up_proj", "v_proj"], "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapter(base: Path, out: Path, seed: int, **settings: object) -> dict[str, torch.Tensor]:
    """Write a random adapter folder; returns the weights as PEFT merges them."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=10, **settings))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.add_(0.3 * torch.rand_like(parameter))
    model.save_pretrained(out)
    return {n: t.detach().clone() for n, t in model.merge_and_unload().state_dict().items()}


@pytest.fixture(autouse=True, params=["threads", "processes"])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every merge here, in both ways of using all cores."""
    monkeypatch.setattr(processes, "can_fork", lambda: request.param == "processes")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    llama(0).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_goes_into_its_base_as_peft_merges_it(kind, base, tmp_path):
    expected = adapter(base, tmp_path / "adapter", 1, **ADAPTERS[kind])
    merge_checkpoints("linear", [tmp_path / "adapter"], tmp_path / "out", base)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(base / "model.safetensors")
    assert set(merged) == set(original)
    assert any(not torch.equal(merged[name], original[name]) for name in merged)
    for name, tensor in merged.items():
        assert torch.allclose(tensor, expected[name], atol=2e-6), name
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_adapters_average_as_effective_weights_and_mix_with_full_models(base, tmp_path):
    a = adapter(base, tmp_path / "a", 1, **ADAPTERS["plain"])
    b = adapter(base, tmp_path / "b", 2, **ADAPTERS["patterns"])
    merge_checkpoints("linear", [tmp_path / "a", tmp_path / "b"], tmp_path / "ab")  # the base is named in the adapters
    for name, tensor in load_file(tmp_path / "ab" / "model.safetensors").items():
        assert torch.allclose(tensor, (a[name] + b[name]) / 2, atol=2e-6)
    llama(5).save_pretrained(tmp_path / "full")
    merge_checkpoints("task_arithmetic", [tmp_path / "a", tmp_path / "full"], tmp_path / "mix", base, weights=[1, 0.5])
    origin, full = load_file(base / "model.safetensors"), load_file(tmp_path / "full" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "mix" / "model.safetensors").items():
        assert torch.allclose(tensor, a[name] + 0.5 * (full[name] - origin[name]), atol=2e-6)


def test_any_stretch_of_an_adapted_tensor_reads_the_same(base, tmp_path):
    for kind in ("plain", "dora"):
        expected = adapter(base, tmp_path / kind, 1, **ADAPTERS[kind])
        source = open_checkpoint(tmp_path / kind, StateDict.open(base))
        name = "model.layers.1.mlp.down_proj.weight" if kind == "plain" else "model.layers.1.mlp.up_proj.weight"
        flat = expected[name].flatten().numpy()
        for start, stop in ((0, 1), (5, 40), (23, 25), (100, flat.size)):
            got = source.numbers(name, start, stop, np.empty(stop - start, np.float64), Scratch())
            assert np.allclose(got, flat[start:stop], atol=2e-6)


def test_adapters_that_do_not_fit(base, tmp_path):
    adapter(base, tmp_path / "a", 1, **ADAPTERS["plain"])
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "someone/model"}))
    with pytest.raises(UserError, match=r"adapter of 'someone/model'.*give the base model"):
        merge_checkpoints("linear", [tmp_path / "a"], tmp_path / "out")
    path.write_text(json.dumps({**config, "peft_type": "LOHA"}))
    with pytest.raises(UserError, match="type LOHA can't be merged"):
        merge_checkpoints("linear", [tmp_path / "a"], tmp_path / "out", base)
    path.write_text(json.dumps(config))
    (tmp_path / "other").mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(UserError, match=r"which .*other does not have"):
        merge_checkpoints("linear", [tmp_path / "a"], tmp_path / "out", tmp_path / "other")


def test_a_seq2seq_or_vision_checkpoint_is_only_names_and_shapes(tmp_path):
    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 4, 2)
            self.norm = nn.BatchNorm2d(4)  # has an integer buffer
            self.decoder = nn.TransformerDecoderLayer(8, 2, 16)

    states = []
    for name in "ab":
        (tmp_path / name).mkdir()
        states.append({n: t.clone() for n, t in Vision().state_dict().items()})
        save_file(states[-1], tmp_path / name / "model.safetensors")
    merge_checkpoints("linear", [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.allclose(
        merged["patch.weight"], (states[0]["patch.weight"] + states[1]["patch.weight"]) / 2, atol=1e-7
    )
    assert merged["norm.num_batches_tracked"].dtype == torch.int64
    Vision().load_state_dict(merged)


# ---- distributed checkpoints -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_distributed_folder_merges_with_a_plain_one(dtype, tmp_path):
    plain, other = llama(1, dtype), llama(2, dtype)
    plain.save_pretrained(tmp_path / "plain")
    state = other.state_dict()
    dcp.save({"model": state}, checkpoint_id=tmp_path / "dcp")
    merge_checkpoints("wise_ft", [tmp_path / "dcp"], tmp_path / "out", tmp_path / "plain", alpha=1.0)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, state[name]), name
    result = merge_checkpoints("linear", [tmp_path / "dcp"], tmp_path / "alone")
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    assert set(alone) == set(state) and all(torch.equal(alone[n], state[n]) for n in state)
    assert result.plan.shards[0].name == "model.safetensors"


@pytest.mark.parametrize("cut", [(2, 1, 1), (1, 3, 1), (1, 1, 2), (2, 2, 2)])
def test_every_number_of_a_sharded_tensor_is_found_once(cut):
    shape = (4, 6, 4)
    whole = np.arange(np.prod(shape)).reshape(shape)
    steps = [n // c for n, c in zip(shape, cut)]
    pieces = []
    for corner in itertools.product(*(range(0, n, step) for n, step in zip(shape, steps))):
        box = tuple(slice(c, c + s) for c, s in zip(corner, steps))
        pieces.append((Piece(corner, tuple(steps), Path(), 0), whole[box].ravel()))
    for start, stop in ((0, 96), (7, 8), (10, 71)):
        out = np.full(stop - start, -1)
        for piece, numbers in pieces:
            for low, high, offset in _runs(piece, shape, start, stop):
                assert (out[low - start : high - start] == -1).all()
                out[low - start : high - start] = numbers[offset : offset + high - low]
        assert out.tolist() == list(range(start, stop))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Bad()))
    with pytest.raises(UserError, match="not safe to load"):
        open_checkpoint(tmp_path / "dcp")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"junk")
    with pytest.raises(UserError, match="is not the metadata"):
        open_checkpoint(tmp_path / "dcp")


SHARDED = """
import os, sys
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(os.environ["RANK"]), world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
full = {"rows": torch.randn(7, 3), "columns": torch.randn(4, 6).bfloat16(), "whole": torch.randn(5)}
cuts = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate()}
dcp.save({name: distribute_tensor(t, mesh, [cuts[name]]) for name, t in full.items()}, checkpoint_id=sys.argv[1])
if dist.get_rank() == 0:
    torch.save(full, sys.argv[1] + ".full")
dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_shards_of_two_ranks_are_put_together(tmp_path):
    out = tmp_path / "dcp"
    commands = [sys.executable, "-c", SHARDED, str(out), str(tmp_path / "meet")]
    ranks = [subprocess.Popen(commands, env={**os.environ, "RANK": str(rank)}) for rank in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    assert len(list(out.glob("*.distcp"))) == 2
    full = torch.load(f"{out}.full", weights_only=True)
    merge_checkpoints("linear", [out], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == full.keys() and all(torch.equal(merged[name], full[name]) for name in full)
