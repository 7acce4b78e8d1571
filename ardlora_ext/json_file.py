"""JSON that a stranger, a crash or a bad disk may have written: read in one sentence, and sealed where it matters."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from ardlora_ext.errors import InputError


def parse_json(text: str | bytes, name: str) -> Any:
    """Return the value that `text` holds.

    Args:
        text: as it was read, bytes in UTF-8.
        name: what the message calls it.

    Raises:
        InputError: it is no JSON, is not UTF-8, nests too deep, or has a number of thousands of digits.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError as error:
        raise InputError(f"{name} must be JSON, got one that nests too deep") from error
    except ValueError as error:
        raise InputError(f"{name} must be JSON, got {error}") from error


def non_finite(value: Any, path: str = "") -> str | None:
    """Return where in a JSON value the first NaN or infinity is, as in `controller.alpha.3`, or None."""
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    items = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    for key, item in items:
        found = non_finite(item, f"{path}.{key}" if path else str(key))
        if found is not None:
            return found
    return None


def checksums(value: Mapping[str, Any], name: str, files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the sha256 of `files`, and under `name` that of a JSON object without its own checksums."""
    digests = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
    return {**digests, name: _digest(json.loads(json.dumps(value)))}  # keys and tuples as they will be read


def check_checksums(value: Mapping[str, Any], name: str, files: Mapping[str, bytes]) -> None:
    """Check what `checksums` wrote as `value["sha256"]`; an object from before they covered itself passes without.

    Raises:
        ValueError: a file, or the object itself, is not as it was written.
    """
    found = value["sha256"]
    if isinstance(found, str):  # as the first format had it, for its one file
        found = dict.fromkeys(files, found)
    if not isinstance(found, Mapping) or found.keys() - {name} != files.keys():
        raise ValueError(f"{name} must have the checksums of {', '.join(files)}; the file is corrupt")
    for file, data in files.items():
        if hashlib.sha256(data).hexdigest() != found[file]:
            raise ValueError(f"{file} must match its checksum in {name}; the file is corrupt")
    if name in found and found[name] != _digest(value):
        raise ValueError(f"{name} must match its own checksum; the file is corrupt or was edited")


def _digest(value: Mapping[str, Any]) -> str:
    content = {key: item for key, item in value.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
