"""Write a set of files so that a crash leaves the old set or the new one, never a mixture.

Every file is first written and fsynced as `<name>.new`; the last of them is the commit point. Then they are renamed in
order. `recover` finishes or discards what a crash left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_SUFFIX = ".new"


def _sync_directory(path: Path) -> None:
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def recover(directory: Path, commit: str) -> None:
    """Bring `directory` to one whole set after an interrupted `write_set` whose last file was `commit`."""
    staged = sorted(directory.glob("*" + _SUFFIX), key=lambda p: p.name == commit + _SUFFIX)
    committed = any(p.name == commit + _SUFFIX for p in staged)
    for path in staged:
        if committed:
            os.replace(path, path.with_name(path.name.removesuffix(_SUFFIX)))
        else:
            path.unlink()
    if staged:
        _sync_directory(directory)


def write_set(directory: Path, files: Mapping[str, bytes]) -> None:
    """Replace the files named in `files`, all or none; the last one is the commit point.

    Raises:
        OSError: the directory cannot be written; the old files are still there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = list(files)
    recover(directory, names[-1])
    for name in names[:-1]:
        _write_synced(directory / (name + _SUFFIX), files[name])
    # The commit file appears under its staged name in one rename, so a half-written one is never taken for it.
    _write_synced(directory / (names[-1] + ".tmp"), files[names[-1]])
    os.replace(directory / (names[-1] + ".tmp"), directory / (names[-1] + _SUFFIX))
    _sync_directory(directory)
    recover(directory, names[-1])


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
