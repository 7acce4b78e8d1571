"""The files of a run: metrics.json, records.jsonl, report.html.

They are written to a temporary name and renamed, so a reader finds the old content or the new, never half of it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ardlora_ext.errors import InputError

Json = Mapping[str, Any]
METRICS_FILE, RECORDS_FILE, REPORT_FILE = "metrics.json", "records.jsonl", "report.html"


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either its old content or all of the new."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_records(folder: Path, records: Iterable[Json]) -> None:
    """Write records.jsonl, one rank decision in a line."""
    write_atomic(folder / RECORDS_FILE, "".join(json.dumps(record) + "\n" for record in records))


def write_metrics(folder: Path, metrics: Json) -> None:
    """Write metrics.json, one key in a line: short, and still readable."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in metrics.items()]
    write_atomic(folder / METRICS_FILE, "{\n" + ",\n".join(lines) + "\n}\n")


def load_run(folder: Path) -> tuple[Json, list[Json]]:
    """Return the metrics and the records of the run saved in `folder`.

    Raises:
        InputError: A file is missing or is not what a run writes.
    """
    try:
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        lines = (folder / RECORDS_FILE).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise InputError(f"report: {folder} must hold {METRICS_FILE} and {RECORDS_FILE} of a run: {error}") from error
    except ValueError as error:
        raise InputError(f"report: {METRICS_FILE} and {RECORDS_FILE} in {folder} must be JSON: {error}") from error
    if not isinstance(metrics, dict) or not metrics.get("ranks") or not metrics.get("rank_history"):
        raise InputError(f"report: {folder / METRICS_FILE} must hold the ranks of a run, got none")
    return metrics, records
