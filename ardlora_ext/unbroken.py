"""All or nothing: everything is checked and allocated first, then assigned in one piece that no signal breaks off."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = [  # Ctrl-C first
    number
    for name in ("INT", "TERM", "HUP", "ALRM", "USR1", "USR2")
    if (number := getattr(signal, f"SIG{name}", None)) is not None
]
_active: unbroken | None = None  # the one that holds signals now, always the main thread's


def holding() -> bool:
    """Tell whether signals are held now."""
    return _active is not None


class unbroken:  # noqa: N801 - used as a function, as contextlib.suppress is
    """Hold signals (Ctrl-C, a time limit) until the `with` block ends, so that its last assignment follows its first.

    What is in such a block allocates no tensor and checks nothing: it cannot fail. Only the main thread ever runs
    signal handlers, so elsewhere, and inside another block, this does nothing.

    Example:
        new = torch.empty_like(old)  # what may fail is done before
        with unbroken():
            parameter.data, layer.ranks = new, ranks
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._waiting: list[int] = []

    def __enter__(self) -> None:
        global _active
        if _active is not None or threading.current_thread() is not threading.main_thread():
            return
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._hold)
            _active = self
        except BaseException:  # of a signal that came just before
            self._restore()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        global _active
        if _active is self:
            _active = None
            self._restore()
            self._deliver()

    def _hold(self, number: int, _frame: FrameType | None) -> None:
        self._waiting.append(number)

    def _restore(self) -> None:
        """Put all handlers back, Ctrl-C's last; one of them may run, and raise, as soon as it is there."""
        try:
            while self._handlers:
                number = next(reversed(self._handlers))
                signal.signal(number, self._handlers[number])
                del self._handlers[number]
        finally:
            if self._handlers:
                self._restore()

    def _deliver(self) -> None:
        """Let the signals that waited come now, each of them even if one before raises."""
        if self._waiting:
            try:
                signal.raise_signal(self._waiting.pop(0))
            finally:
                self._deliver()


def nothing() -> None:
    """Do nothing: where a caller has nothing to add."""


class undone_by:  # noqa: N801
    """Call `undo` if the `with` block raises anything, Ctrl-C included, before it has called what it gets.

    `undo` follows the rule of `unbroken`. No generator: one that an interrupt leaves behind would be closed, and would
    undo, whenever its garbage is collected.

    Example:
        with undone_by(controller.remember()) as keep:
            update = controller.propose()
            with unbroken():
                write(update)
                keep()  # whatever is raised from here on, it is done
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo
        self._kept = False

    def __enter__(self) -> Callable[[], None]:
        return self._keep

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None and not self._kept:
            with unbroken():
                self._undo()

    def _keep(self) -> None:
        self._kept = True
