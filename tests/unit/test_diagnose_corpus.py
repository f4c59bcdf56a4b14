"""Corpus readers, the contamination check, and selection against a plain sort."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pandas as pd
import pytest

from holdfast.diagnose.contamination import Benchmarks, overlap
from holdfast.diagnose.corpus import Passage, read_passages
from holdfast.diagnose.ranking import BLOCK, RECORD, ScoreLog, rank
from holdfast.diagnose.selection import Chosen, Lowest, is_probe, select
from holdfast.errors import UserError
from holdfast.evaluate.tasks import EvalTask, Item


def texts(source: Path, **options: object) -> list[str]:
    return [passage.text for passage in read_passages(source, **options)]  # type: ignore[arg-type]


def words(count: int, start: int = 0) -> str:
    return " ".join(f"w{index}" for index in range(start, start + count))


def test_every_format_gives_the_same_documents(tmp_path):
    rows = [{"id": 1, "text": "The first document."}, {"id": 2, "text": "The second one, ünïcode."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, rows)))
    expected = [row["text"] for row in rows]
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"):
        assert texts(tmp_path / name) == expected, name
    assert texts(tmp_path) == expected * 5  # the folder


def test_lines_are_joined_and_long_ones_cut(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(f"{words(3)}\n\n{words(4)}\n{words(5)}\n{words(23)}\n{words(2)}\n")
    passages = list(read_passages(file, passage_words=10))
    assert [len(passage.text.split()) for passage in passages] == [7, 5, 10, 10, 3, 2]
    assert passages[0].place.endswith("a.txt:1") and passages[1].place.endswith("a.txt:4")


def test_equal_texts_have_equal_keys():
    assert Passage("a  b\nc", "x").key == Passage(" a b c ", "y").key != Passage("a b d", "x").key


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "ok"}\n{"text": ', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"content": "x", "texts": "y"}\n', r"a.jsonl:1: no column 'text'. Did you mean 'texts'"),
        ("a.txt", "\n \n", "no text"),
        ("a.pdf", "x", "ends in"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        texts(tmp_path / name)


def test_missing_and_broken_sources(tmp_path):
    with pytest.raises(UserError, match="no such corpus"):
        texts(tmp_path / "nothing.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(UserError, match="UTF-8"):
        texts(tmp_path / "a.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no text in this folder"):
        texts(tmp_path / "empty")


QUESTION = "What is the name of the large river that runs through the middle of the old town and its harbour"


def task(items: tuple[Item, ...]) -> EvalTask:
    return EvalTask("rivers", "choice", items)


def test_contamination_finds_an_item_inside_a_passage_only():
    items = tuple(Item(f"q{i}", f"Answer this. {words(20, 100 * i)}?", (" a", " b"), 0) for i in range(30))
    items += (Item("river", f"Answer this. {QUESTION}?", (" Elbe", " Main"), 1),)
    clean = f"{words(12, 0)} and {words(12, 50)}"
    found = overlap([clean, f"Before. {QUESTION.upper()}, after.", clean], [task(items)])
    assert found["passages"] == 1 and found["items"] == 1
    assert found["examples"][0]["item"] == "river" and found["examples"][0]["passage"] == "1"  # type: ignore[index]


def test_contamination_ignores_templates_and_looks_for_short_items_whole():
    template = "The following is a multiple choice question about geography with exactly four answers to choose from"
    items = tuple(Item(f"q{i}", f"{template}. {words(8, 50 * i)}", (" a", " b"), 0) for i in range(30))
    assert overlap([template + " indeed"], [task(items)])["passages"] == 0
    short = (Item("capital", "The capital of France is", (" Rome", " Paris"), 1),)
    assert overlap(["they say the capital of France is Paris, and so on"], [task(short)])["passages"] == 1
    assert overlap(["they say the capital of France is Rome, and so on"], [task(short)])["passages"] == 0
    with pytest.raises(UserError, match="5 or more"):
        Benchmarks([task(short)], ngram=3)


def corpus(count: int, seed: int = 0) -> list[Passage]:
    rng = random.Random(seed)
    numbered = (f"passage {rng.randrange(count * 3)} {words(rng.randrange(1, 9))}" for _ in range(count))
    return [Passage(text, f"row {index}") for index, text in enumerate(numbered)]


def fake_scores(batch: list[str]) -> list[tuple[float, int]]:
    return [((Passage(text, "").key % 10_007) / 1000 * len(text.split()), len(text.split())) for text in batch]


def ranked(passages: list[Passage], folder: Path) -> ScoreLog:
    log = ScoreLog(folder, {"corpus": "test"})
    rank(passages, fake_scores, log)
    return log


def test_selection_is_the_head_of_the_sorted_corpus(tmp_path):
    passages = corpus(3000)
    log = ranked(passages, tmp_path)
    found = select(passages, log, tokens=2000, probe_tokens=400)
    unique = {passage.key: passage for passage in passages}.values()
    scores = {p.key: score for p, score in zip(unique, fake_scores([p.text for p in unique]))}

    def head(keys: list[int], budget: int) -> list[int]:
        taken, total = [], 0
        for key in sorted(keys, key=lambda key: (math.exp(scores[key][0] / scores[key][1]), key)):
            if total + scores[key][1] > budget:
                break
            taken.append(key)
            total += scores[key][1]
        return taken

    assert [c.key for c in found.restoring] == head([key for key in scores if not is_probe(key)], 2000)
    assert [c.key for c in found.probing] == head([key for key in scores if is_probe(key)], 400)
    assert not {c.key for c in found.restoring} & {c.key for c in found.probing}
    assert found.account["restoring"]["tokens"] <= 2000


@pytest.mark.parametrize("seed", range(20))
def test_lowest_is_the_longest_prefix_that_fits_in_any_order(seed):
    rng = random.Random(seed)
    chosen = [Chosen(rng.random(), key, rng.randrange(1, 30), "", "") for key in range(200)]
    lowest = Lowest(300)
    for entry in chosen:
        lowest.add(entry)
        lowest.add(entry)  # a duplicate
    prefix, total = [], 0
    for entry in sorted(chosen, key=lambda entry: entry.perplexity):
        if total + entry.tokens > 300:
            break
        prefix.append(entry)
        total += entry.tokens
    assert lowest.ranked() == prefix and lowest.tokens == total


def test_duplicates_are_scored_once(tmp_path):
    passages = corpus(500) * 3
    scored: list[str] = []
    log = ScoreLog(tmp_path, {})
    rank(passages, lambda batch: (scored.extend(batch), fake_scores(list(batch)))[1], log)
    assert len(scored) == len(set(scored)) == len({p.key for p in passages})
    assert len(log) == 1500


def test_contaminated_passages_are_left_out_and_reported(tmp_path):
    passages = [*corpus(300), Passage(QUESTION + " is the Main", "row bad")]
    log = ranked(passages, tmp_path)
    benchmarks = Benchmarks([task((Item("river", QUESTION, (" Elbe", " Main"), 1),))])
    found = select(passages, log, tokens=1000, probe_tokens=100, benchmarks=benchmarks)
    assert found.account["contamination"]["passages"] == 1
    assert found.account["contamination"]["examples"][0]["passage"] == "row bad"
    kept = select(passages, log, tokens=1000, probe_tokens=100, benchmarks=benchmarks, keep_contaminated=True)
    assert kept.account["tokens_available"] + 0 >= found.account["tokens_available"]
    assert not any("old town" in c.text for c in found.restoring + found.probing)


def test_a_corpus_smaller_than_the_budget_says_both_numbers(tmp_path):
    passages = corpus(100)
    log = ranked(passages, tmp_path)
    with pytest.raises(UserError, match=r"smaller than the budget: \d+ tokens .* 1,000,000 are"):
        select(passages, log, tokens=1_000_000)


def test_a_changed_corpus_or_setting_is_refused(tmp_path):
    passages = corpus(600)
    log = ScoreLog(tmp_path, {"model": "a"})

    def stops(batch: list[str]) -> list[tuple[float, int]]:
        if len(log) >= BLOCK:
            raise KeyboardInterrupt
        return fake_scores(batch)

    with pytest.raises(KeyboardInterrupt):
        rank(passages, stops, log)
    with pytest.raises(UserError, match="changed since"):
        rank(passages[1:], fake_scores, ScoreLog(tmp_path, {"model": "a"}))
    with pytest.raises(UserError, match="another model"):
        ScoreLog(tmp_path, {"model": "b"})


def test_a_corpus_that_grew_or_shrank_since_its_ranking_is_refused(tmp_path):
    passages = corpus(300)
    log = ranked(passages, tmp_path)
    for changed in (passages[:-1], [*passages, Passage("one more", "row")], [passages[1], passages[0], *passages[2:]]):
        with pytest.raises(UserError, match="ranked"):
            select(changed, log, tokens=100)


def test_a_torn_record_is_dropped_and_the_ranking_goes_on(tmp_path):
    passages = corpus(700)
    whole = ranked(passages, tmp_path / "whole")
    log = ranked(passages, tmp_path / "torn")
    data = log.path.read_bytes()
    log.path.write_bytes(data[: 300 * RECORD.itemsize + 7])
    log.header.write_text(log.header.read_text().replace("true", "false"))
    again = ScoreLog(tmp_path / "torn", {"corpus": "test"})
    assert len(again) == 300
    rank(passages, fake_scores, again)
    assert list(again) == list(whole)


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_diagnose_corpus import corpus, fake_scores
from holdfast.diagnose.ranking import ScoreLog, rank
def slow(batch):
    time.sleep(0.02)
    with open({journal!r}, "a") as file:
        file.write("".join(text + "\\n" for text in batch))
    return fake_scores(batch)
rank(corpus(8000), slow, ScoreLog(Path({folder!r}), {{}}))
"""


