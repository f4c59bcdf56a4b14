"""Loading models from every kind of source, with one clear message for each thing that can be wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, CLIPTextConfig, CLIPTextModel

from holdfast.errors import UserError
from holdfast.models import load_model, load_tokenizer, save_model, source_hash
from holdfast.probe import on_device


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def copy(tiny_model: Path, out: Path, without: str = "") -> Path:
    shutil.copytree(tiny_model, out)
    for file in out.glob(without) if without else ():
        file.unlink()
    return out


def test_save_and_load_give_the_same_model(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_model)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    out = save_model(model, tokenizer, tmp_path / "deep" / "out")
    again, tokenizer_again = load_model(str(out))
    assert same(model, again)
    ids = tokenizer("some text").input_ids
    assert tokenizer_again("some text").input_ids == ids
    assert load_tokenizer(out)("some text").input_ids == ids
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert source_hash(out) == source_hash(tiny_model)


def test_dtype(tiny_model: Path, tmp_path: Path) -> None:
    half, tokenizer = load_model(tiny_model, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    save_model(half, tokenizer, tmp_path / "half")
    as_stored, _ = load_model(tmp_path / "half", dtype="auto")
    assert {p.dtype for p in as_stored.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(tmp_path / "half")[0].parameters()} == {torch.float32}
    with pytest.raises(UserError, match=r"dtype: 'bfloat61' is not a weight type\. Did you mean 'bfloat16'"):
        load_model(tiny_model, dtype="bfloat61")


def test_a_state_dict_replaces_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_model)
    doubled = {name: 2 * weight for name, weight in model.state_dict().items()}
    save_model(model, tokenizer, tmp_path / "out", state_dict=doubled)
    again, _ = load_model(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in doubled.items())


def test_a_missing_pad_token_becomes_the_end_token(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy(tiny_model, tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_model(folder)[1].pad_token == "<eos>"
    assert load_tokenizer(folder).pad_token == "<eos>"


def test_a_temperature_without_sampling_does_not_stop_a_save(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy(tiny_model, tmp_path / "m")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": False, "temperature": 0.6}))
    model, tokenizer = load_model(folder)
    save_model(model, tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6


def test_old_bin_folders_are_read_without_running_code(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy(tiny_model, tmp_path / "m", without="*.safetensors")
    weights = load_file(tiny_model / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    assert same(load_model(folder)[0], load_model(tiny_model)[0])
    (folder / "pytorch_model.bin").unlink()

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({**weights, "trap": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="its weights can't be loaded"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- what can be wrong


def test_missing_paths_name_the_nearest(tiny_model: Path, tmp_path: Path) -> None:
    copy(tiny_model, tmp_path / "smollm2-135m")
    with pytest.raises(UserError, match=r"no such model folder or file\. Did you mean 'smollm2-135m'"):
        load_model(tmp_path / "smolm2-135m")
    with pytest.raises(UserError, match=r"There is no 'smolm2-135m' in .*\. Did you mean 'smollm2-135m'"):
        load_model(tmp_path / "smolm2-135m" / "checkpoint" / "model")
    with pytest.raises(UserError, match=r"nowhere\.gguf: no such model folder or file"):
        load_model("nowhere.gguf")


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local-modell").mkdir()
    with pytest.raises(UserError, match=r"model 'local-model': no such folder, and .* Did you mean 'local-modell'"):
        load_model("local-model")
    with pytest.raises(UserError, match=r"model 'someone/thing' at revision 'v1': no such folder, and "):
        load_tokenizer("someone/thing", revision="v1")
    with pytest.raises(UserError, match=r"model 'someone/thing'"):
        source_hash("someone/thing")


def test_a_folder_without_a_model_says_what_it_holds(tiny_model: Path, tmp_path: Path) -> None:
    copy(tiny_model, tmp_path / "runs" / "final")
    with pytest.raises(UserError, match=r"config\.json is missing\. It holds: final\. .* inside it: final"):
        load_model(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no model here, config\.json is missing\. It holds: nothing"):
        load_model(tmp_path / "empty")
    (tmp_path / "empty" / "a.Q4_1.gguf").touch()
    with pytest.raises(UserError, match=r"Give the file itself: .*a\.Q4_1\.gguf"):
        load_model(tmp_path / "empty")
    with pytest.raises(UserError, match=r"config\.json: a model is a folder, a \.gguf file or a hub id"):
        load_model(tiny_model / "config.json")


def test_a_folder_without_weights_says_what_it_holds(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy(tiny_model, tmp_path / "m", without="*.safetensors")
    with pytest.raises(UserError, match=r"without weights \(no \*\.safetensors\)\. It holds: config\.json, "):
        load_model(folder)


def test_a_folder_without_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy(tiny_model, tmp_path / "m", without="tokenizer*")
    with pytest.raises(UserError, match=r"without a tokenizer \(no tokenizer\.json\)"):
        load_model(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"its tokenizer can't be loaded"):
        load_model(folder)


def test_damaged_weights(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy(tiny_model, tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"m: its weights can't be loaded: "):
        load_model(folder)


def test_missing_tensors_are_never_filled_with_random_numbers(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy(tiny_model, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 parameters are not stored there, .*layers\.1\.mlp\.up_proj"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["classifier", "text encoder"])
def test_other_models_are_no_causal_lm(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = copy(tiny_model, tmp_path / "m", without="model.safetensors")
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    other = (
        BertForSequenceClassification(BertConfig(vocab_size=20, **small))
        if kind == "classifier"
        else CLIPTextModel(CLIPTextConfig(vocab_size=20, projection_dim=8, **small))
    )
    other.save_pretrained(folder)
    with pytest.raises(UserError, match=r"not a (complete )?causal language model \((Bert|CLIPText)"):
        load_model(folder)


# ---------------------------------------------------------------- LoRA


LORA = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}


def test_lora_starts_as_the_model_and_trains_the_adapter_only(tiny_model: Path) -> None:
    base, tokenizer = load_model(tiny_model)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model, _ = load_model(tiny_model, lora=LORA, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model, PeftModel)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (4, 8, {"q_proj", "v_proj"})
    ids = torch.tensor([tokenizer("some text").input_ids])
    assert torch.equal(model(ids).logits, base(ids).logits)
    again, other = (load_model(tiny_model, lora=LORA, seed=seed)[0] for seed in (3, 4))
    assert same(model, again)
    assert not same(model, other)


def test_a_saved_adapter_is_loaded_on_its_base(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_model, lora=LORA, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_model(model, tokenizer, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again, _ = load_model(tmp_path / "adapter")
    assert same(model, again)
    assert any(p.requires_grad for p in again.parameters())
    with pytest.raises(UserError, match=r"is a LoRA adapter already"):
        load_model(tmp_path / "adapter", lora=LORA)


def test_adapters_that_cannot_be_loaded(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_model, lora=LORA, seed=0)
    folder = save_model(model, tokenizer, tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())

    def rewrite(base: str | None) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))

    rewrite(str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"adapter_config\.json: its base model: .*gone: no such model folder"):
        load_model(folder)
    rewrite(None)
    with pytest.raises(UserError, match=r"adapter_config\.json: key 'base_model_name_or_path' is empty"):
        load_model(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"an adapter without weights"):
        load_model(folder)


def test_wrong_lora_settings(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"lora: unknown key 'rnak'\. Did you mean 'rank'"):
        load_model(tiny_model, lora={"rnak": 4})
    with pytest.raises(UserError, match=r"lora: .*r_proj"):
        load_model(tiny_model, lora={"targets": ["r_proj"]})
    with pytest.raises(UserError, match=r"lora: "):
        load_model(tiny_model, lora={"rank": 0})


def test_other_tuners_of_peft(tiny_model: Path) -> None:
    model, _ = load_model(tiny_model, lora={"type": "osf", "effective_rank": 0.5})
    assert str(model.peft_config["default"].peft_type.value) == "OSF"
    kappa, _ = load_model(tiny_model, lora={"rank": 2, "targets": {"kappa": 0.3}})
    linear = sum(isinstance(module, torch.nn.Linear) for module in load_model(tiny_model)[0].modules()) - 1
    targets = kappa.peft_config["default"].target_modules
    assert len(targets) == int(0.3 * linear) and "lm_head" not in targets
    with pytest.raises(UserError, match=r"lora: PEFT has no 'ofs'\. Did you mean"):
        load_model(tiny_model, lora={"type": "ofs"})
    with pytest.raises(UserError, match=r"targets must be names or \{kappa: SHARE\}"):
        load_model(tiny_model, lora={"targets": {"kappa": 2}})


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"a\.gguf: reading GGUF files needs the package 'gguf': pip install"):
        load_model(tmp_path / "a.gguf")


def test_a_model_is_moved_to_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def to(self, device: str) -> str:
            return f"on {device}"

    model: Any = Model()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert on_device(model) is model
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    moved: Any = on_device(model)
    assert moved == "on cuda"
