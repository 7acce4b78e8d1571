"""The scripts in examples/ run as they are, and once more without the lines that this package adds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT

ROOT = Path(__file__).parents[2]
SCRIPTS = ("text_classification", "sft", "raw_loop")
MARK = "# +\n"


def execute(source: str, folder: Path, model: Path, data: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(source, encoding="utf-8")
    options = ["--model", model, "--data", data, "--out", folder / "out", "--max-steps", 40, "--lr", 1e-2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [sys.executable, str(script), *map(str, options)], env=environment, capture_output=True, text=True, cwd=folder
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, tmp_path: Path, encoder: Path, decoder: Path, reviews: Path) -> None:
    if name != "raw_loop":
        pytest.importorskip("datasets", reason="datasets is not installed")
    if name == "sft":
        pytest.importorskip("trl", reason="trl is not installed")
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    added = [line for line in lines if line.endswith(MARK)]
    assert [line.startswith("import") for line in added] == [True, False]
    plain = "".join(line for line in lines if line not in added)
    assert "ard." not in plain
    model = decoder if name == "sft" else encoder

    without = execute(plain, tmp_path / "without", model, reviews)
    assert without.returncode == 0, without.stderr[-3000:]
    assert "loss" in without.stdout

    done = execute(source, tmp_path / "with", model, reviews)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "with" / "out"
    state = json.loads((out / "ardlora_state.json").read_text())
    ranks = {rank for module in state["modules"].values() for rank in module["ranks"]}
    assert len(ranks) > 1, "ranks moved"
    kind = AutoModelForCausalLM if name == "sft" else AutoModelForSequenceClassification
    options = {} if name == "sft" else {"num_labels": 2}
    assert PeftModel.from_pretrained(kind.from_pretrained(model, **options), out).peft_config["default"].r >= max(ranks)
