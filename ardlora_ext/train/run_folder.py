"""The folder of a run: its checkpoints, one set of files, and another place for them when the disk is full."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ardlora_ext import processes
from ardlora_ext.checkpoint.save_pretrained import adapter_files, without_users_card
from ardlora_ext.errors import InputError, SavedElsewhere
from ardlora_ext.file_set import write_set
from ardlora_ext.json_file import parse_json
from ardlora_ext.report.model_card import CARD, with_facts
from ardlora_ext.report.numbers import format_metric
from ardlora_ext.report.page import render
from ardlora_ext.report.run_files import REPORT_FILE, load_run, run_files


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
    score = format_metric(metrics["metric_name"], metrics["metric_after"])
    facts = {
        "Data": f"{metrics['data']}, {metrics['train_examples']:,} examples",
        **({"Labels, by their numbers": ", ".join(metrics["labels"])} if metrics["labels"] else {}),
        "Score": f"{metrics['metric_name']} {score} on {metrics['test_examples']:,} held-out examples",
    }
    files[CARD] = with_facts(files[CARD].decode(), facts).encode()
    try:
        write_set(out, without_users_card(files, out))
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


# --- checkpoints ------------------------------------------------------------------------------------------------------


def to_resume(out: Path, resume: str | None, overwrite: bool) -> Path | None:
    """Return the checkpoint to go on from, or None to begin.

    Args:
        out: Folder of the run.
        resume: "auto" for the last checkpoint in it from which there is something left to do, if there is one; a
            checkpoint; None to begin.
        overwrite: Delete what is there.

    Raises:
        InputError: there is none where one was named, or there are some and nobody said what to do with them.
    """
    found = _checkpoints(out)
    if resume == "auto":
        return next((folder for folder in reversed(found) if _goes_on(folder)), None)
    if resume is not None:
        if not _goes_on(Path(resume)):
            raise InputError(
                f"finetune: --resume must be auto, or a whole checkpoint with steps left to take, got {resume}"
            )
        return Path(resume)
    if found and not overwrite:
        raise InputError(
            f"finetune: --out must hold no checkpoint of an earlier run, got {found[-1]}; --resume goes on from there, "
            "--overwrite begins anew"
        )
    remove_checkpoints(out)
    return None


def begun_as(out: Path) -> str | None:
    """Return the command of the run whose checkpoints a folder holds, or None."""
    for folder in reversed(_checkpoints(out)):
        with suppress(InputError, LookupError, TypeError):
            command: str = trainer_state(folder)["stateful_callbacks"]["RunRecord"]["attributes"]["command"]
            return command
    return None


def ended(out: Path, command: str) -> Mapping[str, Any] | None:
    """Return the metrics of the run in a folder, if it was started by this command and has ended."""
    try:
        metrics, _ = load_run(out)
    except InputError:
        return None
    return metrics if metrics.get("command") == command else None


def remove_checkpoints(out: Path) -> None:
    """Delete the checkpoints of a run, on its first process."""
    if processes.launched_rank() == 0:
        for folder in _checkpoints(out):
            shutil.rmtree(folder, ignore_errors=True)


def trainer_state(folder: Path) -> Any:
    """Return what Trainer keeps in a checkpoint.

    Raises:
        InputError: it is not there, or not whole.
    """
    path = folder / "trainer_state.json"
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"finetune: {path} must be readable: {error.strerror}") from error


def _checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints in a folder, in the order of their steps."""
    found = [path for path in out.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _goes_on(folder: Path) -> bool:
    """Tell whether a checkpoint was written to its end, and is not that of its run.

    The state of Trainer comes last of what one process writes; from a run's end Trainer would take one more step.
    """
    try:
        ended = trainer_state(folder)["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
    except (InputError, LookupError, TypeError):
        return False
    archives = [path for path in folder.iterdir() if path.suffix in (".pt", ".pth")]
    randoms = [path for path in archives if path.name.startswith("rng_state")]
    return not ended and len(randoms) >= processes.size() and all(map(zipfile.is_zipfile, archives))
