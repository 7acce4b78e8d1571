"""What every config makes of its fields on construction: plain values of the declared types, checked."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from numbers import Integral, Real
from typing import Any


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition`."""
    if not condition:
        raise ValueError(message)


def choice(owner: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless the field `name` of config `owner` has one of the allowed values."""
    require(value in allowed, f"{owner}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def normalise(config: Any) -> None:
    """Bring the fields of a frozen config to plain Python values of their types, so that JSON gives them back.

    Sets, lists and tuples of names become tuples (sets sorted), one name for `modules_to_save` a tuple of it, numpy's
    numbers Python's.

    Raises:
        ValueError: a value is of another type; the message names its field.
    """
    owner = type(config).__name__
    for entry in dataclasses.fields(config):
        value, kind = getattr(config, entry.name), str(entry.type)
        if value is None and "None" in kind:
            continue
        found = _converted(f"{owner}: {entry.name}", kind, value)
        if found is not value:
            object.__setattr__(config, entry.name, found)


def _converted(what: str, kind: str, value: Any) -> Any:
    first = kind.partition(" | ")[0]
    if first.startswith("Mapping[str, "):
        return _pattern_values(what, value, whole="int" in first)
    if isinstance(value, Mapping) and "Mapping[str, Sequence[int]]" in kind:
        return {str(name): _distinct(f"{what} of '{name}'", indices) for name, indices in value.items()}
    if kind.startswith("Sequence[int]"):
        return _distinct(what, value)
    if "Sequence[int]" in kind:
        numbers = value if isinstance(value, Integral) else tuple(value) if isinstance(value, Iterable) else (value,)
        all_of = numbers if isinstance(numbers, tuple) else (numbers,)
        whole = all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 0 for n in all_of)
        require(whole, f"{what} must be whole numbers >= 0, got {value!r:.80}")
        return tuple(map(int, numbers)) if isinstance(numbers, tuple) else int(numbers)
    if first == "int" and not isinstance(value, Mapping):
        words = re.findall(r"'(\w+)'", kind.replace('"', "'")) if "Literal" in kind else []
        if isinstance(value, str) and value in words:
            return value
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        require(whole, f"{what} must be {' or '.join(['a whole number', *map(repr, words)])}, got {value!r}")
        return int(value)
    if first == "float":
        real = isinstance(value, Real) and not isinstance(value, bool)
        require(real, f"{what} must be a number, got {value!r}")
        return float(value)
    if first == "bool":
        require(type(value).__name__ in ("bool", "bool_"), f"{what} must be True or False, got {value!r}")
        return bool(value)
    if "Sequence[str]" in kind:
        if isinstance(value, str):
            return value if first == "str" else (value,)
        names = tuple(value) if isinstance(value, Iterable) and not isinstance(value, Mapping) else (value,)
        right = all(isinstance(name, str) for name in names)
        require(right, f"{what} must be names of modules, got {value!r:.80}")
        return tuple(sorted(names)) if isinstance(value, AbstractSet) else names
    return value


def _distinct(what: str, value: Any) -> tuple[int, ...]:
    """Return rows of a matrix, by number."""
    numbers = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 0 for n in numbers)
    right = whole and 0 < len(numbers) == len(set(numbers))
    require(right, f"{what} must be whole numbers >= 0, none twice, got {value!r:.80}")
    return tuple(map(int, numbers))


def _pattern_values(what: str, value: Any, whole: bool) -> dict[str, Any]:
    """Return a mapping from patterns to numbers; pairs are how JSON keeps their order."""
    rule = f"{what} must map names to {'whole numbers >= 1' if whole else 'numbers > 0'}"
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        found = {str(pattern): number for pattern, number in pairs}
    except (TypeError, ValueError) as cause:
        raise ValueError(f"{rule}, got {value!r:.80}") from cause
    for pattern, number in found.items():
        kind = Integral if whole else Real
        right = isinstance(number, kind) and not isinstance(number, bool) and 0 < float(number) < math.inf
        require(right, f"{rule}, got {number!r:.60} for {pattern!r:.60}")
    return {pattern: int(number) if whole else float(number) for pattern, number in found.items()}
