"""Pictures of saved comparisons: what they show, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ardlora_ext.bench.cli import main
from ardlora_ext.bench.quality.beds.planted import PlantedBed
from ardlora_ext.bench.quality.compare import Effort, compare
from ardlora_ext.bench.quality.methods import parse
from ardlora_ext.bench.quality.pictures import chance, likeness, saved_rows, waterfall

ARMS = ["lora", "ard:allocation=uniform", "ard:budget=auto,holdout=True"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bed = PlantedBed(matrices=6, width=16, rank=2, steps=40, batch=16)
    found = compare(bed, [parse(arm) for arm in ARMS], Effort(2, 1, (5e-3, 2e-2)), "lora")
    path = tmp_path_factory.mktemp("saved") / "q.json"
    path.write_text(json.dumps({"rows": found.rows}))
    return path


def test_every_picture_is_drawn(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pictures", str(saved), "--out", str(tmp_path)]) == 0
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {"waterfall", "rates", "ranks", "cuts"}
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_cuts_have_both_costs_and_plain_runs_have_none(saved: Path) -> None:
    rows = saved_rows(saved)
    auto = [row for row in rows if row["method"] == ARMS[2]]
    assert all(row["cuts"] for row in auto)
    assert all(cut["predicted"] >= 0 and np.isfinite(cut["measured"]) for row in auto for cut in row["cuts"])
    assert not any(row["cuts"] for row in rows if row["method"] != ARMS[2])


def test_a_waterfall_adds_up_and_needs_common_seeds() -> None:
    def run(arm: str, seed: int, value: float | None) -> dict[str, Any]:
        return {"bed": "b", "measure": "score", "better": "higher", "method": arm, "split": "report", "seed": seed,
                "score": value}  # fmt: skip

    rows = [run("a", 0, 1.0), run("a", 1, 2.0), run("b", 0, 2.0), run("b", 1, 4.0), run("b", 2, 99.0)]
    figure = waterfall(rows, ["a", "b"])
    assert figure is not None
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"1.5", "+1.5"}
    first, second = axes.patches
    assert first.get_y() + first.get_height() == pytest.approx(second.get_y())  # type: ignore[attr-defined]
    assert waterfall([*rows, run("c", 7, 1.0)], ["a", "c"]) is None
    assert waterfall([*rows, run("c", 0, None)], ["a", "c"]) is None


def test_seeds_are_as_alike_as_they_are() -> None:
    same = np.array([[1, 2, 3, 4, 5, 6]] * 3)
    assert likeness(same) == pytest.approx(1.0)
    assert likeness(np.array([[1, 2, 3], [3, 2, 1]])) == pytest.approx(-1.0)
    assert abs(chance(np.tile(np.arange(200), (4, 1)))) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.json"], "nowhere.json must be written by bench quality --json, got FileNotFoundError"),
        (["old.json"], "old.json must be written by bench quality --json, got rows without a measure"),
        (["two.json"], "files must be of one bed, got a, b"),
        (["one.json", "--arms", "lora", "ard"], "--arms must be of lora, got ard"),
        (["one.json", "--out", "nowhere"], "--out must be an existing folder, got nowhere"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"bed": "a", "measure": "score", "method": "lora", "split": "report", "cuts": []}
    for name, rows in {"old": [{"bed": "a"}], "one": [row], "two": [row, row | {"bed": "b"}]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.chdir(tmp_path)
    assert main(["pictures", *options]) == 2
    assert message in capsys.readouterr().err
