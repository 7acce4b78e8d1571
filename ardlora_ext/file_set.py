"""Sets of files that are replaced as one: whatever is killed or raced, a reader finds the old set or the new one.

A writer holds the lock of the folder. It writes and fsyncs every file under a staged name, `NAME.TOKEN.staged`, with a
token of its own; the last file is then renamed to `NAME.TOKEN.commit`, and with that one rename the new set is there:
readers take a file of it from where it is, staged or renamed already. Then all get their names, the last file last.

A reader changes nothing and takes no lock. It opens its files and then looks whether the committed set is still the
one that it began with: an open file never changes, so what it read is whole. What a killed writer left, the next
writer of the folder finishes or removes.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not POSIX: one writer at a time is then the user's part
    fcntl = None  # type: ignore[assignment]

_UNSETTLED = re.compile(r"(?P<name>.+)\.(?P<token>[0-9a-f]{16})\.(?P<stage>staged|commit)")
_TRIES = 1000  # a reader needs another one only when a save commits while it opens its files


def write_set(directory: Path, files: Mapping[str, bytes]) -> None:
    """Replace the files named in `files`, all or none; the last one is the commit point.

    Raises:
        OSError: the files cannot be written; the message says which ones are there now, nearly always the old.
    """
    token = secrets.token_hex(8)
    names = list(files)
    marker = directory / _unsettled(names[-1], token, "commit")
    committed = False
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _only_writer(directory) as alone:
            _settle(directory, None if alone else token)
            try:
                for name in names:
                    _write_synced(directory / _unsettled(name, token, "staged"), files[name])
                os.replace(directory / _unsettled(names[-1], token, "staged"), marker)
                committed = True
                _sync_directory(directory)
                _settle(directory, token)
            except BaseException:  # Ctrl-C too: on with it if it is committed, back if not
                committed = committed or marker.exists()
                with suppress(OSError):
                    _settle(directory, token)
                raise
    except OSError as error:
        found = "the new files are whole, and are what a load finds" if committed else "no file was replaced"
        text = f"{error.strerror or error}; {found}"
        raise OSError(error.errno, text, str(error.filename or directory)) from error


def read_set(directory: Path, names: Sequence[str], *commits: str) -> dict[str, bytes]:
    """Return the content of those of `names` that are there, all of one set whose last file is one of `commits`.

    Raises:
        OSError: a file cannot be read, or the set is replaced faster than its files can be opened.
    """
    for _ in range(_TRIES):
        with ExitStack() as stack:
            begun = [_committed(directory, commit) for commit in commits]
            held = [_open(path, stack) for _, path in begun]
            token = next((token for token, _ in begun if token is not None), None)
            opened = {name: _open_either(directory, name, token, stack) for name in names}
            now = [_committed(directory, commit)[1] for commit in commits]
            if all(map(_same, held, now)):
                return {name: stream.read() for name, stream in opened.items() if stream is not None}
    raise OSError(None, "is written again and again, so it cannot be read", str(directory))


def _unsettled(name: str, token: str, stage: str) -> str:
    return f"{name}.{token}.{stage}"


# --- writers ----------------------------------------------------------------------------------------------------------


@contextmanager
def _only_writer(directory: Path) -> Iterator[bool]:
    """Wait until no other process or thread writes to `directory`; tell whether the file system can promise that."""
    if fcntl is None:
        yield False
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        alone = True
    except OSError:  # a network file system without locks
        alone = False
    except BaseException:
        os.close(handle)
        raise
    try:
        yield alone
    finally:
        if alone:
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked meanwhile has a copy of the handle
        os.close(handle)


def _settle(directory: Path, only: str | None) -> None:
    """Give committed files their names and remove those that were never committed; `only` of one token if given."""
    found = [match for match in map(_UNSETTLED.fullmatch, os.listdir(directory)) if match]
    committed = {match["token"] for match in found if match["stage"] == "commit"}
    mine = [match for match in found if only in (None, match["token"])]
    for match in sorted(mine, key=lambda match: match["stage"], reverse=True):  # the commit file last
        with suppress(FileNotFoundError):
            if match["token"] in committed:
                os.replace(directory / match[0], directory / match["name"])
            else:
                os.unlink(directory / match[0])
    if mine:
        _sync_directory(directory)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync_directory(path: Path) -> None:
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- readers ----------------------------------------------------------------------------------------------------------


def _committed(directory: Path, commit: str) -> tuple[str | None, Path]:
    """Return the token of a committed set that is not all in place yet, and the commit file that counts now."""
    for name in os.listdir(directory) if directory.is_dir() else ():
        match = _UNSETTLED.fullmatch(name)
        if match and match["stage"] == "commit" and match["name"] == commit:
            return match["token"], directory / name
    return None, directory / commit


def _open(path: Path, stack: ExitStack) -> BinaryIO | None:
    """Open a file until the stack ends; None where there is none, or something else than a file."""
    try:
        return stack.enter_context(path.open("rb")) if path.is_file() else None
    except FileNotFoundError:  # renamed since
        return None


def _open_either(directory: Path, name: str, token: str | None, stack: ExitStack) -> BinaryIO | None:
    """Open a file of the committed set under the name it has at this moment."""
    if token is not None:
        for stage in ("staged", "commit"):
            staged = _open(directory / _unsettled(name, token, stage), stack)
            if staged is not None:
                return staged
    return _open(directory / name, stack)


def _same(held: BinaryIO | None, path: Path) -> bool:
    """Tell whether `path` is the file that is held open; held, it cannot give its number to another."""
    try:
        now = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return held is None
    return held is not None and os.path.samestat(os.fstat(held.fileno()), now)
