"""The two checks that every config makes of its fields on construction."""

from __future__ import annotations

from collections.abc import Sequence


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition`."""
    if not condition:
        raise ValueError(message)


def choice(owner: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless the field `name` of config `owner` has one of the allowed values."""
    require(value in allowed, f"{owner}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
