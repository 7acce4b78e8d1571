"""The folder of a fine-tuning run: one set of files, and another place for it when the disk is full."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from ardlora_ext.checkpoint.save_pretrained import adapter_files
from ardlora_ext.errors import InputError, SavedElsewhere
from ardlora_ext.file_set import write_set
from ardlora_ext.report.page import render
from ardlora_ext.report.run_files import REPORT_FILE, run_files


def prepare_folder(out: Path) -> None:
    """Make the folder; raises InputError where it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(
            f"finetune: --out must be a folder that can be written, got {out}: {error.strerror}"
        ) from error


def save_run(model: nn.Module, records: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], out: Path) -> None:
    """Write adapter, records, metrics and page as one set, so that no file of an earlier run stands beside them.

    Raises:
        SavedElsewhere: `out` cannot be written; the run is in another folder.
        OSError: nor can any of those that were tried.
    """
    page = {REPORT_FILE: render(metrics, list(records)).encode()}
    files = {**page, **run_files(metrics, records), **adapter_files(model)[0]}
    try:
        write_set(out, files)
    except OSError as error:
        raise SavedElsewhere(f"finetune: {error}; the run is saved in {_save_elsewhere(files)}") from error


def _save_elsewhere(files: Mapping[str, bytes]) -> Path:
    """Write a run where there is room for it: a trained model is not lost to a full disk."""
    for parent in (Path(tempfile.gettempdir()), Path.home(), Path.cwd()):
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="ardlora-run-", dir=parent))
            try:
                write_set(folder, files)
            except OSError:
                folder.rmdir()
                continue
            return folder
    raise OSError(None, "neither the folder for temporary files nor home nor this folder has room for the run")
