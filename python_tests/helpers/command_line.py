"""The command line as tests call it, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ardlora_ext.commands.cli import main


def finetune(*arguments: object) -> int:
    return main(["finetune", *map(str, arguments), "--threads", "1"])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one sentence with which `finetune` refuses."""
    capsys.readouterr()
    assert finetune(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def saved(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return content


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
