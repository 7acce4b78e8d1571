"""The user's data, read by `datasets` and brought to the columns that a task has, with a fixed split.

Every split depends on the text alone (sha256 order), never on a seed: two runs are always tested on the same examples,
and equal texts never stand on both sides.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import Dataset

from ardlora_ext.errors import InputError, first_line
from ardlora_ext.json_file import parse_json
from ardlora_ext.train.settings import COLUMNS, NAMES, OPTIONAL, Task

TEST_LIMIT = 2000
_FIELD = 2**31 - 1  # characters of a field; csv's own limit is below a long text
_LEAST = 10  # different examples of a data set that is split
_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Corpus:
    """A data set with its fixed split.

    Attributes:
        name: What reports call it.
        task: What is learned from it.
        train: Rows to train on: `text`, perhaps `text_pair`, and `label` (an index into `labels`, or a number);
            `tokens` and `tags` (indices into `labels`); `text` alone; or what TRL takes for `sft`.
        test: Held-out rows; None for language modelling, which holds out the last blocks of tokens.
        labels: Class names by index; empty where there are none.
    """

    name: str
    task: Task
    train: Dataset
    test: Dataset | None
    labels: tuple[str, ...] = ()

    def speaks(self) -> bool:
        """Tell whether rows hold messages, and no plain text."""
        first = self.train[0]
        return "messages" in first or isinstance(first.get("prompt"), list)


def load_corpus(
    data: str | Path,
    task: Task | Literal["auto"] = "auto",
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    eval_data: str | Path | None = None,
    eval_split: str | None = None,
    eval_share: float = 0.1,
) -> Corpus:
    """Load the user's data: see `settings.COLUMNS` for the columns of each task.

    Without evaluation data a share is held out, at most 2 000 rows in hash order; a text that is given twice keeps its
    first label.

    Args:
        data: A .csv, .tsv, .json, .jsonl, .parquet or .txt file, a folder of such, or the id of a data set on the hub.
        task: "auto" chooses by the columns.
        split: Of a folder or a data set on the hub.
        columns: The data's own names by ours, as in {"text": "sentence"}.
        eval_data: Other data to test on; None: `eval_split` of the same data, or a share of it.
        eval_split: The split to test on.
        eval_share: Share that is held out.

    Raises:
        InputError: The data cannot be read or do not have the needed columns.
    """
    rows = _named(_read(data, split), columns or {}, data)
    name = Path(data).name
    if task == "auto":
        task = _task_of(rows, data)
    fields = _fields(rows, task, data)
    other: Dataset | None = None
    if eval_data is not None or eval_split is not None:
        where = data if eval_data is None else eval_data
        part = eval_split or ("train" if Path(where).is_file() else split)
        other = _named(_read(where, part), columns or {}, where)
        missing = [field for field in fields if field not in other.column_names]
        if missing:
            raise InputError(
                f"{where}: rows must have the columns of {data}, got no {missing[0]} in {_listed(other.column_names)}"
            )
    train = _checked(rows, task, fields, data)
    test = None if other is None else _checked(other, task, fields, eval_data or data)
    if task == "lm":
        return Corpus(name, task, train, test)
    if test is None:
        train, test = _hold_out(train, fields, eval_share, data)
    if task not in ("classification", "token-classification"):
        return Corpus(name, task, train, test)
    return _indexed(name, task, train, test, data)


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(data: str | Path, split: str) -> Dataset:
    """Read a file, a folder or a data set of the hub.

    Raises:
        InputError: it cannot be read, or is empty.
    """
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it prints errors that it raises as well
    path = Path(data)
    kind = _READERS.get(path.suffix.lower())
    if path.is_file() and kind is None:
        raise InputError(f"load_corpus: --data must be a {', '.join(_READERS)} file, got {path}")
    if kind is not None and not path.is_dir():
        if split != "train":
            raise InputError(
                f"load_corpus: a file has no splits, got {path} and split {split}; name another file instead"
            )
        rows = _read_file(path, kind)
    else:
        try:
            rows = datasets.load_dataset(str(data), split=split)
        except Exception as error:  # of the network, the hub, the file formats
            hint = "" if path.exists() else "; without a network, download it elsewhere and give its folder"
            raise InputError(
                f"load_corpus: --data must be a file, a folder or a data set of the hub, got {data} (split {split}): "
                f"{first_line(error.__cause__ or error)}{hint}"
            ) from error
    if not len(rows):
        raise InputError(f"load_corpus: --data must hold at least one row, got an empty {data}")
    return rows


def _read_file(path: Path, kind: str) -> Dataset:
    if not path.is_file():
        raise InputError(f"load_corpus: --data must be an existing file, got {path}")
    try:
        if not path.stat().st_size:
            raise InputError(f"load_corpus: --data must hold at least one row, got an empty {path}")
        with path.open("rb") as stream:
            listed = kind == "json" and stream.read(1) == b"["
        if listed and path.suffix.lower() == ".jsonl":
            _find_bad_line(path)
        options = _csv_options(path) if kind == "csv" else {"sample_by": "document"} if kind == "text" else {}
        files = glob.escape(str(path.resolve()))
        return datasets.load_dataset(kind, data_files=files, split="train", **options)
    except InputError:
        raise
    except Exception as error:  # of pandas, pyarrow, the file system
        if "corresponds to no data" in str(error):
            raise InputError(f"load_corpus: --data must hold at least one row, got an empty {path}") from error
        if kind == "json" and not listed:
            _find_bad_line(path)
        raise InputError(f"load_corpus: cannot read {path}: {first_line(error.__cause__ or error)}") from error


def _find_bad_line(path: Path) -> None:
    """Say which line is no JSON object; return where each is one."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip(b"\xef\xbb\xbf\r\n\t "):
                row = parse_json(line.removeprefix(b"\xef\xbb\xbf"), f"{path}: line {number}")
                if not isinstance(row, dict):
                    raise InputError(f"{path}: line {number} must be a JSON object, got {row!s:.60}")
                try:
                    json.dumps(row, ensure_ascii=False).encode()
                except UnicodeEncodeError as error:
                    raise InputError(f"{path}: line {number} must be Unicode, got half a character: {error}") from error


