"""check_supervised and preview agree, token for token, with what TRL's SFTTrainer trains on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from holdfast.data import check_supervised, for_tokenizer, preview, read_examples
from holdfast.data.supervision import tokenized
from holdfast.errors import UserError

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(template: str | None = None, bos: bool = False) -> PreTrainedTokenizerFast:
    """A small byte-level BPE with real merges, so that tokens can join across the prompt's end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["question answer the capital is Paris abc abcd abcde user assistant"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<pad>", "<eos>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<s>")
    fast.chat_template = template
    return fast


def trainer_for(dataset: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int, folder: Path) -> SFTTrainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    args = SFTConfig(str(folder), max_length=max_length, report_to="none", use_cpu=True, per_device_train_batch_size=8)
    return SFTTrainer(LlamaForCausalLM(config), args=args, train_dataset=dataset, processing_class=tokenizer)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIRS = [
    {"prompt": "question: the capital", "completion": " is Paris"},
    {"prompt": "abc", "completion": "de answer"},  # joins across the boundary
    {"prompt": "", "completion": "the answer"},
    {"prompt": "question " * 6, "completion": "answer " * 6},  # the answer is cut
    {"prompt": "question " * 40, "completion": "answer"},  # nothing is left of the answer
    {"prompt": "ends already:", "completion": " Paris<eos>"},
    {"prompt": "ü😀", "completion": "é"},
]
CHATS = [
    {"prompt": [user("the capital")], "completion": [assistant("Paris")]},
    {"prompt": [user("a"), assistant("b"), user("c " * 5)], "completion": [assistant("answer " * 10)]},
    {"prompt": [user("question " * 40)], "completion": [assistant("answer")]},
]
TEXTS = [{"text": "the answer is Paris"}, {"text": "abc " * 30}, {"text": "x<eos>"}]
KINDS: dict[str, tuple[list[dict[str, Any]], str | None, bool]] = {
    "pairs": (PAIRS, None, False),
    "pairs with a chat template": (PAIRS, CHATML, False),
    "pairs with bos": (PAIRS, None, True),
    "chats": (CHATS, CHATML, False),
    "texts": (TEXTS, None, False),
    "texts with bos": (TEXTS, None, True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_and_labels_as_trl(kind: str, tmp_path: Path) -> None:
    rows, template, bos = KINDS[kind]
    tokenizer, max_length = make_tokenizer(template, bos), 40
    dataset = Dataset.from_list(rows)
    report = check_supervised(dataset, tokenizer, max_length, nothing="report")
    whole = sum(len(example.ids) - example.start for example in tokenized(dataset, tokenizer))
    assert report.lost == whole - report.supervised
    ours = []
    for row, example in enumerate(tokenized(dataset, tokenizer)):
        ids = example.ids[:max_length]
        labels = [-100] * min(example.start, len(ids)) + ids[example.start :]
        if row not in report.nothing:
            ours.append({"input_ids": ids, "labels": labels})

    trained = trainer_for(dataset, tokenizer, max_length, tmp_path).train_dataset
    theirs = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in trained]
    assert ours == theirs
    assert report.rows - len(report.nothing) == len(theirs)
    assert report.supervised == sum(label != -100 for row in theirs for label in row["labels"])
    assert all(row["labels"][-1] == tokenizer.eos_token_id for row in theirs if len(row["labels"]) < max_length) or (
        kind == "chats"  # this template ends a turn with <eos> and a line break
    )


def test_the_loss_is_the_answers_mean(tmp_path: Path) -> None:
    tokenizer, dataset = make_tokenizer(), Dataset.from_list(PAIRS[:3])
    trainer = trainer_for(dataset, tokenizer, 64, tmp_path)
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    with torch.no_grad():
        theirs = float(trainer.compute_loss(trainer.model, dict(batch)))
    total, count = 0.0, 0
    for example in tokenized(dataset, tokenizer):
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            log_probs = trainer.model(ids).logits[0].log_softmax(-1)
        for position in range(max(example.start, 1), len(example.ids)):
            total -= float(log_probs[position - 1, example.ids[position]])
            count += 1
    assert theirs == pytest.approx(total / count, abs=1e-5)


def test_a_prompt_that_fills_max_length_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in [*PAIRS, PAIRS[4]]))
    dataset, tokenizer = read_examples(path), make_tokenizer()
    start = list(tokenized(dataset, tokenizer))[4].start
    expected = (
        rf"train\.jsonl:6: nothing to learn: the prompt has {start} tokens and max_length is 40, .*"
        rf"\(2 such examples, also .*train\.jsonl:9\)"
    )
    with pytest.raises(UserError, match=expected):
        check_supervised(dataset, tokenizer, 40)
    with pytest.raises(UserError, match=r"^row 1: nothing to learn"):  # derived data have lost their file
        check_supervised(dataset.select([4]), tokenizer, 40)
    assert check_supervised(dataset, tokenizer, None).truncated == 0


