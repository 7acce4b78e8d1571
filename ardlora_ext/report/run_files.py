"""The files of a run: metrics.json, records.jsonl, report.html.

A reader finds the old content or the new, never half of it, nor the metrics of one run with the records of another.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ardlora_ext.errors import InputError
from ardlora_ext.file_set import read_set, write_set
from ardlora_ext.json_file import parse_json

Json = Mapping[str, Any]
METRICS_FILE, RECORDS_FILE, REPORT_FILE = "metrics.json", "records.jsonl", "report.html"
# The last file of the set: that of the adapter where it is written together with its run, else that of the run.
RUN_COMMITS = ("ardlora_state.json", METRICS_FILE)
# What only some runs tell: finetune all of it, Trainer most, a loop what it hands over.
_ALL: Json = {
    **dict.fromkeys(("data", "task", "command", "seed", "epochs", "batch_size", "train_examples", "test_examples")),
    **dict.fromkeys(("metric_name", "metric_before", "metric_after", "loss_before", "loss_after")),
    **dict.fromkeys(("seconds", "step_ms_median", "tokens_per_s", "peak_rss_mb")),
    **dict.fromkeys(("params_exported", "params_compact", "served_rank")),
    "settings": {},
    "history": (),
    "evals": (),
    "answers": (),
}


def write_page(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either its old content or all of the new.

    Raises:
        InputError: it cannot be written.
    """
    try:
        write_set(path.parent, {path.name: text.encode("utf-8", "replace")})
    except OSError as error:
        raise InputError(f"report: {path} must be a file that can be written: {error}") from error


def run_files(metrics: Json, records: Iterable[Json]) -> dict[str, bytes]:
    """Return records.jsonl, one rank decision in a line, and metrics.json, one key in a line: short, still readable."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in metrics.items()]
    return {
        RECORDS_FILE: "".join(json.dumps(record, sort_keys=True) + "\n" for record in records).encode(),
        METRICS_FILE: ("{\n" + ",\n".join(lines) + "\n}\n").encode(),
    }


def load_run(folder: Path) -> tuple[Json, list[Json]]:
    """Return the metrics and the records of the run saved in `folder`; what it did not tell is None, or empty.

    Raises:
        InputError: A file is missing or is not what a run writes.
    """
    try:
        files = read_set(folder, (METRICS_FILE, RECORDS_FILE), *RUN_COMMITS)
    except OSError as error:
        raise InputError(f"report: {folder} must hold {METRICS_FILE} and {RECORDS_FILE} of a run: {error}") from error
    missing = [name for name in (METRICS_FILE, RECORDS_FILE) if name not in files]
    if missing:
        raise InputError(f"report: {folder} must hold {METRICS_FILE} and {RECORDS_FILE} of a run, got no {missing[0]}")
    metrics = parse_json(files[METRICS_FILE], f"report: {folder / METRICS_FILE}")
    records = []
    for number, line in enumerate(files[RECORDS_FILE].splitlines(), start=1):
        if line.strip():
            records.append(parse_json(line, f"report: line {number} of {folder / RECORDS_FILE}"))
            if not isinstance(records[-1], dict):
                raise InputError(f"report: line {number} of {folder / RECORDS_FILE} must be a JSON object")
    if not isinstance(metrics, dict) or not metrics.get("ranks") or not metrics.get("rank_history"):
        raise InputError(f"report: {folder / METRICS_FILE} must hold the ranks of a run, got none")
    return complete(metrics), records


def check_facts(facts: Json) -> None:
    """Check that a report has a place for each of these; raises ValueError."""
    for name in facts:
        if name not in _ALL and name != "model":
            raise ValueError(f"report: facts must be {', '.join([*_ALL, 'model'])}, got {name}")


def complete(metrics: Json) -> Json:
    """Return metrics with None, or nothing, for what the run did not tell."""
    return {**_ALL, **metrics}


def peak_rss_mb() -> float | None:
    """Return the largest resident size of this process so far; None where the system does not tell."""
    if os.name != "posix":
        return None
    import resource  # absent on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def versions() -> dict[str, str]:
    """Return the versions of Python and of what a run rests on."""
    found = {"python": platform.python_version()}
    for name in ("ardlora_ext", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            found[name] = "source tree"
    return found
