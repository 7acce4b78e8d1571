"""An interrupted save leaves the old set of files or the new one: the process is stopped at every single step."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ardlora_ext.file_set import recover, write_set

Files = Mapping[str, bytes]
OLD = {"a.bin": b"old a" * 99, "b.json": b"old b", "state.json": b"old commit"}
NEW = {"a.bin": b"new a", "b.json": b"new b" * 99, "state.json": b"new commit"}
NEWER = {"a.bin": b"newer", "b.json": b"", "state.json": b"newer commit"}
FOREIGN = {"notes.txt": b"mine", "draft.new": b"mine too"}


class Crash(BaseException):
    """The process is gone: nobody catches this."""


class Machine:
    """Counts what reaches the disk and stops the process before step `limit`; unsynced data is then torn."""

    def __init__(self, patch: pytest.MonkeyPatch, limit: int) -> None:
        self.left = limit
        for owner, name in ((os, "replace"), (os, "rename"), (os, "unlink"), (os, "open"), (io, "open")):
            patch.setattr(owner, name, self._stopping(getattr(owner, name)))
        patch.setattr(os, "fsync", self._fsync(os.fsync))

    def _tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Crash

    def _stopping(self, call: Any) -> Any:
        def stopping(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            return call(*args, **kwargs)

        return stopping

    def _fsync(self, call: Any) -> Any:
        def fsync(handle: int) -> None:
            try:
                self._tick()
            except Crash:
                size = os.fstat(handle).st_size
                if Path(f"/proc/self/fd/{handle}").is_file():
                    os.ftruncate(handle, size // 2)
                raise
            call(handle)

        return fsync


def put(directory: Path, files: Files) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)


def held(directory: Path) -> Files:
    return {path.name: path.read_bytes() for path in directory.iterdir()} if directory.is_dir() else {}


def survives(call: Callable[[], None], limit: int) -> bool:
    """Run `call`, stopped before step `limit`; tell whether it came to its end."""
    with pytest.MonkeyPatch.context() as patch:
        Machine(patch, limit)
        try:
            call()
        except Crash:
            return False
    return True


def interrupted_writes(tmp_path: Path, old: Files) -> Iterator[Path]:
    """Yield directories that hold `old` and in which a write of NEW was stopped before each of its steps."""
    for limit in range(200):
        directory = tmp_path / str(limit)
        put(directory, old)
        if survives(partial(write_set, directory, NEW), limit):
            assert held(directory) == NEW
            assert limit > 8, "the steps were seen"
            return
        yield directory
    raise AssertionError("never came to an end")


@pytest.mark.parametrize("old", [{}, OLD], ids=["first save", "later save"])
def test_a_crash_leaves_one_whole_set(tmp_path: Path, old: Files) -> None:
    outcomes = []
    for directory in interrupted_writes(tmp_path, old):
        recover(directory, "state.json")
        assert held(directory) in (old, NEW)
        outcomes.append(held(directory) == NEW)
    assert outcomes == sorted(outcomes), "old before the commit point, new after it"
    assert set(outcomes) == {False, True}


def test_a_crash_while_recovering_changes_nothing(tmp_path: Path) -> None:
    for second in range(9):
        for directory in interrupted_writes(tmp_path / str(second), OLD):
            survives(partial(recover, directory, "state.json"), second)
            recover(directory, "state.json")
            assert held(directory) in (OLD, NEW)


def test_the_next_write_after_a_crash_is_whole(tmp_path: Path) -> None:
    for directory in interrupted_writes(tmp_path, OLD):
        write_set(directory, NEWER)
        assert held(directory) == NEWER


def test_every_file_is_on_disk_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, OLD)
    synced: set[str] = set()
    fsync, replace = os.fsync, os.replace
    commits = []

    def note_sync(handle: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def note_replace(source: Any, target: Any) -> None:
        if not commits:
            assert len(synced) == len(NEW), "all data before the first rename"
        commits.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_set(tmp_path, NEW)
    assert commits[-1] == "state.json", "the commit file is renamed last"
    assert tmp_path.name in synced, "the directory too"
    assert held(tmp_path) == NEW


def test_other_files_stay(tmp_path: Path) -> None:
    put(tmp_path, {**OLD, **FOREIGN})
    recover(tmp_path, "state.json")
    assert held(tmp_path) == {**OLD, **FOREIGN}
    write_set(tmp_path, NEW)
    assert held(tmp_path) == {**NEW, **FOREIGN}


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        write_set(tmp_path / "file", NEW)
    assert held(tmp_path) == {"file": b"in the way"}


def test_directories_are_made(tmp_path: Path) -> None:
    write_set(tmp_path / "x" / "y", NEW)
    assert held(tmp_path / "x" / "y") == NEW
