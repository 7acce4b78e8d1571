"""Broken files: what a bad disk, a half-finished copy, another program or a stranger makes of one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from ardlora_ext.json_file import checksums

_HOSTILE: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: True,
    lambda: 0,
    lambda: -1,
    lambda: 2**63,
    lambda: 10**400,
    lambda: float("nan"),
    lambda: float("-inf"),
    lambda: 1e308,
    lambda: 0.5,
    lambda: "",
    lambda: "x",
    lambda: "\ud800",
    lambda: "((a+)+)+$",
    lambda: "(",
    lambda: "../../etc/passwd",
    list,
    dict,
    lambda: [1],
    lambda: [[]],
    lambda: [None] * 3,
    lambda: {"": {}},
    lambda: {"x": "y"},
)
_TEXTS = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"[" * 20000,
    b"{}",
    b"[]",
    b"7",
    b"null",
    b"9" * 5000,
    b'"\\ud800"',
    b"\xef\xbb\xbf{}",
)


def mutated(path: Path, rng: random.Random) -> bytes:
    """Return the content of a file, broken in one way or a few."""
    data = path.read_bytes()
    choice = rng.random()
    if choice < 0.05:
        return rng.choice(_TEXTS)
    if choice < 0.3:
        return _bytes(data, rng)
    if path.suffix in (".json", ".jsonl"):
        return _json(path, data, rng)
    return _tensors(data, rng) if path.suffix == ".safetensors" else _bytes(data, rng)


def sealed(folder: Path, name: str) -> bool:
    """Give a JSON file checksums that fit whatever now lies beside it, as a stranger would; tell whether that went."""
    try:
        value = json.loads((folder / name).read_bytes())
        others = [other for other in value["sha256"] if other != name]
        value["sha256"] = checksums(value, name, {other: (folder / other).read_bytes() for other in others})
    except (ValueError, TypeError, LookupError, OSError, RecursionError, AttributeError):
        return False  # broken too much for that
    (folder / name).write_text(json.dumps(value))
    return True


def _bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 5, 50))):
        at = rng.randrange(len(changed) + 1)
        how = rng.randrange(5)
        if how == 0:
            del changed[at:]
        elif how == 1:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 2:
            changed[at:at] = rng.randbytes(rng.choice((1, 8, 64)))
        elif how == 3:
            del changed[at : at + rng.choice((1, 8, 64))]
        else:
            changed[at : at + 8] = rng.choice((b"\0" * 8, b"\xff" * 8, (2**62).to_bytes(8, "little")))
    return bytes(changed)


def _json(path: Path, data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines() if path.suffix == ".jsonl" else [data]
    at = rng.randrange(len(lines))
    value = json.loads(lines[at])
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = _edited(value, rng)
    lines[at] = json.dumps(value).encode()
    return b"\n".join(lines)


def _edited(value: Any, rng: random.Random) -> Any:
    """Replace, drop or rename one entry somewhere in a JSON value."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.02:
        return rng.choice(_HOSTILE)()
    key = rng.choice(sorted(value, key=str)) if isinstance(value, dict) else rng.randrange(len(value))
    deeper = isinstance(value[key], (dict, list)) and rng.random() < 0.8
    if deeper:
        value[key] = _edited(value[key], rng)
    elif rng.random() < 0.25:
        del value[key]
    elif isinstance(value, dict) and rng.random() < 0.1:
        value[rng.choice(("x", "", "q_proj", "(a+)+"))] = value.pop(key)
    else:
        value[key] = rng.choice(_HOSTILE)()
    return value


def _tensors(data: bytes, rng: random.Random) -> bytes:
    """Change one tensor: its numbers, its type, its shape, its name, or that it is there."""
    tensors = load(data)
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    floating = value.is_floating_point() and value.numel() > 0
    changes: list[Callable[[], torch.Tensor]] = [
        lambda: value.to(rng.choice((torch.int64, torch.float16, torch.float64, torch.bool, torch.uint8))),
        lambda: torch.zeros(rng.choice(((), (0,), (1,), (7,), (2, 3), (1, 2, 3), (0, 16)))),
        lambda: value.reshape(-1),
        lambda: torch.cat([value.reshape(-1), value.reshape(-1)[:1]]),
        lambda: torch.full_like(value, rng.choice((float("nan"), float("inf"), 3e38))) if floating else value + 1,
    ]
    how = rng.randrange(len(changes) + 2)
    if how == len(changes):
        del tensors[name]
    elif how > len(changes):
        tensors[rng.choice(("x", "saved.x", f"{name}.x", "q_proj.gate"))] = tensors.pop(name)
    else:
        tensors[name] = changes[how]().contiguous()
    return bytes(save(tensors, {"format": "pt"}))