def _csv_options(path: Path) -> dict[str, Any]:
    """Return what makes pandas read every value as the string that it is: "01" is no 1, "NA" is a word."""
    sep = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=sep)
        header = next((row for row in reader if row), [])
        first = next((row for row in reader if row), header)
        if len(set(header)) < len(header) or "" in header:
            raise InputError(f"{path}: line 1 must name each column once, got {_listed(header)}")
        if len(first) > len(header):  # pandas would take the first for an index
            raise InputError(f"{path}: line {reader.line_num} must have {len(header)} fields, got {len(first)}")
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"sep": sep, "encoding": "utf-8-sig", "features": features, "na_filter": False}


def _named(rows: Dataset, columns: Mapping[str, str], source: str | Path) -> Dataset:
    """Give columns our names."""
    for name, theirs in columns.items():
        if theirs not in rows.column_names:
            raise InputError(
                f"{source}: --columns {name}={theirs} must name a column, got {_listed(rows.column_names)}"
            )
    if columns:
        taken = [name for name in columns if name in rows.column_names and name not in columns.values()]
        rows = rows.remove_columns(taken).rename_columns({theirs: name for name, theirs in columns.items()})
    return rows


def _task_of(rows: Dataset, source: str | Path) -> Task:
    """Choose the task that the columns tell."""
    found = set(rows.column_names)
    if "messages" in found or {"prompt", "completion"} <= found:
        return "sft"
    if {"tokens", "tags"} <= found:
        return "token-classification"
    if {"text", "label"} <= found:
        numbers = [float(label) for label in rows["label"] if _is_number(label)]
        kind = str(getattr(rows.features["label"], "dtype", ""))
        measured = kind.startswith("float") or len(numbers) == len(rows)
        return "regression" if measured and not all(map(float.is_integer, numbers)) else "classification"
    if "text" not in found:
        raise InputError(
            f"{source}: rows must have a text column (or tokens and tags, messages, or prompt and completion), got "
            f"{_listed(rows.column_names)}; --columns text=NAME names another"
        )
    if found - set(NAMES):  # most likely a misspelt label column
        raise InputError(
            f"{source}: columns must be text, text_pair and label (or pass --task lm to train on the text alone, or "
            f"--columns label=NAME), got {_listed(rows.column_names)}"
        )
    return "lm"


def _fields(rows: Dataset, task: Task, source: str | Path) -> tuple[str, ...]:
    """Return the columns that the task reads; InputError where they are not there."""
    sets = COLUMNS[task]
    for names in sets:
        if set(names) <= set(rows.column_names):
            pair = [name for name in OPTIONAL if name in rows.column_names and task in ("classification", "regression")]
            return (*names, *pair)
    wanted = " or ".join(" and ".join(names) for names in sets)
    missing = next(name for name in sets[0] if name not in rows.column_names)
    raise InputError(
        f"{source}: rows must have a {missing} column ({task} reads {wanted}), got {_listed(rows.column_names)}; "
        f"--columns {missing}=NAME names another"
    )


# --- rows -------------------------------------------------------------------------------------------------------------


def _checked(rows: Dataset, task: Task, fields: Sequence[str], source: str | Path) -> Dataset:
    """Return the task's columns, every value of the kind that it must be."""
    found: dict[str, list[Any]] = {}
    for field in fields:
        rule, must, convert = _RULES["number" if (task, field) == ("regression", "label") else field]
        found[field] = []
        for number, value in enumerate(_class_names(rows, field), start=1):
            if not rule(value):
                raise InputError(f"{source}: row {number}: {field} must be {must}, got {value!r:.60}")
            found[field].append(convert(value))
    for number, (tokens, tags) in enumerate(zip(found.get("tokens", ()), found.get("tags", ()), strict=True), start=1):
        if len(tokens) != len(tags):
            raise InputError(
                f"{source}: row {number}: tags must be one for each token, got {len(tags)} for {len(tokens)} tokens"
            )
    try:
        return Dataset.from_dict(found)
    except Exception as error:  # of pyarrow
        raise InputError(f"{source}: values of a column must be of one kind, got {first_line(error)}") from error


