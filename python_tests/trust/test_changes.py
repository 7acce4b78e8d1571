"""Signals that wait, changes that happen whole or not at all, and states that fit."""

from __future__ import annotations

import random
import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

import ardlora_ext as ard
from ardlora_ext.bench.trust.beds import CONFIGS, Block, Tally, build
from ardlora_ext.bench.trust.changes import Bed, Change, Lines
from ardlora_ext.model.record import injection
from ardlora_ext.native.transfers import Fetched
from ardlora_ext.ranks.controllers.ard.slopes import row_dots
from ardlora_ext.ranks.controllers.svd.importance import Importance
from ardlora_ext.ranks.controllers.svd.soft_orthogonality import Rows, add_penalty_gradients
from ardlora_ext.ranks.controllers.units import Units
from ardlora_ext.unbroken import unbroken, undone_by


def test_signals_wait_for_the_end_of_a_block() -> None:
    done: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: done.append("asked to end"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), unbroken():  # noqa: PT012 - it comes at the end
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            with unbroken():  # the outer block holds
                done.append("first")
            done.append("last")
        assert done == ["first", "last", "asked to end"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(ZeroDivisionError), unbroken():
            _ = 1 // 0
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_hold_nothing() -> None:
    found: list[object] = []

    def work() -> None:
        with unbroken():
            found.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_what_fails_is_undone_unless_it_is_kept() -> None:
    undone: list[int] = []
    with pytest.raises(KeyboardInterrupt), undone_by(lambda: undone.append(1)):
        raise KeyboardInterrupt
    with undone_by(lambda: undone.append(2)):
        pass
    with pytest.raises(KeyError), undone_by(lambda: undone.append(3)) as keep:  # noqa: PT012
        keep()
        raise KeyError
    assert undone == [1]


@pytest.mark.parametrize("name", ["ard", "ela", "ada"])
def test_a_rank_change_that_fails_leaves_controller_and_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a decision did to the controller is taken back with it, and the next step decides again."""
    model, optimizer = build(CONFIGS[name], steps=3)
    controller = injection(model).controller
    failed = 0
    if name != "ard":  # averages take a step in, in place, in one native call
        controller.importance.update = lambda: Fetched([])

    def broken(*_: Any, **__: Any) -> None:
        raise MemoryError

    for t in range(60 - 3):
        model(torch.randn(4, 16)).square().mean().backward()
        controller.observe()
        gated = [layer for layer in ard.adapters(model).values() if layer.gate is not None]
        before, gates = controller.state_dict(), [layer.gate.clone() for layer in gated]  # type: ignore[union-attr]
        with monkeypatch.context() as patch:
            patch.setattr("ardlora_ext.ranks.resize.apply", broken)
            try:
                controller.carry_out(controller.propose)
            except MemoryError:
                failed += 1
                assert controller.state_dict() == before
                now = [layer.gate for layer in gated]
                assert all(map(torch.equal, now, gates))  # type: ignore[arg-type]
                patch.undo()
                controller.carry_out(controller.propose)
        optimizer.zero_grad()
        assert controller.step == 4 + t
    assert failed


@pytest.mark.parametrize("name", ["ard", "ela", "ada"])
def test_an_end_of_the_ranks_that_is_interrupted_comes_whole_or_not_at_all(name: str) -> None:
    def made() -> Bed:
        model, optimizer = build(CONFIGS[name], steps=11)
        return Bed(model, optimizer, injection(model).controller.finalize)

    tally = Tally()
    change = Change(tally, name, made)
    lines = change.whole("Ctrl-C")
    assert isinstance(lines, Lines)
    places = sorted({last for _, last in lines.places.values()})
    for at in {*places[-8:], *places[:: -(-len(places) // 24)]}:  # the end assigns
        change.stop("Ctrl-C", at)
    assert not tally.failures


def test_ela_with_one_huge_gradient_can_be_saved(tmp_path: Path) -> None:
    model, optimizer = build(ard.ElaConfig(r=3, b=1, deltaT=2))
    for t in range(60):
        model(torch.randn(8, 16)).square().mean().backward()
        if t == 20:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = 3e38  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    scores = injection(model).controller.scores()
    assert max(map(max, scores.values())) > 1e38
    ard.save_pretrained(model, tmp_path)
    again = ard.load_pretrained(Block(), tmp_path)
    trained = [p for p in again.parameters() if p.requires_grad]
    with pytest.warns(UserWarning, match="ranks of this adapter are final"):
        assert ard.attach(again, torch.optim.AdamW(trained)).scores() == scores  # type: ignore[attr-defined]


def test_a_compressed_ela_model_saves_a_state_that_fits(tmp_path: Path) -> None:
    model, optimizer = build(CONFIGS["ela"], steps=6)
    injection(model).controller.finalize()
    ard.compress(model, 0.5, optimizer=optimizer)
    ard.save_state(model, optimizer, tmp_path)
    other, another = build(CONFIGS["ela"])
    ard.load_state(other, another, tmp_path)
    assert injection(other).controller.state_dict() == injection(model).controller.state_dict()
    state = injection(model).controller.state_dict()
    for key, bad in (("born", [[0]] * 3), ("importance", {"released": [[0.0]] * 3})):
        with pytest.raises(ValueError, match=f"state: {'released' if key == 'importance' else key} must have"):
            injection(other).controller.load_state_dict(state | {key: bad})
    assert injection(other).controller.state_dict() == state


def test_attach_names_a_foreign_state() -> None:
    model, _ = build(CONFIGS["ela"], steps=3)
    foreign = injection(model).controller.state_dict()
    other = ard.wrap(Block(), CONFIGS["ard"])
    injection(other).controller_state = foreign
    with pytest.raises(ValueError, match="the adapter's saved state must be one of AnnealController, got no '"):
        ard.attach(other, total_steps=60)
    assert injection(other).controller is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_another_dtype_than_their_weights_are_read_as_they_are(dtype: torch.dtype) -> None:
    """`p.data = p.data.to(bfloat16)` leaves a float32 gradient."""
    torch.manual_seed(0)
    model = ard.wrap(Block(), ard.ElaConfig(r=3, total_steps=60, b=1, deltaT=2))
    layers = ard.adapters(model)
    for p in (p for p in model.parameters() if p.requires_grad):
        p.data, p.grad = torch.randn(p.shape).to(dtype), None
    grads = {p: torch.randn(p.shape).to(dtype).float() for layer in layers.values() for p in layer.factors.values()}

    def passes() -> list[Any]:
        units, means = Units(layers), Importance(list(layers.values()), 0.85, 0.9)
        dots = row_dots(units, [p.grad for p in units.gated], [p.grad for p in units.ungated])()
        assert all(means.update().values())
        layer = layers["up"]
        assert layer.lora_A.grad is not None
        add_penalty_gradients([Rows(layer.lora_A, layer.lora_A.grad, 0, 3, 0.1)], "squared")
        return [*dots, *(t for module in means.sensitivity for t in module), layer.lora_A.grad.float()]

    found = []
    for mixed in (True, False):
        for p, grad in grads.items():
            p._grad = None
            torch.Tensor.grad.__set__(p, grad.to(dtype))  # type: ignore[attr-defined]
            if mixed:
                p.grad.data = grad.clone()  # type: ignore[union-attr]
        found.append(passes())
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-2, atol=1e-2)


def look(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for name, layer in ard.adapters(model).items():
        table, rows = layer.layout.encode(layer.ranks), layer.layout.rows(layer.ranks)
        assert torch.equal(layer.rank_table, table), name
        assert [len(layer.lora_A), len(layer.lora_B)] == list(layer.capacities(*rows)), name
        assert layer.gate is None or len(layer.gate) == len(layer.gated), name
        for p in layer.factors.values():
            assert all(v.shape == p.shape for v in optimizer.state[p].values() if v.dim()), name


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such timer there")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["ard", "ela"])
def test_a_signal_in_a_training_loop_leaves_a_model_that_trains_on(name: str) -> None:
    """From outside at random moments, as Ctrl-C comes: ranks, moments and tables agree, and the loop goes on."""
    rng = random.Random(0)
    came: list[int] = []  # Python drops what is raised in a callback of a weak reference, and says so in a warning

    def interrupt(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def step() -> None:
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        model, optimizer = build(CONFIGS[name], steps=1)
        for _ in range(40):
            with suppress(KeyboardInterrupt):
                came.clear()
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, 0.02))
                while not came:
                    step()
            torch.set_grad_enabled(True)  # torch leaves it off where a signal meets no_grad() on its way in
            look(model, optimizer)
            step()
            if rng.random() < 0.3:
                model, optimizer = build(CONFIGS[name], steps=1)
    finally:
        signal.signal(signal.SIGALRM, before)
