"""Where a measurement was taken, and the one form in which all benches save theirs."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

import ardlora_ext
from ardlora_ext.errors import InputError
from ardlora_ext.file_set import write_set
from ardlora_ext.native.compiled import core

Json = dict[str, Any]


def source_tree() -> Path | None:
    """Return the folder that holds `csrc`: beside the package, or where one works; None if neither does."""
    folders = (Path(__file__).resolve().parents[2], Path.cwd())
    return next((folder for folder in folders if (folder / "csrc/cuda").is_dir()), None)


@functools.cache
def machine() -> Json:
    """Return processor, threads, instruction set and versions: what a figure means nothing without."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": core.active_isa(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "transformers": transformers.__version__,
        "ardlora_ext": ardlora_ext.__version__,
        "commit": _commit(),
    }


def headline(found: Mapping[str, Any]) -> str:
    """Return `machine()` in one line for the terminal."""
    where = found["cpu"] if found["gpu"] is None else f"{found['cpu']} + {found['gpu']}"
    return f"{where}, {found['threads']} of {found['cores']} threads, {found['isa']}, torch {found['torch']}"


def check_writable(path: Path | None, option: str) -> None:
    """Check before a long run that its result can be stored.

    Raises:
        InputError: the folder of `path` does not exist or cannot be written, or `path` is a folder.
    """
    if path is None:
        return
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"bench: {option} must be a file in an existing, writable folder, got {path}")


def write_json(path: Path, command: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `{"machine", "command", "rows"}`, the form of every bench; NaN and infinity become null."""
    content = {"machine": machine(), "command": command, "rows": [_plain(row) for row in rows]}
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_set(path.resolve().parent, {path.name: text.encode()})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (numpy.generic, numpy.ndarray)):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the source tree the package runs from, or None outside of one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None
