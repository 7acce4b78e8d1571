"""An interrupted save leaves the old set of files or the new one: the process is stopped at every single step."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ardlora_ext import file_set
from ardlora_ext.file_set import read_set, write_set

Files = Mapping[str, bytes]
OLD = {"a.bin": b"old a" * 99, "b.json": b"old b", "state.json": b"old commit"}
NEW = {"a.bin": b"new a", "b.json": b"new b" * 99, "state.json": b"new commit"}
NEWER = {"a.bin": b"newer", "b.json": b"", "state.json": b"newer commit"}
FOREIGN = {"notes.txt": b"mine", "draft.new": b"mine too", "a.bin.staged": b"mine", "b.commit": b"mine"}
STEPS = ((os, "replace"), (os, "rename"), (os, "unlink"), (os, "open"), (os, "listdir"), (os, "fsync"), (io, "open"))


class Crash(BaseException):
    """The process is gone: nobody catches this."""


class Machine:
    """Counts what reaches the disk and fails from step `limit` on; a process that is gone leaves unsynced data torn."""

    def __init__(self, patch: pytest.MonkeyPatch, limit: int, times: float = float("inf"), error: Any = Crash) -> None:
        self.left, self.times, self.error = limit, times, error
        for owner, name in STEPS:
            patch.setattr(owner, name, self._failing(name, getattr(owner, name)))

    def _failing(self, name: str, call: Any) -> Any:
        def failing(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if -1 - self.times < self.left < 0:
                if name == "fsync" and Path(f"/proc/self/fd/{args[0]}").is_file():
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                raise self.error() if self.error is not OSError else OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **kwargs)

        return failing


def put(directory: Path, files: Files) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)


def held(directory: Path) -> Files:
    return {path.name: path.read_bytes() for path in directory.iterdir()} if directory.is_dir() else {}


def read(directory: Path) -> Files:
    return read_set(directory, list(NEW), "state.json")


def survives(call: Callable[[], None], limit: int) -> bool:
    """Run `call`, gone before step `limit`; tell whether it came to its end."""
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
def test_a_crash_leaves_one_whole_set_to_readers_who_change_nothing(tmp_path: Path, old: Files) -> None:
    outcomes = []
    for directory in interrupted_writes(tmp_path, old):
        there = held(directory)
        assert read(directory) in (old, NEW)
        assert held(directory) == there
        outcomes.append(read(directory) == NEW)
    assert outcomes == sorted(outcomes), "old before the commit point, new after it"
    assert set(outcomes) == {False, True}


def test_the_next_write_after_a_crash_is_whole_and_leaves_nothing(tmp_path: Path) -> None:
    for directory in interrupted_writes(tmp_path, OLD):
        write_set(directory, {"another.txt": b"of another set"})
        assert held(directory) in ({**OLD, "another.txt": b"of another set"}, {**NEW, "another.txt": b"of another set"})
        write_set(directory, NEWER)
        assert held(directory) == {**NEWER, "another.txt": b"of another set"}


def test_a_crash_while_a_crash_is_repaired(tmp_path: Path) -> None:
    for second in range(14):
        for directory in interrupted_writes(tmp_path / str(second), OLD):
            before = read(directory)
            survives(partial(write_set, directory, NEWER), second)
            assert read(directory) in (before, NEWER)
            write_set(directory, NEW)
            assert held(directory) == NEW


@pytest.mark.parametrize("times", [1, float("inf")], ids=["once", "from then on"])
def test_an_error_of_the_disk_says_what_is_there(tmp_path: Path, times: float) -> None:
    said = set()
    for limit in range(200):
        directory = tmp_path / str(limit)
        put(directory, OLD)
        with pytest.MonkeyPatch.context() as patch:
            Machine(patch, limit, times, OSError)
            try:
                write_set(directory, NEW)
            except OSError as error:
                message = str(error)
            else:
                message = ""
        assert "[Errno 28] No space left on device" in message or not message
        assert read(directory) == (OLD if "no file was replaced" in message else NEW), message
        if times == 1:
            assert held(directory) in (OLD, NEW), "nothing staged is left on a full disk"
        said.add(message.partition(";")[2].partition(":")[0])
        if not message and limit > 30:
            break
    assert " no file was replaced" in said
    assert len(said) == 3


@pytest.mark.parametrize("limit", range(0, 30, 2))
def test_an_interrupt_leaves_nothing_staged(tmp_path: Path, limit: int) -> None:
    put(tmp_path, OLD)
    with pytest.MonkeyPatch.context() as patch:
        Machine(patch, limit, 1, KeyboardInterrupt)
        with suppress(KeyboardInterrupt):
            write_set(tmp_path, NEW)
    assert read(tmp_path) in (OLD, NEW)
    write_set(tmp_path, NEW)
    assert held(tmp_path) == NEW


def test_a_reader_that_is_overtaken_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole write, or its beginning, happens between any two steps of the reader."""
    for crash in (4, 9, 11, 13, 99):
        for step in range(20):
            directory = tmp_path / f"{crash} {step}"
            put(directory, OLD)
            left = [step]

            def overtaken(call: Any, left: list[int], directory: Path, crash: int) -> Any:
                def first(*args: Any, **kwargs: Any) -> Any:
                    left[0] -= 1
                    if left[0] == -1:
                        survives(partial(write_set, directory, NEW), crash)
                    return call(*args, **kwargs)

                return first

            with pytest.MonkeyPatch.context() as patch:
                for owner, name in ((os, "listdir"), (io, "open"), (os, "stat"), (os, "fstat")):
                    patch.setattr(owner, name, overtaken(getattr(owner, name), left, directory, crash))
                assert read(directory) in (OLD, NEW)


def test_writers_take_turns(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(20):
            write_set(tmp_path, dict.fromkeys(NEW, b"%d" % number))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(set(read(tmp_path).values())) <= 1
    assert set(held(tmp_path)) == set(NEW)
    assert len(set(held(tmp_path).values())) == 1


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer's files are then not touched: it may be alive."""
    monkeypatch.setattr(file_set, "fcntl", None)
    put(tmp_path, {"a.bin.0123456789abcdef.staged": b"theirs"})
    write_set(tmp_path, NEW)
    assert held(tmp_path) == {**NEW, "a.bin.0123456789abcdef.staged": b"theirs"}


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
    write_set(tmp_path, NEW)
    assert held(tmp_path) == {**NEW, **FOREIGN}


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"no file was replaced: .*file"):
        write_set(tmp_path / "file", NEW)
    assert held(tmp_path) == {"file": b"in the way"}


def test_directories_are_made(tmp_path: Path) -> None:
    write_set(tmp_path / "x" / "y", NEW)
    assert held(tmp_path / "x" / "y") == NEW


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    assert read_set(tmp_path / "nowhere", ["a.bin"], "state.json") == {}
    (tmp_path / "a.bin").mkdir()
    assert read_set(tmp_path, ["a.bin", "b.json"], "state.json") == {}
