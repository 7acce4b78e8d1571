"""A run in any loop leaves what `report` draws it from; a resumed one tells of all of it."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.optim import AdamW

import ardlora_ext as ard
from ardlora_ext.commands import cli
from ardlora_ext.file_set import write_set
from ardlora_ext.ranks.controllers.run import RankHistory
from ardlora_ext.report.run_files import load_run, run_files

from helpers.models import trainable
from helpers.training import STEPS, bed, fast_config

CONFIGS: dict[str, ard.config.AdapterConfig] = {
    "anneal": ard.ArdConfig(r0=2, freeze_ratio=0.2),
    "paper": fast_config(),
    "ela": ard.ElaConfig(r=4, deltaT=3, grace=2),
    "ada, masks": ard.AdaConfig(init_r=4, target_r=2),
    "ada, removes": ard.AdaConfig(init_r=4, target_r=2, removal=True),
    "lora": ard.LoraConfig(r=2),
}


def trained(config: Any, steps: range = range(STEPS), state: Any = None) -> tuple[Any, list[dict[str, Any]], Any]:
    """A loop, its losses, and all states after it; from `state` on where one is given."""
    model, loss = bed()
    ard.wrap(model, config)
    optimizer = AdamW(trainable(model), lr=0.01)
    parts = {"model": model, "optimizer": optimizer}
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(copy.deepcopy(state[name]))
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    if state is not None:
        controller.load_state_dict(json.loads(json.dumps(state["controller"])))
    losses = []
    for t in steps:
        value = loss(t)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append({"step": t + 1, "loss": value.item()})
    parts["controller"] = controller
    states = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    return controller, losses, (model, states)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_a_loop_leaves_its_report(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    controller, losses, (model, _) = trained(config)
    page = controller.report(tmp_path, history=losses, data="toy <rows>", metric_name="accuracy", metric_after=0.75)
    assert page == tmp_path / "report.html"
    metrics, records = load_run(tmp_path)
    assert records == controller.records
    assert metrics["ranks"] == controller.ranks() == metrics["rank_history"][-1]["ranks"]
    counts = ard.parameters_report(model)
    assert metrics["params_live"] == counts.live == metrics["rank_history"][-1]["params"]
    assert metrics["params_peak"] == max(entry["params"] for entry in metrics["rank_history"])
    assert len(metrics["rank_history"]) > 1 or isinstance(config, ard.LoraConfig)
    assert (metrics["steps"], metrics["history"], metrics["epochs"]) == (STEPS, losses, None)
    html = page.read_text(encoding="utf-8")
    for text in ("Training loss", "toy &lt;rows&gt;", "75.0%", f"{STEPS} steps"):
        assert text in html
    page.unlink()
    cli.main(["report", str(tmp_path)])
    assert page.read_text(encoding="utf-8") == html
    assert str(page) in capsys.readouterr().out


def test_two_loops_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where neither told a metric, nor even a loss."""
    monkeypatch.chdir(tmp_path)
    for name in ("anneal", "lora"):
        trained(CONFIGS[name])[0].report(name)
    cli.main(["report", "anneal", "lora"])
    assert "they differ in method" in Path("comparison.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["anneal", "paper", "ela", "ada, masks"])
def test_a_resumed_loop_tells_of_the_whole_run(name: str, tmp_path: Path) -> None:
    unbroken, _, _ = trained(CONFIGS[name])
    _, _, (_, states) = trained(CONFIGS[name], range(STEPS // 2))
    resumed, _, _ = trained(CONFIGS[name], range(STEPS // 2, STEPS), states)
    assert resumed.history == unbroken.history
    assert resumed.metrics()["rank_history"] == unbroken.metrics()["rank_history"]


def test_a_state_of_before_there_was_a_history_is_taken(tmp_path: Path) -> None:
    _, _, (_, states) = trained(CONFIGS["paper"], range(STEPS // 2))
    del states["controller"]["history"]
    resumed, _, _ = trained(CONFIGS["paper"], range(STEPS // 2, STEPS), states)
    resumed.report(tmp_path)
    steps = [entry["step"] for entry in load_run(tmp_path)[0]["rank_history"]]
    assert steps[0] >= STEPS // 2


def test_without_the_packages_that_draw_there_is_what_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller, _, _ = trained(CONFIGS["lora"], range(1))
    monkeypatch.setitem(sys.modules, "ardlora_ext.report.page", None)
    assert controller.report(tmp_path) == tmp_path / "metrics.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "records.jsonl"]


def test_unknown_facts_and_deleted_models_are_refused(tmp_path: Path) -> None:
    controller, _, _ = trained(CONFIGS["lora"], range(1))
    with pytest.raises(ValueError, match=r"report: facts must be data, task, .*, got accuracy"):
        controller.report(tmp_path / "run", accuracy=0.5)
    assert not (tmp_path / "run").exists()


def test_metrics_and_records_of_one_report_are_read_together(tmp_path: Path) -> None:
    """A report that was committed and not moved to its names yet, beside an adapter of another time."""
    metrics = {"ranks": {"up": [1]}, "rank_history": [{"step": 0}], "steps": 1}
    write_set(tmp_path, {**run_files(metrics, []), "ardlora_state.json": b"{}"})
    files = run_files({**metrics, "steps": 2}, [{"step": 2, "event": "grow"}])
    token = "0123456789abcdef"
    (tmp_path / f"records.jsonl.{token}.staged").write_bytes(files["records.jsonl"])
    assert load_run(tmp_path)[0]["steps"] == 1
    (tmp_path / f"metrics.json.{token}.commit").write_bytes(files["metrics.json"])
    found, records = load_run(tmp_path)
    assert (found["steps"], len(records)) == (2, 1)


# --- the history ------------------------------------------------------------------------------------------------------


def test_history_keeps_what_changed_and_stays_short() -> None:
    history = RankHistory()
    for step in range(5000):
        history = history.add(step, 5000 - step // 2, [step // 2, 3])
    assert len(history.entries) <= 400
    assert history.entries[0][0] == 0
    assert history.entries[-1] == (4998, 5000 - 2499, (2499, 3))
    assert history.peak == 5000
    assert RankHistory.from_json(json.loads(json.dumps(history.to_json())), 2) == history


@pytest.mark.parametrize(
    "entries", [[[0, 9, [1, 2, 3]]], [[5, 9, [1, 2]], [4, 9, [1, 3]]], [[0, 9]], [[0, 9, ["x", 1]]], 7]
)
def test_histories_of_other_models_are_refused(entries: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        RankHistory.from_json({"entries": entries, "peak": 9}, 2)
