"""The report: drawn from saved files alone, self-contained, and true to them."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from ardlora_ext.errors import InputError
from ardlora_ext.file_set import write_set
from ardlora_ext.report import places, plots
from ardlora_ext.report.numbers import format_duration
from ardlora_ext.report.page import render, write_report
from ardlora_ext.report.run_files import run_files, write_page
from ardlora_ext.report.summary import print_summary

from helpers.run_files import metrics_of, ranks_of, record

PNG_HEAD = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = [record(10), record(20, event="prune", **{"from": 5, "to": 1})]
    write_set(tmp_path, run_files(metrics_of(), records))
    return tmp_path


def pictures(html: str) -> list[bytes]:
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)"', html)
    return [base64.b64decode(text, validate=True) for text in found]


def page(metrics: dict[str, Any], records: list[dict[str, Any]] | None = None) -> str:
    return render(metrics, records or [])


# --- report.html ----------------------------------------------------------------------------------------------------


def test_report_is_one_self_contained_file(folder: Path) -> None:
    html = write_report(folder).read_text(encoding="utf-8")
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "records.jsonl", "report.html"]
    assert len(pictures(html)) == html.count("<figure>") == 4
    assert all(png.startswith(PNG_HEAD) for png in pictures(html))
    outside = re.sub(r"data:image/png;base64,[^\"]+", "", html)
    assert not re.search(r"https?:|<script|<link|@import|url\(|src=\"(?!\")", outside)


def test_report_tells_the_numbers(folder: Path) -> None:
    html = write_report(folder).read_text(encoding="utf-8")
    for text in ("50.0%", "87.5%", "12,345", "23,456", "12,500", "12 s", "8 ms a step", "512", "all-linear", "2.13.0"):
        assert text in html
    assert "python -m ardlora_ext finetune --out &#39;my run&#39;" in html
    assert "Ranks from 1 to 9: 10 of 20 units are above the mean, 5.0." in html
    assert "Most rank by layer: 1 (mean 9.0); least: 0 (mean 1.0)." in html
    assert "gain above price" in html
    assert 'class="up">5<' in html
    assert 'class="down">1<' in html


def test_report_is_the_same_for_the_same_files(folder: Path) -> None:
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_fixed_ranks_have_no_curves_of_ranks() -> None:
    ranks = ranks_of(8, 8)
    history = [{"step": 0, "params": 20000, "ranks": ranks}]
    html = page(metrics_of(method="lora", ranks=ranks, rank_history=history, params_budget=None))
    assert len(pictures(html)) == 2
    assert "Every unit has rank 8." in html
    assert "No rank was changed in this run." in html
    assert "budget none" in html


def test_few_decisions_are_open_many_are_folded_and_very_many_are_cut() -> None:
    assert "<details open>" in page(metrics_of(), [record(1)] * 3)
    assert "<details open>" not in page(metrics_of(), [record(1)] * 30)
    html = page(metrics_of(), [record(1)] * 2500)
    assert "The first 2,000 are listed; all are in records.jsonl." in html
    assert html.count("gain above price") == 2000


def test_records_may_lack_keys_and_are_escaped() -> None:
    html = page(metrics_of(), [{"step": 3, "event": "skip", "reason": "<b>gradient</b> is not finite"}])
    assert "&lt;b&gt;gradient&lt;/b&gt; is not finite" in html


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_both_metrics_are_drawn(metric: str) -> None:
    html = page(metrics_of(metric_name=metric, metric_before=145.25, metric_after=53.0, task="lm"))
    assert ("53" if metric == "perplexity" else "5300.0%") in html


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", None, r"must hold metrics\.json and records\.jsonl of a run"),
        ("records.jsonl", None, r"must hold metrics\.json and records\.jsonl of a run"),
        ("metrics.json", "{", r"must be JSON"),
        ("metrics.json", "[]", r"must hold the ranks of a run, got none"),
        ("metrics.json", '{"ranks": {"a": [1]}, "rank_history": [{}]}', r"must be complete"),
    ],
)
def test_unusable_run_is_refused_and_the_old_report_stays(
    folder: Path, name: str, content: str | None, message: str
) -> None:
    (folder / "report.html").write_text("old")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        write_report(folder)
    assert (folder / "report.html").read_text() == "old"


def test_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    write_page(path, "old")

    def crash(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write_page(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


# --- figures ----------------------------------------------------------------------------------------------------------


def test_kinds_get_the_shortest_name_that_tells_them_apart() -> None:
    names = places.kind_labels(ranks_of(1, 2))
    assert list(dict.fromkeys(names.values())) == ["query", "attention.output", "intermediate", "output"]


def test_kinds_of_two_stacks_stay_apart() -> None:
    modules = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    assert list(places.kind_labels(modules).values()) == ["encoder.SelfAttention.q", "decoder.SelfAttention.q"]
    assert list(places.layer_names(modules).values()) == ["encoder.block.0", "decoder.block.0"]


@pytest.mark.parametrize("modules", [["0", "2"], ["fc"], ["h.0.fc", "h.1.fc", "head"]])
def test_any_naming_is_drawn(modules: list[str]) -> None:
    ranks = {name: [index] for index, name in enumerate(modules)}
    history = [
        {"step": 0, "params": 9, "ranks": {name: [1] for name in modules}},
        {"step": 5, "params": 3, "ranks": ranks},
    ]
    assert len(places.kind_labels(modules)) == len(modules)
    for png in (plots.rank_heatmap(ranks), plots.ranks_over_time(history, 9), plots.params_over_time(history, 5, 9)):
        assert png.startswith(PNG_HEAD)


def test_the_scale_ends_at_the_largest_rank_and_marks_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "png", lambda figure: drawn.append(figure) or b"")
    plots.rank_heatmap({"h.0.fc": [1, 3], "h.1.fc": [8, 0]})
    scale = drawn[0].axes[-1]
    assert scale.get_xlim() == (0, 8)
    assert scale.get_xlabel().endswith("the line marks the mean, 3.0")


def test_a_large_model_is_drawn() -> None:
    ranks = {f"model.layers.{layer}.self_attn.{kind}_proj": [8] * 32 for layer in range(60) for kind in "qkvo"}
    assert plots.rank_heatmap(ranks).startswith(PNG_HEAD)


def test_a_hundred_experts_are_not_hidden_by_their_edges() -> None:
    ranks = {f"model.layers.{layer}.mlp.experts.down_proj": [16] * 128 for layer in range(48)}
    picture = imread(io.BytesIO(plots.rank_heatmap(ranks)))
    dark = (picture[..., :3].max(axis=-1) < 0.5).mean(axis=1) > 0.6  # rows of pixels: of the bars, and of the tiles
    assert dark.sum() / len(dark) > 0.5


# --- the closing table ------------------------------------------------------------------------------------------------


def test_closing_table(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    console = Console(file=io.StringIO(), width=110)
    print_summary(json.loads((folder / "metrics.json").read_text()), folder, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in ("50.0% → 87.5%", "12,345 live", "23,456 at the peak, budget 12,500", "512 MB", "records.jsonl"):
        assert part in text
    assert re.search(r"│\s+1 │\s+10 │\s+9\.00 │\s+9 │\s+9 │", text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.234, "1.2 s"), (42.4, "42 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
