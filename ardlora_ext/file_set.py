"""Write a set of files so that a crash leaves the old set or the new one, never a mixture.

Every file is first written and fsynced under a staged name that also names the set's last file, the commit point. Then
they are renamed in order. `recover` finishes or discards what a crash left, and touches no other file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_PART = ".part"


def _staged(name: str, commit: str) -> str:
    return f"{name}.staged-for-{commit}"


def _sync_directory(path: Path) -> None:
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def recover(directory: Path, commit: str) -> None:
    """Bring `directory` to one whole set after an interrupted `write_set` whose last file was `commit`."""
    suffix = _staged("", commit)
    marker = directory / _staged(commit, commit)
    staged = [*directory.glob("*" + suffix), *directory.glob("*" + suffix + _PART)]
    if not staged:
        return
    if marker in staged:
        for path in [*(p for p in staged if p != marker and p.name.endswith(suffix)), marker]:
            os.replace(path, path.with_name(path.name.removesuffix(suffix)))
    else:
        for path in staged:
            path.unlink()
    _sync_directory(directory)


def write_set(directory: Path, files: Mapping[str, bytes]) -> None:
    """Replace the files named in `files`, all or none; the last one is the commit point.

    Raises:
        OSError: the directory cannot be written; the old files are still there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = list(files)
    commit = names[-1]
    recover(directory, commit)
    for name in names[:-1]:
        _write_synced(directory / _staged(name, commit), files[name])
    # The commit file appears under its staged name in one rename, so a half-written one is never taken for it.
    part = directory / (_staged(commit, commit) + _PART)
    _write_synced(part, files[commit])
    os.replace(part, directory / _staged(commit, commit))
    _sync_directory(directory)
    recover(directory, commit)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
