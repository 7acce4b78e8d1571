"""Checkpoints that were edited, with checksums that fit again: what a program of another version might write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ardlora_ext.json_file import checksums


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the object in a JSON file, and give it the checksums that it would have."""
    value = json.loads(path.read_text())
    edit(value)
    if isinstance(value.get("sha256"), dict):
        names = [name for name in value["sha256"] if name != path.name]
        value["sha256"] = checksums(value, path.name, {name: (path.parent / name).read_bytes() for name in names})
    path.write_text(json.dumps(value))


def old_checksums(path: Path, as_text: bool) -> None:
    """Write a JSON file as versions did that had a checksum of the tensors alone."""
    value = json.loads(path.read_text())
    (name,) = (name for name in value["sha256"] if name != path.name)
    digest = hashlib.sha256((path.parent / name).read_bytes()).hexdigest()
    path.write_text(json.dumps({**value, "sha256": digest if as_text else {name: digest}}))
