"""What goes wrong outside the code: bad input of a person, told in one sentence."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence that says why."""
