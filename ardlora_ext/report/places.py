"""Where an adapted module stands in its model, read off its name: nothing here needs the model.

`encoder.layer.3.attention.self.query` is the `query` of layer 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Ranks = Mapping[str, Sequence[int]]

_NOISE = frozenset(("dense", "self", "layer"))  # parts of a module's path that tell nothing about its kind


@dataclass(frozen=True)
class Place:
    """Where a module stands: the stack of layers, its number in it (None outside of any), its kind inside the layer."""

    stack: str
    layer: int | None
    kind: str


def locate(module: str) -> Place:
    """Split a module's name at the first number."""
    parts = module.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if index is None:
        return Place("", None, module)
    return Place(".".join(parts[:index]), int(parts[index]), ".".join(parts[index + 1 :]))


def kind_labels(modules: Iterable[str]) -> dict[str, str]:
    """Give each module the shortest name of its kind that no other kind shares, in order of appearance.

    `attention.self.query` becomes `query`; `attention.output.dense` stays `attention.output` beside an `output`.
    """
    places = {module: locate(module) for module in modules}
    stacks = [place.stack.split(".") for place in places.values() if place.layer is not None]
    shared = set(stacks[0]).intersection(*stacks[1:]) if stacks else set()
    words: dict[str, tuple[str, ...]] = {}
    for module, place in places.items():
        path = [part for part in place.stack.split(".") if part not in shared] + place.kind.split(".")
        telling = [part for part in path if part and not part.isdecimal() and part not in _NOISE]
        words[module] = tuple(telling or [part for part in path if part] or ["layer"])
    kinds = set(words.values())
    return {module: ".".join(_shortest_suffix(kind, kinds)) for module, kind in words.items()}


def _shortest_suffix(kind: tuple[str, ...], kinds: set[tuple[str, ...]]) -> tuple[str, ...]:
    for length in range(1, len(kind)):
        if sum(other[-length:] == kind[-length:] for other in kinds) == 1:
            return kind[-length:]
    return kind


def group_ranks(ranks: Ranks, keys: Mapping[str, Any]) -> dict[Any, list[int]]:
    """Collect the ranks of all units whose modules share a key."""
    groups: dict[Any, list[int]] = {}
    for module, units in ranks.items():
        groups.setdefault(keys[module], []).extend(units)
    return groups


def layer_names(modules: Iterable[str]) -> dict[str, str]:
    """Name each module's layer: its number, behind the stack where there are several, or "other" outside of any."""
    places = {module: locate(module) for module in modules}
    stacks = {place.stack for place in places.values() if place.layer is not None}
    names = {}
    for module, place in places.items():
        front = f"{place.stack}." if len(stacks) > 1 else ""
        names[module] = "other" if place.layer is None else f"{front}{place.layer}"
    return names
