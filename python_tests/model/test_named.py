"""Several adapters on one model: each trains, saves and computes as if it were alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import ardlora_ext as ard
from ardlora_ext.model.record import injection

from helpers.adapters import fingerprint, scramble
from helpers.models import ARCHITECTURES, Attention, bert, gpt2, llama, trainable
from helpers.training import fast_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
never_attached = pytest.mark.filterwarnings("ignore:save_pretrained.*was never called:UserWarning")

STEPS = 20
ARD = fast_config(head_dim=None, harden_ratio=0.1, lora_dropout=0.1)
OTHERS = {
    "other ranks": fast_config(head_dim=None, r0=3),
    "other targets": ard.LoraConfig(r=3, target_modules=["value", "intermediate.dense"]),
    "trained gates": ard.ElaConfig(r=3, deltaT=2, b=2, total_steps=STEPS),
    "dora": ard.DoraConfig(r=2),
    "all frozen but adapters": ard.LoraConfig(r=2, modules_to_save=[]),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return bert()[0].train()


def train(of: nn.Module, seed: int) -> Iterator[None]:
    """Train the adapter that is active now, a step at a time, with an optimizer and random numbers of its own."""
    batch = bert()[1]
    optimizer = AdamW(trainable(of), lr=1e-2)
    ard.attach(of, optimizer, total_steps=STEPS)
    random = torch.Generator().manual_seed(seed).get_state()
    while True:
        torch.set_rng_state(random)
        of(**batch).loss.backward()
        random = torch.get_rng_state()
        optimizer.step()
        optimizer.zero_grad()
        yield


def state(of: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return {n: v.clone() for n, v in of.state_dict().items()}, injection(of).controller.state_dict()


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours[0].keys() == theirs[0].keys()
    assert [n for n in ours[0] if not torch.equal(ours[0][n], theirs[0][n])] == []
    assert ours[1] == theirs[1]


@pytest.mark.parametrize("other", OTHERS)
def test_each_trains_as_if_it_were_alone(other: str) -> None:
    configs = {"default": ARD, "second": OTHERS[other]}
    alone = {}
    for seed, (name, config) in enumerate(configs.items()):
        single = ard.wrap(model(), config)
        steps = train(single, seed)
        for _ in range(STEPS):
            next(steps)
        alone[name] = state(single)

    both = ard.wrap(model(), ARD)
    ard.add_adapter(both, "second", OTHERS[other])
    assert ard.adapter_names(both) == ["default", "second"]
    assert ard.active_adapter(both) == "default"
    running = {}
    for seed, name in enumerate(configs):
        ard.set_adapter(both, name)
        running[name] = train(both, seed)
    done = dict.fromkeys(configs, 0)
    for name, count in (("default", 7), ("second", 3), ("default", 1), ("second", 17), ("default", 12)):
        ard.set_adapter(both, name)
        assert ard.active_adapter(both) == name
        for _ in range(count):
            next(running[name])
        done[name] += count
    assert set(done.values()) == {STEPS}
    for name in configs:
        ard.set_adapter(both, name)
        assert_same(state(both), alone[name])
    assert len({r for units in injection(both).named["default"].controller.ranks().values() for r in units}) > 1


def test_one_optimizer_of_all_moves_the_ranks_of_the_active_one() -> None:
    both = ard.wrap(Attention(), fast_config())
    ard.add_adapter(both, "second", fast_config(r0=3))
    optimizer = AdamW(trainable(both), lr=0.01)
    first = ard.attach(both, optimizer, total_steps=STEPS)
    ard.set_adapter(both, "second")
    optimizer.add_param_group({"params": trainable(both)})
    second = ard.attach(both, optimizer, total_steps=STEPS)
    x = torch.randn(8, 32)
    for name, step in (("second", (0, 12)), ("default", (12, 12))):
        ard.set_adapter(both, name)
        resting = [p.clone() for p in injection(both).named[name].layers[0].factors.values()]
        for _ in range(12):
            both(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (first.step, second.step) == step
        assert not torch.equal(resting[0], next(iter(injection(both).layers[0].factors.values())))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_disabled_is_the_base_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    of, batch = ARCHITECTURES[name]()
    of.eval()
    with torch.no_grad():
        before, plain = fingerprint(of), of(**batch).logits
    ard.wrap(of, ard.ArdConfig(mode="paper", granularity="head", r0=3))
    scramble(of)
    for parameter in trainable(of):
        parameter.data += 0.1  # the classification head as well
    own = fingerprint(of)
    with torch.no_grad():
        mine = of(**batch).logits
    assert not torch.equal(mine, plain)
    for _ in range(2):
        with ard.disable_adapter(of):
            found = of(**batch).logits
            assert torch.equal(found, plain)
            assert not found.requires_grad
            now = fingerprint(of)
            assert (now["modules"], now["bits"]) == (before["modules"], before["bits"])
            with pytest.raises(ValueError, match="must be wrapped"):
                ard.parameters_report(of)
        assert fingerprint(of) == own
    with pytest.raises(RuntimeError, match="inside"), ard.disable_adapter(of):
        raise RuntimeError("inside")
    assert fingerprint(of) == own
    ard.unwrap(of)


def test_modes_follow() -> None:
    of = ard.wrap(model(), ARD)
    ard.add_adapter(of, "second", ARD)
    of.eval()
    ard.set_adapter(of, "second")
    assert not any(module.training for module in of.modules())
    of.train()
    ard.set_adapter(of, "default")
    assert all(module.training for module in of.modules())


@never_attached
def test_each_is_saved_and_loaded_by_name(tmp_path: Path) -> None:
    of, batch = gpt2()
    of.eval()
    base = copy.deepcopy(of)
    ard.wrap(of, ard.ArdConfig(mode="paper", granularity="head", r0=3))
    ard.add_adapter(of, "second", ard.LoraConfig(r=2, target_modules=["c_fc"]))
    found = {}
    for seed, name in enumerate(("default", "second")):
        ard.set_adapter(of, name)
        scramble(of, seed=seed)
        with torch.no_grad():
            found[name] = of(**batch).logits
        ard.save_pretrained(of, tmp_path / name)
    for name, expected in found.items():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
        with torch.no_grad():
            assert (theirs(**batch).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    again = ard.load_pretrained(copy.deepcopy(base), tmp_path / "second")
    ard.load_adapter(again, tmp_path / "default", "heads")
    ard.load_adapter(again, tmp_path / "second", "of PEFT", ard.ElaConfig(r=4))
    assert ard.active_adapter(again) == "default"
    for name, expected, exact in (
        ("default", "second", True),
        ("heads", "default", True),
        ("of PEFT", "second", False),
    ):
        ard.set_adapter(again, name)
        with torch.no_grad():
            logits = again(**batch).logits
        assert torch.equal(logits, found[expected]) if exact else torch.allclose(logits, found[expected], atol=1e-5)
    own = fingerprint(again)
    (tmp_path / "default" / "ardlora_state.json").unlink()
    with pytest.raises(FileNotFoundError):
        ard.load_adapter(again, tmp_path / "default", "lost")
    assert fingerprint(again) == own
    assert ard.adapter_names(again) == ["default", "heads", "of PEFT"]


def test_deleting() -> None:
    of = ard.wrap(Attention(), ard.LoraConfig())
    for name in ("second", "third"):
        ard.add_adapter(of, name, fast_config())
    ard.set_adapter(of, "second")
    optimizer = SGD(trainable(of), lr=0.1)
    ard.attach(of, optimizer, total_steps=STEPS)
    own = fingerprint(of)
    ard.delete_adapter(of, "third")
    assert fingerprint(of) == own
    with pytest.warns(UserWarning, match="'second' was active; 'default' is now"):
        ard.delete_adapter(of, "second")
    assert not optimizer._optimizer_step_pre_hooks
    assert ard.adapter_names(of) == ["default"]
    with pytest.raises(ValueError, match=r"'default' must not be the only adapter; use ardlora_ext\.unwrap"):
        ard.delete_adapter(of, "default")
    with pytest.raises(ValueError, match=r"delete_adapter: adapter_name must be one of \['default'\], got 'second'"):
        ard.delete_adapter(of, "second")


@pytest.mark.parametrize("leave", [ard.unwrap, ard.merge], ids=["unwrap", "merge"])
def test_leaving_takes_all_out(leave: Callable[[nn.Module], nn.Module]) -> None:
    of = Attention()
    before = fingerprint(of)
    ard.wrap(of, ard.LoraConfig())
    ard.add_adapter(of, "second", fast_config())
    optimizer = SGD(trainable(of), lr=0.1)
    ard.attach(of, optimizer)
    ard.set_adapter(of, "second")
    leave(of)
    assert fingerprint(of) == before, "both are zero at the start"
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(ValueError, match="must be wrapped"):
        ard.adapter_names(of)


def test_what_is_refused_changes_nothing() -> None:
    of = ard.wrap(Attention(), ard.LoraConfig())
    scramble(of)
    own = fingerprint(of)
    for call, message in (
        (lambda: ard.add_adapter(of, "default", ARD), r"add_adapter: adapter_name must be new, got 'default' beside"),
        (lambda: ard.add_adapter(of, "", ARD), "adapter_name must be new, got ''"),
        (lambda: ard.add_adapter(of, "x", ard.LoraConfig(target_modules=["q"])), "got no match for 'q'"),
        (lambda: ard.set_adapter(of, "x"), r"set_adapter: adapter_name must be one of \['default'\], got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert fingerprint(of) == own
    ard.add_adapter(of, "second", ARD)
    ard.merge_adapter(of)
    own = fingerprint(of)
    for op, call in (
        ("set_adapter", lambda: ard.set_adapter(of, "second")),
        ("add_adapter", lambda: ard.add_adapter(of, "x", ARD)),
        ("delete_adapter", lambda: ard.delete_adapter(of, "default")),
    ):
        with pytest.raises(ValueError, match=rf"^{op}: 'q_proj' must not be merged; call ardlora_ext\.unmerge_adapter"):
            call()
        assert fingerprint(of) == own


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_have_all_adapters(copier: Callable[[nn.Module], nn.Module]) -> None:
    of, batch = llama()
    ard.wrap(of, ard.LoraConfig(r=2))
    ard.add_adapter(of, "second", ard.ArdConfig(mode="paper", granularity="head", r0=3))
    scramble(of)
    clone = copier(of)
    ard.set_adapter(of, "second")
    scramble(of)
    ard.set_adapter(clone, "second")
    with torch.no_grad():
        mine, theirs = of(**batch).logits, clone(**batch).logits
        assert not torch.equal(mine, theirs)
        for each in (of, clone):
            ard.set_adapter(each, "default")
        assert torch.equal(of(**batch).logits, clone(**batch).logits)
