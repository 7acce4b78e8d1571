"""A killed and resumed run equals the unbroken one bit for bit, wherever it stopped.

Run as a script (`python test_resume.py FOLDER`), it is the process that gets killed.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR

import ardlora_ext as ard
from ardlora_ext.checkpoint.training_state import RESUME, RESUME_TENSORS
from ardlora_ext.file_set import read_set

from helpers.adapters import fingerprint
from helpers.models import Attention, trainable
from helpers.training import bed, fast_config

STEPS = 40


def config(**options: Any) -> ard.ArdConfig:
    """Warmup to step 4, adapt to 26, harden to 31, then frozen."""
    return fast_config(**{"warmup_ratio": 0.1, "harden_ratio": 0.13, "lora_dropout": 0.1, **options})


class Run:
    """A training script: everything made from scratch, every source of randomness in use."""

    def __init__(self, of: ard.AdapterConfig | None = None, attach: bool = True, **options: Any) -> None:
        self.model, self.loss = bed()
        ard.wrap(self.model, config() if of is None else of)
        self.optimizer: Optimizer = AdamW(trainable(self.model), lr=0.01, amsgrad=True, **options)
        self.scheduler = CosineAnnealingLR(self.optimizer, STEPS)
        if attach:
            self.attach()
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)

    def attach(self) -> None:
        self.controller = ard.attach(self.model, self.optimizer, total_steps=STEPS)

    def step(self) -> None:
        t = random.randrange(STEPS)
        noise = float(torch.rand(())) + float(np.random.rand())
        (self.loss(t) * noise).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def steps(self, until: int) -> Run:
        while self.controller.step < until:
            self.step()
        return self

    def save(self, folder: Path) -> None:
        ard.save_state(self.model, self.optimizer, folder, scheduler=self.scheduler)

    def load(self, folder: Path) -> Run:
        ard.load_state(self.model, self.optimizer, folder, scheduler=self.scheduler)
        return self


def assert_equal(ours: Run, theirs: Run) -> None:
    a, b = ours.model.state_dict(), theirs.model.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert ours.controller.state_dict() == theirs.controller.state_dict()
    assert ours.scheduler.state_dict() == theirs.scheduler.state_dict()
    mine, other = ours.optimizer.state_dict(), theirs.optimizer.state_dict()
    assert mine["param_groups"] == other["param_groups"]
    for index, entry in other["state"].items():
        assert all(torch.equal(entry[key], mine["state"][index][key]) for key in entry)


@pytest.mark.parametrize("first", ["attach", "load"])
def test_every_phase(first: str, tmp_path: Path) -> None:
    whole, saving = Run().steps(STEPS), None
    phases = []
    for k in (1, 4, 5, 13, 25, 27, 29, 31, 32, 39):
        saving = (Run() if saving is None else Run().load(tmp_path)).steps(k)
        saving.save(tmp_path)
        phases.append(saving.controller.summary()["phase"])
        resumed = Run(attach=first == "attach").load(tmp_path)
        if first == "load":
            resumed.attach()
        assert_equal(resumed, saving)
        assert_equal(resumed.steps(STEPS), whole)
    assert set(phases) == {"warmup", "adapt", "harden", "frozen"}
    assert sorted(os.listdir(tmp_path)) == [RESUME, RESUME_TENSORS]


@pytest.mark.parametrize("granularity", ["matrix", "layer"])
@pytest.mark.parametrize("capacity", ["elastic", "fixed"])
def test_granularities_and_capacities(granularity: Any, capacity: Any, tmp_path: Path) -> None:
    of = config(granularity=granularity, capacity=capacity, head_dim=None, slope="tangent", r_max=4)
    Run(of).steps(17).save(tmp_path)
    assert_equal(Run(of).load(tmp_path).steps(STEPS), Run(of).steps(STEPS))


@pytest.mark.parametrize(
    "of",
    [
        ard.LoraConfig(r=2, lora_dropout=0.1),
        ard.DoraConfig(r=2),
        ard.ElaConfig(r=3, deltaT=2, b=2, total_steps=STEPS),
        ard.ElaConfig(r=3, deltaT=2, b=2, total_steps=STEPS, mode="code"),
        ard.AdaConfig(init_r=3, target_r=2, total_steps=STEPS),
        ard.AdaConfig(init_r=3, target_r=2, total_steps=STEPS, removal=True),
    ],
)
def test_other_methods(of: ard.AdapterConfig, tmp_path: Path) -> None:
    whole = Run(of).steps(STEPS)
    for k in (3, 15, 35):
        Run(of).steps(k).save(tmp_path)
        assert_equal(Run(of).load(tmp_path).steps(STEPS), whole)


# kill -9.

DEATHS = {3: "warmup", 12: "adapt", 29: "harden", 33: "frozen"}  # steps
SOME_CALLS = (-1, 0, 3, 5, 7)  # where the process dies: between step and save, or before that call of the save


class Dying:
    """Kills the process before its n-th call that syncs, renames or removes a file; never for None."""

    def __init__(self, left: int | None) -> None:
        self.left = left
        self.calls = {"replace": os.replace, "fsync": os.fsync, "unlink": os.unlink}

    def __enter__(self) -> None:
        for name, call in self.calls.items():
            setattr(os, name, self._counting(call))

    def __exit__(self, *error: object) -> None:
        for name, call in self.calls.items():
            setattr(os, name, call)

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left = None if self.left is None else self.left - 1
            return call(*args, **kwargs)

        return counting


def in_a_process(work: Callable[[], None]) -> bool:
    """Tell whether `work` was killed."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.WEXITSTATUS(status) == 0
    return killed