def test_killed_at_random_it_never_scores_again_what_was_saved(tmp_path):
    folder, journal = tmp_path / "log", tmp_path / "scored.txt"
    script = textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent), journal=str(journal), folder=str(folder))
    saved: list[int] = []
    scores = folder / "scores.bin"
    for kill_after in (1, 9, 17, None):
        process = subprocess.Popen([sys.executable, "-c", script])
        if kill_after is None:
            assert process.wait(60) == 0
        else:
            deadline = time.time() + 60
            while time.time() < deadline and process.poll() is None:
                if scores.exists() and scores.stat().st_size >= kill_after * BLOCK * RECORD.itemsize:
                    break
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            saved.append(scores.stat().st_size // RECORD.itemsize)
    assert saved == sorted(saved) and saved[0] > 0
    lines = journal.read_text().splitlines()
    twice = len(lines) - len(set(lines))
    assert twice <= 3 * BLOCK  # at most the block in flight at each kill
    first_saved = {Passage(p.text, "").key for p in corpus(8000)[: saved[0]]}
    repeated = {line for line in lines if lines.count(line) > 1} if twice else set()
    assert not {Passage(line, "").key for line in repeated} & first_saved
    whole = ScoreLog(tmp_path / "whole", {})
    rank(corpus(8000), fake_scores, whole)
    assert list(ScoreLog(folder, {})) == list(whole)
