"""Regular expressions that choose modules: of a user, and of files that somebody else wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ardlora_ext.config.checks import require

try:
    from re import _parser as regex_parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as regex_parser

_MOST_REPEATS = 6


def pattern_key(patterns: Mapping[str, float] | None, name: str) -> str | None:
    """Return the first pattern that covers `name` from its start or a dot to its end, as in PEFT."""
    return next((pattern for pattern in patterns or () if re.match(rf"(.*\.)?({pattern})$", name)), None)


def in_layers(name: str, layers: int | Sequence[int] | None, lists: Sequence[str] | None) -> bool:
    """Tell whether PEFT's rule for layers_to_transform takes a module.

    Args:
        name: of the module.
        layers: numbers of layers; None or empty: any.
        lists: what the lists of layers are called; None or empty: the first number in a name after two parts counts.
    """
    if layers is None or (not isinstance(layers, int) and len(layers) == 0):
        return True
    rules = [rf"(?:^|.*?\.){part}\.(?P<number>\d+)\." for part in lists or ()]
    found = next((m for rule in rules or (r".*?\.[^.]*\.(?P<number>\d+)\.",) if (m := re.match(rule, name))), None)
    return found is not None and int(found["number"]) in ((layers,) if isinstance(layers, int) else layers)


def check_expression(what: str, pattern: object) -> None:
    """Raise ValueError unless `pattern`, if it is one string, is a regular expression."""
    if not isinstance(pattern, str):
        return
    try:
        re.compile(pattern)
    except re.error as cause:
        hint = f"; for a glob write {'.' + pattern!r}" if pattern.startswith("*") else ""
        raise ValueError(
            f"{what} must be a list of names or one regular expression, got {pattern!r}: {cause}{hint}"
        ) from cause


def check_pattern(pattern: str, what: str) -> None:
    """Check a regular expression that came with a file: matching it must not take for ever.

    Raises:
        ValueError: it is none, has a repeat or a choice inside a repeat, or more than six repeats in a row.
    """
    try:
        repeats = _repeats(regex_parser.parse(pattern), inside=False)
    except (re.error, RecursionError, OverflowError, TypeError) as cause:
        raise ValueError(f"{what} must hold regular expressions, got {pattern!r:.60}: {cause}") from cause
    require(
        repeats <= _MOST_REPEATS,
        f"{what} must have at most {_MOST_REPEATS} repeats in an expression, none in another, got {pattern!r:.60}",
    )


def _repeats(parsed: Any, inside: bool) -> int:
    """Count the repeats in a row; one in another, or a choice in one, can be tried in exponentially many ways."""
    count = 0
    for kind, content in parsed:
        name = str(kind)
        again = name.endswith("_REPEAT") and content[1] > 1
        if inside and (again or name == "BRANCH"):
            return _MOST_REPEATS + 1
        parts = content[1] if name == "BRANCH" else content if isinstance(content, (tuple, list)) else (content,)
        nested = [_repeats(part, inside or again) for part in parts if isinstance(part, regex_parser.SubPattern)]
        count += again + (max(nested) if name == "BRANCH" else sum(nested))
    return count