def unbroken(folder: Path) -> None:
    """Save what there is around each death."""
    run = Run()
    for step in sorted({s for death in DEATHS for s in (death - 1, death, death + 1)}):
        run.steps(step).save(folder / str(step))


def one_life(folder: Path, until: int, dying: int | None) -> None:
    """Go on from what the folder holds, saving at the end."""
    run = Run().load(folder)
    run.steps(until)
    if dying == -1:  # between a step and its save
        os.kill(os.getpid(), signal.SIGKILL)
    with Dying(dying):
        run.save(folder)


def main(folder: Path) -> None:
    """Print, for every death, [step, call, step of what was left, whether the next life ends as the unbroken run]."""
    torch.set_num_threads(1)
    in_a_process(partial(unbroken, folder))
    lives = []
    for step in DEATHS:
        for dying in itertools.count(-1) if DEATHS[step] == "adapt" else SOME_CALLS:
            work = folder / f"{step} {dying}"
            shutil.copytree(folder / str(step - 1), work)
            if not in_a_process(partial(one_life, work, step, dying)):
                break  # a save has no more calls than these
            at = json.loads(read_set(work, [RESUME], RESUME)[RESUME])["controller"]["step"]
            in_a_process(partial(one_life, work, step + 1, None))
            same = all(
                (work / name).read_bytes() == (folder / str(step + 1) / name).read_bytes()
                for name in (RESUME, RESUME_TENSORS)
            )
            lives.append([step, dying, at, same])
    print(json.dumps(lives))


@pytest.mark.skipif(os.name != "posix", reason="no kill -9 here")
def test_kill_9_between_and_during_saves(tmp_path: Path) -> None:
    command, paths = [sys.executable, __file__, str(tmp_path)], {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lives = json.loads(done.stdout)
    for death, phase in DEATHS.items():
        state = json.loads((tmp_path / str(death) / RESUME).read_text())["controller"]
        assert (state["target"] is None, state["harden_from"] is None) == {
            "warmup": (True, True),
            "adapt": (True, True),
            "harden": (False, False),
            "frozen": (False, True),
        }[phase]
        mine = [life for life in lives if life[0] == death]
        assert len(mine) >= (8 if phase == "adapt" else 4)
        assert {at for _, _, at, _ in mine} == {death - 1, death}, "some deaths leave the old state, some the new"
        assert [life for life in mine if not life[3]] == []


# What is refused, before anything changes.


def _other_optimizer(run: Run) -> None:
    run.optimizer = SGD(trainable(run.model), lr=0.1)


def _other_groups(run: Run) -> None:
    run.optimizer = AdamW([{"params": [p]} for p in trainable(run.model)])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_other_optimizer, r"optimizer must be AdamW with groups of \[8\] parameters, got SGD with \[8\]"),
        (_other_groups, r"must be AdamW with groups of \[8\] parameters, got AdamW with \[1, 1, 1, 1, 1, 1, 1, 1\]"),
    ],
)
def test_other_optimizers_are_refused(spoil: Callable[[Run], None], message: str, tmp_path: Path) -> None:
    Run().steps(3).save(tmp_path)
    run = Run(attach=False)
    spoil(run)
    before = fingerprint(run.model)
    with pytest.raises(ValueError, match=message):
        run.load(tmp_path)
    assert fingerprint(run.model) == before


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (config(r0=3), "load_state: config must be the saved one, with r0=2, got 3"),
        (ard.LoraConfig(), "config must be the saved one"),
        (config(target_modules=["q_proj"]), "config must be the saved one, with target_modules='all-linear'"),
    ],
)
def test_other_configs_are_refused(of: ard.AdapterConfig, message: str, tmp_path: Path) -> None:
    Run().steps(3).save(tmp_path)
    run = Run(of)
    before = fingerprint(run.model)
    with pytest.raises(ValueError, match=message):
        run.load(tmp_path)
    assert fingerprint(run.model) == before


