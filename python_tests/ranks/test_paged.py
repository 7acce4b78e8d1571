"""bitsandbytes' paged optimizer state stays in managed memory when ranks change; here that memory is the host's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext import RankUpdate, UnitUpdate
from ardlora_ext.ranks import eight_bit, resize
from ardlora_ext.ranks.rehearsal import rehearse

from helpers.models import trainable

WIDTH = 256


class Functional:
    """Stands for `bitsandbytes.functional`, which needs a GPU for it."""

    @staticmethod
    def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made: Any = torch.full(shape, 7, dtype=dtype)  # whatever lay there
        made.is_paged, made.page_deviceid = True, device.index
        return made  # type: ignore[no-any-return]


def into_pages(state: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        state[key] = Functional.get_paged(
            *state[key].shape, dtype=state[key].dtype, device=torch.device("cuda", 1)
        ).copy_(state[key])


class Adam(torch.optim.AdamW):
    """Refuses state that is not paged, as bitsandbytes' kernels do."""

    keys = ("exp_avg", "exp_avg_sq")

    def step(self, closure: Any = None) -> Any:
        for p, state in self.state.items():
            for key in self.keys:
                assert state[key].is_paged, f"{key} {list(p.shape)}"
        super().step(closure)
        for state in self.state.values():
            for key in self.keys:
                if not hasattr(state[key], "is_paged"):
                    into_pages(state, (key,))


@pytest.fixture(autouse=True)
def functional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bit.importlib, "import_module", lambda _name: Functional)


def trained() -> tuple[nn.Module, Adam]:
    torch.manual_seed(0)
    model = ard.wrap(nn.Sequential(nn.Linear(WIDTH, WIDTH)), ard.LoraConfig(r=4, target_modules=["0"]))
    next(iter(ard.adapters(model).values())).max_rank = 32
    optimizer = Adam(trainable(model), lr=1e-2)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(3, WIDTH)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("keep", "grow"), [((2, 0, 1), 0), ((0, 1, 2, 3), 9), ((3, 1), 1)])
def test_moments_stay_in_their_memory(keep: tuple[int, ...], grow: int) -> None:
    model, optimizer = trained()
    before = copy.deepcopy({p: dict(s) for p, s in optimizer.state.items()})
    old = [{k: v.clone() for k, v in s.items()} for s in before.values()]
    resize.apply(model, RankUpdate({"0": (UnitUpdate(keep, grow),)}), optimizer)
    for was, state in zip(old, optimizer.state.values(), strict=True):
        for key in Adam.keys:
            value = state[key]
            assert (value.is_paged, value.page_deviceid) == (True, 1)
            assert torch.equal(value[: len(keep)], was[key][list(keep)])
            assert not value[len(keep) :].any()
    step(model, optimizer)


def test_a_trial_copies_pages_to_pages() -> None:
    model, optimizer = trained()
    rehearse(optimizer, ard.adapters(model))


def test_codes_of_eight_bits_stay_in_their_memory() -> None:
    model, optimizer = trained()
    optimizer.keys = ("state1", "state2")  # type: ignore[misc]
    for p, state in optimizer.state.items():
        state.clear()
        for n in (1, 2):
            state[f"state{n}"] = torch.randint(0, 256, p.shape, dtype=torch.uint8)
            state[f"absmax{n}"] = torch.rand(p.numel() // 256)
            state[f"qmap{n}"] = torch.linspace(-127, 128, 256) / 128
        into_pages(state, optimizer.keys)
    want = [state["state1"][[3, 0]].clone() for state in optimizer.state.values()]
    resize.apply(model, RankUpdate({"0": (UnitUpdate((3, 0), 7),)}), optimizer)
    for codes, state in zip(want, optimizer.state.values(), strict=True):
        assert state["state1"].is_paged
        assert state["state2"].is_paged
        assert torch.equal(state["state1"][:2], codes)