def _class_names(rows: Dataset, field: str) -> Iterable[Any]:
    """Return a column, names in place of the class numbers of a data set that names its classes."""
    values: Iterable[Any] = rows[field]
    feature = getattr(rows.features[field], "feature", rows.features[field])
    if not isinstance(feature, datasets.ClassLabel):
        return values
    names = dict(enumerate(feature.names))
    return ([names.get(i, i) for i in v] if isinstance(v, list) else names.get(v, v) for v in values)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_label(value: Any) -> bool:
    return isinstance(value, (int, str)) and bool(str(value).strip())


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _is_chat(value: Any) -> bool:
    turns = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    return bool(turns) and all(isinstance(turn.get("role"), str) and "content" in turn for turn in value)


def _is_list(value: Any, rule: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(rule, value))


_CHAT = 'a list of {"role": ..., "content": ...}'
_RULES: dict[str, tuple[Callable[[Any], bool], str, Callable[[Any], Any]]] = {  # a test, its words, a conversion
    "text": (_is_text, "a non-empty string", str),
    "text_pair": (lambda v: v is None or isinstance(v, str), "a string", lambda v: v or ""),
    "label": (_is_label, "an integer or a string", lambda v: str(v).strip()),
    "number": (_is_number, "a number", float),
    "tokens": (lambda v: _is_list(v, _is_text), "a list of words", list),
    "tags": (lambda v: _is_list(v, _is_label), "a list of labels", lambda v: [str(tag).strip() for tag in v]),
    "messages": (_is_chat, _CHAT, list),
    "prompt": (lambda v: _is_text(v) or _is_chat(v), f"a non-empty string or {_CHAT}", lambda v: v),
    "completion": (lambda v: _is_text(v) or _is_chat(v), f"a non-empty string or {_CHAT}", lambda v: v),
}


# --- the split --------------------------------------------------------------------------------------------------------


def _hold_out(rows: Dataset, fields: Sequence[str], share: float, source: str | Path) -> tuple[Dataset, Dataset]:
    """Return different rows to train and to test on."""
    inputs = [field for field in fields if field not in ("label", "tags")]
    columns = [[v if isinstance(v, str) else json.dumps(v, sort_keys=True) for v in rows[field]] for field in inputs]
    order = hash_order(map("\0".join, zip(*columns, strict=True)))
    if len(order) < _LEAST:
        raise InputError(f"{source}: there must be at least {_LEAST} different texts, got {len(order)}")
    held_out = max(1, min(TEST_LIMIT, round(len(order) * share)))
    return rows.select(order[held_out:]), rows.select(order[:held_out])


def hash_order(keys: Iterable[str]) -> list[int]:
    """Return the positions of different keys, in the order of their sha256."""
    first: dict[str, int] = {}
    for position, key in enumerate(keys):
        first.setdefault(key if "\0" in key else f"{key}\0", position)
    return [first[key] for key in sorted(first, key=lambda key: hashlib.sha256(key.encode()).hexdigest())]


def _indexed(name: str, task: Task, train: Dataset, test: Dataset, source: str | Path) -> Corpus:
    """Replace class names by their index among all that occur in training."""
    column = "label" if task == "classification" else "tags"

    def names(rows: Dataset) -> set[str]:
        values = rows[column]
        return set(values) if column == "label" else {tag for tags in values for tag in tags}

    labels = sorted(names(train), key=_label_order)
    unseen = sorted(names(test) - set(labels), key=_label_order)
    if len(labels) + len(unseen) < 2:
        raise InputError(f"{source}: column {column} must have at least 2 classes, got {_listed(labels)}")
    if unseen:
        raise InputError(
            f"{source}: each label must be in the training part, got {_listed(unseen)} in the test part alone; give "
            "more rows with it, or leave it out"
        )
    index = {label: position for position, label in enumerate(labels)}

    def indices(rows: Dataset) -> Dataset:
        values = rows[column]
        found = [index[v] if column == "label" else [index[tag] for tag in v] for v in values]
        return rows.remove_columns(column).add_column(column, found)

    return Corpus(name, task, indices(train), indices(test), tuple(labels))


def _label_order(name: str) -> tuple[bool, int, str]:
    """Sort numbers by value, before words."""
    number = name.removeprefix("-").isdecimal() and len(name) < 1000  # Python converts no number of any length
    return (not number, int(name) if number else 0, name)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(str, names)) or "none"