def test_other_models_and_files_are_refused(tmp_path: Path) -> None:
    run = Run()
    with pytest.raises(FileNotFoundError, match=r"load_state: directory must hold ardlora_resume\.json"):
        run.load(tmp_path)
    run.steps(3).save(tmp_path)
    wide = ard.wrap(Attention(64), config())
    with pytest.raises(ValueError, match=r"load_state: 'down\.lora_A' must have shape \[\d, 64\], got \[\d, 128\]"):
        ard.load_state(wide, AdamW(trainable(wide)), tmp_path, scheduler=run.scheduler)
    deep = ard.wrap(nn.Sequential(Attention(), Attention()), config())
    optimizer = AdamW(trainable(deep)[:8])
    with pytest.raises(ValueError, match="model must train what the saved one did, got a difference in '0"):
        ard.load_state(deep, optimizer, tmp_path, scheduler=run.scheduler)
    with pytest.raises(ValueError, match=r"load_state: others must be \['scheduler'\], got \[\]"):
        ard.load_state(run.model, run.optimizer, tmp_path)
    weights = tmp_path / RESUME_TENSORS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"must match its checksum in .* the file is corrupt"):
        run.load(tmp_path)
    state = json.loads((tmp_path / RESUME).read_text())
    (tmp_path / RESUME).write_text(json.dumps({**state, "format": 9}))
    with pytest.raises(ValueError, match=r"format of .* must be 2, got 9"):
        run.load(tmp_path)
    (tmp_path / RESUME).write_text("{")
    with pytest.raises(ValueError, match="must be one that save_state wrote"):
        run.load(tmp_path)


def test_state_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    run = Run()
    run.scheduler = MultiStepLR(run.optimizer, [3, 5])  # type: ignore[assignment]
    with pytest.raises(ValueError, match="save_state: scheduler must be plain numbers, strings, lists and dicts, got"):
        run.save(tmp_path)
    assert not list(tmp_path.iterdir())
    run.scheduler = LambdaLR(run.optimizer, lambda _: 1.0)  # type: ignore[assignment]
    run.save(tmp_path)


# What Trainer, or anyone, does with a plain state_dict.


def test_state_dict_takes_its_ranks_along() -> None:
    run = Run().steps(STEPS)
    fresh = Run(attach=False)
    before = {id(p) for p in fresh.model.parameters()}
    assert fresh.model.load_state_dict(run.model.state_dict()) == ([], [])
    assert {id(p) for p in fresh.model.parameters()} == before
    x = torch.randn(3, 32)
    assert torch.equal(fresh.model.eval()(x), run.model.eval()(x))
    layers = zip(ard.adapters(fresh.model).values(), ard.adapters(run.model).values(), strict=True)
    assert all(a.ranks == b.ranks for a, b in layers)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([1], "be 4 numbers from 0 to 8"),
        ([9, 1, 1, 1], "be 4 numbers from 0 to 8"),
        ([8, 8, 8, 8], "fit the factors of 4 and 16 rows"),
    ],
)
def test_a_state_dict_with_other_ranks_is_refused(ranks: list[int], message: str) -> None:
    model = Run().model
    state = model.state_dict()
    state["q_proj._extra_state"] = torch.tensor(ranks)
    with pytest.raises(RuntimeError, match=f"ranks of 'q_proj' must {message}"):
        model.load_state_dict(state)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
