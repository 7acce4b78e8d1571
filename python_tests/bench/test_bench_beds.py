"""The beds of the quality bench: what they ask, what they cache, what they score."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from ardlora_ext.bench.quality.beds import encoder_book, phonebook, play, tasks, tiny
from ardlora_ext.bench.quality.methods import parse
from ardlora_ext.bench.quality.trial import run_trial
from ardlora_ext.errors import InputError
from ardlora_ext.train.packages import MINILM, DatasetUnavailable, fetch


def test_sequences_have_the_right_answers() -> None:
    for mix in ("A", "B"):
        for row in tiny.sequences(mix, 50, torch.Generator().manual_seed(0)).tolist():
            kind, x, y = row[0] - 10, row[1:7], row[8:]
            sign = 1 if mix == "A" else -1
            answers = (x[::sign], sorted(x, reverse=mix == "B"), [(d + sign * x[0]) % 3 for d in x])
            assert y == answers[kind]


def test_tiny_bed_caches_its_base_and_recovers_between_its_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARDLORA_CACHE", str(tmp_path))
    bed = tiny.TinyBed(width=16, heads=2, depth=1, steps=100, pretrain_steps=60, eval_rows=64)
    first = run_trial(bed, parse("lora"), 1e-2, seed=0)
    assert len(list(tmp_path.glob("bench/tiny-*.safetensors"))) == 2
    monkeypatch.setattr(tiny, "train_fully", None)  # from the cache now
    again = run_trial(bed, parse("lora"), 1e-2, seed=0)
    assert {**first, "seconds": 0, "spearman": 0} == {**again, "seconds": 0, "spearman": 0}
    assert 0.0 < first["recovered"] < 2.0
    assert first["params"] == 2 * 32 * 6
    assert run_trial(bed, parse("oracle"), 1e-2, seed=0)["spearman"] == pytest.approx(1.0)


def test_phonebook_stores_what_it_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARDLORA_CACHE", str(tmp_path))
    book = phonebook.phonebook(300, torch.Generator().manual_seed(0))
    assert len({tuple(key) for key in book[:, :4].tolist()}) == 300
    assert (
        0 <= int(book[:, :4].min()) <= int(book[:, :4].max()) < 16 <= int(book[:, 4:].min()) <= book[:, 4:].max() < 26
    )
    bed = phonebook.PhonebookBed(pairs=30, width=16, heads=2, depth=1, steps=80, pretrain_steps=150)
    small = run_trial(bed, parse("lora"), 1e-2, seed=0)
    assert len(list(tmp_path.glob("bench/phonebook-*.safetensors"))) == 1
    monkeypatch.setattr(phonebook, "learn", None)  # from the cache now
    assert run_trial(bed, parse("lora"), 1e-2, seed=0) | {"seconds": 0} == small | {"seconds": 0}
    large = run_trial(bed, parse("lora:rank=16"), 1e-2, seed=0)
    assert 0.0 <= large["bits"] < small["bits"]
    assert 0.0 <= small["recall"] < large["recall"] <= 1.0
    assert small["params"] == 2 * 16 * 6


NOUNS = """\
  1 licence text
00000001 03 n 01 entity 0 001 ~ 00000002 n 0000 | that which exists
00000002 05 n 02 animal 0 beast 0 001 @ 00000001 n 0000 | a living thing; "it moved"
00000003 05 n 01 house_cat 0 002 @ 00000002 n 0000 ~ 00000009 n 0000 | a feline
00000004 05 n 01 tool 0 001 @ 00000001 n 0000 | used to work
00000005 05 n 01 saw 0 001 @ 00000004 n 0000 | it cuts
00000006 05 n 01 Tom 0 001 @i 00000003 n 0000 | a well known cat
"""


def test_kind_pairs_are_true_and_false_as_they_say() -> None:
    nouns = tasks.parse_nouns(NOUNS.splitlines())
    assert nouns["00000002"] == tasks.Noun("animal", "05", ("00000001",), "a living thing")
    assert nouns["00000006"].parents == ("00000003",)
    above = {"a living thing": {"entity"}, "a feline": {"animal", "entity"}, "used to work": {"entity"}}
    above |= {"it cuts": {"tool", "entity"}, "a well known cat": {"house cat", "animal", "entity"}}
    pairs = list(tasks.kind_pairs(nouns))
    assert {truth for *_, truth in pairs} == {"true", "false"}
    for definition, statement, truth in pairs:
        word = statement.removeprefix("It is a kind of ").removesuffix(".")
        assert (word in above[definition]) == (truth == "true")


def test_missing_tools_and_tasks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARDLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(tasks.shutil, "which", lambda _name: None)
    with pytest.raises(DatasetUnavailable, match=r"kindof needs wordnet-base=.*, fetched with apt-get"):
        tasks.load("kindof")
    assert not any(tmp_path.iterdir())
    with pytest.raises(
        InputError, match="--task must be one of trec6, trec50, movies, tweets, newsgroups, kindof, got sums"
    ):
        tasks.load("sums")


def test_encoder_book_is_what_the_whole_encoder_makes_of_it() -> None:
    bed = encoder_book.EncoderBookBed(pairs=30, steps=60)
    try:
        task = bed.task(0)
    except DatasetUnavailable as reason:
        pytest.skip(str(reason))
    keys = torch.randint(1996, 11996, (30, 8), generator=torch.Generator().manual_seed(0))
    encoder = AutoModel.from_pretrained(fetch(MINILM))
    with torch.no_grad():
        x = encoder(keys).last_hidden_state[:, 0]
        torch.testing.assert_close(task.model(task.book[:, :-1]).flatten(1), task.model.head(x))
    row = run_trial(bed, parse("lora"), 1e-2, seed=0)
    assert row["params"] == row["budget"] == 4 * 2 * 384 + 2 * (384 + 1536)
    assert row["bits"] < 9.0


def test_play_is_read_in_windows_and_its_end_is_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    loaded = {
        "tokens": torch.arange(1000) % 50,
        "config": config,
        "weights": AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict(),
    }
    monkeypatch.setattr(play, "_load", lambda: loaded)
    bed = play.PlayBed(steps=30, length=8)
    task = bed.task(0)
    assert [len(part) for part in (task.train, task.held, task.last)] == [700, 100, 200]
    seen = []
    monkeypatch.setattr(task, "_loss", lambda windows: seen.append(windows))
    task.loss()
    assert seen[0].shape == (8, 8)
    assert bool((seen[0].diff() % 50 == 1).all())
    row = run_trial(bed, parse("lora"), 1e-2, seed=0)
    before = run_trial(bed, parse("lora"), 1e-9, seed=0)
    assert row["params"] == 2 * 2 * (16 + 16)
    assert row["nll"] < before["nll"]


@pytest.mark.parametrize("name", ["trec6", "tweets"])
def test_real_bed_scores_classes_and_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ardlora_ext.bench.quality.beds.real import RealBed

    for size, value in {"_TEST": 40, "_VALID": 20, "_TRAIN": 64}.items():
        monkeypatch.setattr(tasks, size, value)
    try:
        row = run_trial(RealBed(task_name=name, steps=2), parse("lora"), 1e-3, seed=0)
    except DatasetUnavailable as reason:
        pytest.skip(str(reason))
    assert -1.0 <= row["score"] <= 1.0
    assert row["params"] == row["budget"] == 6 * (4 * 2 * 384 + 2 * (384 + 1536))
