"""The speed benches: their fairness, their checks, and what they write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ardlora_ext.bench import turns
from ardlora_ext.bench.cli import main
from ardlora_ext.bench.speed import kernels, memory, models, resize, scaling, step
from ardlora_ext.bench.speed.layers import compositions, experts, patterns
from ardlora_ext.bench.speed.layers.compositions import TorchLoop
from ardlora_ext.bench.speed.layers.register import COMPOSITIONS, compose, fitting
from ardlora_ext.errors import InputError
from ardlora_ext.model.record import adapters
from ardlora_ext.native.compiled import core

STEP_KEYS = {
    "model", "dtype", "recipe", "impl", "overhead", "median_ms", "p10_ms", "p90_ms", "tokens_per_s", "control_ms",
    "peak_mb",
}  # fmt: skip


# --- timing -----------------------------------------------------------------------------------------------------------


def test_turns_rotate_and_drift_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock[0])

    def task(name: str, cost: float) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            clock[0] += cost * (1.0 + 0.01 * len(order))  # a machine that gets slower all the time

        return call

    times = turns.in_turns({"a": task("a", 1.0), "b": task("b", 1.5), "c": task("c", 1.0)}, 6, "test")
    warm_up, rounds = order[:6], order[6:]
    assert warm_up == ["a", "a", "b", "b", "c", "c"]
    assert ["".join(rounds[i : i + 3]) for i in range(0, 9, 3)] == ["abc", "bca", "cab"]
    assert times.ratio("b", "a") == pytest.approx(1.5, rel=0.03)
    assert times.difference("c", "a") == pytest.approx(0.0, abs=0.03)
    drift = [np.median(times.seconds["a"][:2]), np.median(times.seconds["a"][-2:])]
    assert drift[1] > 1.05 * drift[0]


def test_short_calls_are_repeated_and_counted_once() -> None:
    times = turns.in_turns({"sleepless": lambda: None}, 2, "test")
    assert times.seconds["sleepless"].shape == (2,)
    assert times.spread("sleepless")[0] < 1e-4


# --- patterns and compositions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factoring", ["shared", "independent"])
def test_ragged_heads_cost_what_uniform_ranks_cost(factoring: patterns.Factoring) -> None:
    ((layout, ranks),) = patterns.ragged(1024, factoring)
    budget = 8 * 2 * 1024
    assert 0.9 * budget <= layout.parameters(ranks) <= budget
    assert len(set(ranks)) > 2
    assert len(patterns.PATTERNS["adalora-56"](64)) == 56


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["uniform-8", "heads-shared", "heads-independent"])
def test_all_compositions_compute_the_same(pattern: str, dtype: torch.dtype) -> None:
    (site,) = patterns.sites(pattern, 128, dtype, 19)
    x, dy = torch.randn(19, 128).to(dtype), torch.randn(19, 128).to(dtype)
    names = fitting([name for name in COMPOSITIONS if name != "base"], site, 0.0)
    assert {"ours", "peft", "torch-padded"} <= set(names)
    assert ("torch-bmm" in names) == (pattern != "uniform-8")
    for name in names:
        assert 0.0 < compositions.check(name, compose(name, site, 0.0), x, dy) < 4e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["experts", "experts-ragged-skewed"])
def test_all_compositions_of_experts_compute_the_same(pattern: str, dtype: torch.dtype) -> None:
    (site,) = patterns.sites(pattern, 64, dtype, 40)
    assert sum(site.ranks) == 8 * len(site.ranks)
    assert sum(site.counts) == 40
    assert (max(site.counts) >= 20) == pattern.endswith("skewed")
    assert 0 in site.counts
    x, dy = torch.randn(40, 64).to(dtype), torch.randn(40, 64).to(dtype)
    names = fitting([name for name in COMPOSITIONS if name != "base"], site, 0.0)
    assert set(names) == {"ours", "peft", "torch-grouped_mm", "torch-loop"}
    assert "peft" not in fitting(names, site, 0.1)
    for name in names:
        assert 0.0 < compositions.check(name, compose(name, site, 0.0), x, dy) < 4e-2


def test_check_finds_an_expert_that_is_wrong() -> None:
    class Wrong(experts.TorchLoop):
        def folded_gradients(self) -> compositions.Gradients:
            a, b = super().folded_gradients()
            return a.index_copy(0, torch.tensor([3]), 1.01 * a[3:4]), b

    (site,) = patterns.sites("experts", 64, torch.float32, 200)
    with pytest.raises(InputError, match="wrong must agree with float64"):
        compositions.check("wrong", Wrong(site, 0.0), torch.randn(200, 64), torch.randn(200, 64))


def test_check_finds_a_wrong_gradient() -> None:
    class Wrong(TorchLoop):
        def folded_gradients(self) -> compositions.Gradients:
            a, b = super().folded_gradients()
            return a, 1.01 * b

    (site,) = patterns.sites("heads-shared", 128, torch.float32, 19)
    x, dy = torch.randn(19, 128), torch.randn(19, 128)
    with pytest.raises(InputError, match=r"wrong must agree with float64 to 0\.0001, got a relative error of 0\.01"):
        compositions.check("wrong", Wrong(site, 0.0), x, dy)


@pytest.mark.parametrize("pattern", ["heads-independent", "experts"])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_dropout_is_at_work_in_training_alone(name: str, pattern: str) -> None:
    (site,) = patterns.sites(pattern, 128, torch.float32, 4)
    if not fitting([name], site, 0.5):
        pytest.skip("not there, or not in this torch")
    made = compose(name, site, 0.5)
    x = torch.randn(4, 128)
    torch.manual_seed(0)
    assert torch.equal(made.train()(x), made(x)) == (name == "base")
    assert torch.equal(made.eval()(x), made(x))


# --- whole models -----------------------------------------------------------------------------------------------------


def test_rank_controllers_are_timed_while_ranks_may_move() -> None:
    base, batch = models.make_model("bert", torch.float32, 32, small=True)
    for name in ("ours-ard", "ours-ela"):
        runner = models.make_runner(name, base, batch, 4)
        assert all(layer.lora_B.any() for layer in adapters(runner.model).values())
        before = {n: p.detach().clone() for n, p in runner.model.named_parameters()}
        controller = runner.model._ardlora.controller
        runner.step()
        assert controller.step == models.NOW + 1
        assert controller.summary()["phase"] not in ("warmup", "initial", "frozen", "final")
        same = [torch.equal(p, before[n]) for n, p in runner.model.named_parameters() if p.shape == before[n].shape]
        assert same  # the optimizer changes nothing but ranks
        assert all(p.grad is None for p in runner.model.parameters())


def test_check_of_step_finds_a_wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "agree with the reference" in step.check("bert", 32, 4, small=True)
    right = step.lora_linear
    monkeypatch.setattr(step, "lora_linear", lambda *args: 1.01 * right(*args))
    with pytest.raises(InputError, match="on bert must agree with the reference"):
        step.check("bert", 32, 4, small=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT about a name in transformers
def test_memory_counts_what_backward_keeps() -> None:
    names = ["frozen", "ours-lora", "ours-lora-dropout", "peft-lora-dropout"]
    rows = {row["impl"]: row for row in memory.measure("bert", "float32", names, 64, 4, small=True)}
    assert rows["ours-lora"]["saved_mb"] == pytest.approx(rows["ours-lora-dropout"]["saved_mb"], abs=1e-3)  # seeds
    assert 0.0 < rows["ours-lora"]["saved_above_mb"] < rows["peft-lora-dropout"]["saved_above_mb"]
    assert rows["frozen"]["trained_mb"] == 0.0


def test_peak_is_that_of_the_step() -> None:
    kept = memory.peak_mb(lambda: torch.ones(8 << 20))  # 32 MiB
    if kept is None:
        pytest.skip("the system does not tell")
    assert 25.0 < kept < 60.0


# --- kernels and resize -----------------------------------------------------------------------------------------------


def test_check_of_kernels_finds_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "agree with float64" in kernels.check(["float32", "bfloat16", "float16"])
    monkeypatch.setattr(kernels, "core", _WrongCore())
    with pytest.raises(InputError, match="expand in float32 must agree with float64"):
        kernels.check(["float32"])


class _WrongCore:
    def __getattr__(self, name: str) -> object:
        return getattr(core, name)

    def expand(self, *args: object) -> None:
        core.expand(*args)  # type: ignore[arg-type]
        core.expand(*args)  # type: ignore[arg-type]


def test_events_lead_there_and_back() -> None:
    bed = resize.Bed(2 * 16 * 2 * 64, 64)
    assert len(adapters(bed.model)) == 2
    for name, event, back in resize.events():
        start = next(iter(adapters(bed.model).values())).ranks
        if name == "double":
            resize.apply(bed.model, bed.change(resize.Event(tuple(range(8)))), bed.optimizer)
        resize.apply(bed.model, bed.change(event), bed.optimizer)
        assert [layer.ranks for layer in adapters(bed.model).values()] == [[event.rank]] * 2
        resize.apply(bed.model, bed.change(back), bed.optimizer)
        assert name == "double" or next(iter(adapters(bed.model).values())).ranks == start


@pytest.mark.parametrize("kind", ["ard, heads", "ard, matrices", "elalora, matrices"])
def test_scaling_takes_decisions_and_changes_all_ranks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bed = scaling.Bed(kind, 80, 4)
    assert bed.units == len(bed.controller.units) == 80
    assert bed.matrices == (2 if kind == "ard, heads" else 80)
    assert bed.controller.phase == "adapt"
    step, host, decision = bed.steps(1)
    assert 0 < host < step
    assert decision >= 0
    if kind.startswith("ard"):
        assert bed.controller.slope.spectrum is not None  # type: ignore[attr-defined]
    else:
        assert bed.controller.importance.scores().any()  # type: ignore[attr-defined]
    seen: list[list[int]] = []

    def noted(model: nn.Module, *rest: Any) -> None:
        resize.apply(model, *rest)
        seen.append([r for layer in bed.layers.values() for r in layer.ranks])

    before = [r for layer in bed.layers.values() for r in layer.ranks]
    monkeypatch.setattr(scaling, "apply", noted)
    bed.change(1)
    assert seen == 2 * [[r - 1 for r in before], before]


def test_exponent_of_growth() -> None:
    rows = [{"at": at, "step_ms": 3e-3 * at**1.5, "decision_ms": None} for at in (10, 100, 1000)]
    assert scaling.exponent(rows, "step_ms") == pytest.approx(1.5)
    assert scaling.exponent(rows, "decision_ms") is None
    assert scaling.exponent(rows[:1], "step_ms") is None


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "keys", "says"),
    [
        (
            "step --check --models bert --impl ours-lora peft-lora ours-ard --dtypes float32 --tokens 32 --repeats 2",
            STEP_KEYS,
            "ours-lora has",
        ),
        (
            "step --models bert --impl ours-lora peft-lora --dtypes float32 --tokens 32 --repeats 1 --recipe autocast",
            STEP_KEYS,
            "bert float32 autocast: ours-lora has",
        ),
        (
            "step --models bert --impl ours-lora peft-lora --dtypes float32 --tokens 32 --repeats 1 --recipe trainer",
            STEP_KEYS,
            "bert float32 trainer: ours-lora has",
        ),
        (
            "host --recipes dropout gates --repeats 2",
            {"recipe", "impl", "forward_us", "backward_us", "above_us", "share"},
            "of what PEFT adds to a layer",
        ),
        (
            "layer --check --patterns uniform-8 heads-independent --dtypes float32 --dropouts 0.1 --rows 8 --rounds 2",
            {"pattern", "dtype", "dropout", "impl", "median_s", "adapter_s", "overhead"},
            "x uniform rank 8",
        ),
        (
            "layer --patterns experts experts-ragged --dtypes float32 --dropouts 0 --rows 32 --rounds 2 --clock cpu",
            {"pattern", "dtype", "dropout", "impl", "median_s", "adapter_s", "overhead"},
            "x uniform rank 8",
        ),
        (
            "kernels --check --ops shrink --dtypes float32 --rows 256 --repeats 2 --threads 1",
            {"op", "rows", "ranks", "isa", "threads", "us", "gb_s", "gflop_s", "roofline"},
            "of the roofline, geometric mean",
        ),
        (
            "memory --models vit --impl ours-lora --dtypes float32 --tokens 50",
            {"model", "impl", "saved_mb", "saved_above_mb", "peak_mb"},
            "peak of a step",
        ),
        (
            "resize --parameters 70000 --features 64 --rounds 2 --clock cpu",
            {"event", "median_ms", "gb_s", "ratio", "allocated", "matrix_us"},
            "x memcpy",
        ),
        (
            "scaling --units 100 --rounds 1",
            {"sweep", "kind", "at", "units", "parameters", "step_ms", "decision_ms", "change_ms", "layer_ms"},
            "ard, heads: grows with units to the power of: step ",
        ),
    ],
)
def test_quick_run_prints_and_writes(
    words: str,
    keys: set[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [*words.split(), "--quick", "--json", "out.json", "--plot", "out.png"]
    assert main(command) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert says in printed
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["command"] == "python -m ardlora_ext.bench " + " ".join(command)
    assert saved["command"] in printed
    assert saved["machine"]["commit"] is None or len(saved["machine"]["commit"]) >= 7
    assert all(row.keys() >= keys for row in saved["rows"])
    if words.startswith("step"):
        assert all(row.keys() == keys for row in saved["rows"])
        assert saved["rows"][0]["impl"] == "frozen"
        assert saved["rows"][0]["overhead"] == 0.0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("step --tokens 0", "--tokens, --r and --repeats must be at least 1"),
        ("host --repeats 0", "--repeats must be at least 1"),
        ("layer --dropouts 1", "--dropouts in [0, 1)"),
        ("layer --features 100", "--features must be a multiple of 64, got 100"),
        ("kernels --repeats 0", "--repeats must be at least 1"),
        ("memory --r 0", "--r must be at least 1"),
        ("resize --rounds 0", "--rounds must be at least 1"),
        ("resize --features 8", "--features at least 16"),
        ("scaling --units 9", "--units must be at least 10"),
        ("resize --plot nowhere/x.png", "--plot must be a file in an existing, writable folder"),
    ],
)
def test_bad_options_end_in_one_sentence(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    assert message in error
