"""lm-eval's own driver over local YAML tasks, with this engine and with HFLM: the same results, sample by sample."""

from __future__ import annotations

import json
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast import lab
from holdfast.evaluate import PrefixSharingLM
from holdfast.evaluate.harness import run_tasks

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl, train: {folder}/shots.jsonl}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITTEN = """
task: local_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
TASKS = ["local_choice", "local_written", "local_text"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    facts = next(task for task in lab.panel() if task.kind == "choice")
    items = [
        {"question": item.prompt, "choices": [c.strip() for c in item.choices], "answer": item.answer}
        for item in facts.items[:14]
    ]
    texts = [{"text": text} for _, text in zip(range(3), lab.corpus("heldout"))]
    for name, rows in (("choice", items[:10]), ("shots", items[10:]), ("text", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in (("choice", CHOICE), ("written", WRITTEN), ("text", ROLLING)):
        (folder / f"{name}.yaml").write_text(body.format(folder=folder))
    return TaskManager(include_path=str(folder), include_defaults=False)


def answers(found: dict[str, Any], task: str) -> list[Any]:
    return [sample["filtered_resps"] for sample in sorted(found["samples"][task], key=lambda s: s["doc_id"])]


@pytest.mark.parametrize("shots", [0, 2])
def test_simple_evaluate_gives_hflms_results(tasks: TaskManager, shots: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab.model_dir(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(lab.model_dir())
    chosen = TASKS if shots == 0 else TASKS[:1]
    settings: dict[str, Any] = {
        "tasks": chosen, "num_fewshot": shots, "task_manager": tasks, "bootstrap_iters": 0, "log_samples": True,
    }  # fmt: skip
    ours, theirs = (
        lm_eval.simple_evaluate(model=lm, **settings)
        for lm in (
            PrefixSharingLM(pretrained=model, tokenizer=tokenizer),
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        )
    )
    for task in chosen:
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-5), (task, metric)
        for a, b in zip(answers(ours, task), answers(theirs, task), strict=True):
            if task == "local_written":
                assert a == b
            else:
                flat = [part[0] if isinstance(part, (list, tuple)) else part for part in a]
                other = [part[0] if isinstance(part, (list, tuple)) else part for part in b]
                assert [float(x) for x in flat] == pytest.approx([float(x) for x in other], abs=1e-4)
    assert 0 < ours["results"]["local_choice"]["acc,none"] <= 1


def test_run_tasks_leaves_training_as_it_was(tasks: TaskManager) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab.model_dir(), dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(lab.model_dir())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = run_tasks(model, tokenizer, tasks=TASKS[:1], num_fewshot=2, task_manager=tasks)
    assert found["results"]["local_choice"]["acc,none"] > 0
    assert torch.equal(torch.get_rng_state(), state) and model.training and torch.is_grad_enabled()
