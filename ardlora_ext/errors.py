"""What goes wrong outside the code: bad input of a person, told in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence that says why."""


@contextmanager
def written_by_strangers(must: str) -> Iterator[None]:
    """Read what a file holds: a key or a kind of value that is not there becomes one sentence, `must` and the cause.

    Raises:
        ValueError: instead of LookupError, TypeError, AttributeError, ArithmeticError and RecursionError.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as cause:
        raise ValueError(f"{must}, got {f'no {cause}' if isinstance(cause, KeyError) else repr(cause)}") from cause


def first_line(error: BaseException) -> str:
    """Return what an error of another library says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


class SavedElsewhere(RuntimeError):  # noqa: N818 - says what happened
    """The folder of a run could not be written; the message names it, and the one that has the run."""