def test_the_boundary_is_exact() -> None:
    """A prompt of n tokens: max_length n leaves nothing, n + 1 leaves one token."""
    tokenizer, dataset = make_tokenizer(), Dataset.from_list(PAIRS[:1])
    example = next(iter(tokenized(dataset, tokenizer)))
    with pytest.raises(UserError, match="nothing to learn"):
        check_supervised(dataset, tokenizer, example.start)
    report = check_supervised(dataset, tokenizer, example.start + 1)
    assert (report.supervised, report.truncated) == (1, 1)
    assert report.lost == len(example.ids) - example.start - 1
    assert check_supervised(dataset, tokenizer, len(example.ids)).truncated == 0


def test_empty_text_has_nothing_to_learn() -> None:
    with pytest.raises(UserError, match=r"row 2: nothing to learn: of its 1 tokens none is left to predict"):
        check_supervised(Dataset.from_list([{"text": "a"}, {"text": ""}]), make_tokenizer())


def test_notes_name_what_is_odd() -> None:
    rows = [
        {"prompt": "What?That", "completion": "glued"},
        {"prompt": "Fine:", "completion": " here"},
        {"prompt": "Empty:", "completion": " "},
        {"prompt": "Long:", "completion": " answer" * 50},
    ]
    report = check_supervised(Dataset.from_list(rows), make_tokenizer(), 40)
    assert (report.glued, report.empty_answers, report.truncated) == (1, 1, 1)
    assert len(report.notes()) == 3
    clean = check_supervised(Dataset.from_list(rows[1:2]), make_tokenizer(), 40)
    assert clean.notes() == []


def test_preview_marks_the_supervised_part() -> None:
    tokenizer = make_tokenizer()
    shown = preview(Dataset.from_list(PAIRS), tokenizer, n=3)
    assert [example.where for example in shown.examples] == ["row 1", "row 4", "row 7"]
    first = shown.examples[0]
    assert [(span.text, span.supervised) for span in first.spans] == [
        ("question: the capital", False),
        (" is Paris<eos>", True),
    ]
    assert str(first) == "question: the capital⟦ is Paris<eos>⟧"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(shown)
    text = console.export_text()
    assert "⟦ is Paris<eos>⟧" in text
    assert f"loss on {first.supervised} of {first.tokens} tokens" in text


def test_preview_shows_what_max_length_cuts() -> None:
    shown = preview(Dataset.from_list(PAIRS[4:5]), make_tokenizer(), n=1, max_length=40).examples[0]
    assert shown.supervised == 0
    assert not any(span.supervised for span in shown.spans)


def test_conversations_for_a_model_without_chat_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    system = {"role": "system", "content": "Be brief."}
    dataset = Dataset.from_list([CHATS[0], {**CHATS[0], "prompt": [system, user("the capital")]}])
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        check_supervised(dataset, tokenizer)
    plain = for_tokenizer(dataset, tokenizer)
    assert plain.to_list() == [
        {"prompt": "the capital\n", "completion": "Paris"},
        {"prompt": "System: Be brief.\nUser: the capital\nAssistant: ", "completion": "Paris"},
    ]
    assert check_supervised(plain, tokenizer).rows == 2
    assert for_tokenizer(dataset, make_tokenizer(CHATML)) is dataset
    kept = for_tokenizer(Dataset.from_list([{"messages": [user("a"), assistant("b")]}]), tokenizer)
    assert kept.to_list() == [{"prompt": "a\n", "completion": "b"}]


def test_plain_conversations_keep_their_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [user("question " * 40), assistant("b")]}) + "\n")
    tokenizer = make_tokenizer()
    with pytest.raises(UserError, match=r"chat\.jsonl:1: nothing to learn"):
        check_supervised(for_tokenizer(read_examples(path), tokenizer), tokenizer, 40)


def test_a_template_that_refuses_is_one_message() -> None:
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="the chat template refuses a conversation: roles must alternate"):
        check_supervised(Dataset.from_list(CHATS), tokenizer)


def test_other_columns_are_refused() -> None:
    with pytest.raises(UserError, match=r"the data have the columns a, b; expected prompt and completion"):
        check_supervised(Dataset.from_list([{"a": "x", "b": "y"}]), make_tokenizer())
