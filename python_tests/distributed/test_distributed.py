"""Several processes train as one does on the concatenated batch: same ranks, same weights to fp32 rounding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ardlora_ext as ard
from ardlora_ext.config import AdapterConfig

from helpers import workers
from helpers.models import Attention, llama, trainable
from helpers.process_runs import ARD, BATCH, HELD_OUT, METHODS, STEPS, SVD


class Branches(nn.Module):
    """Attention with a branch that every second step leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = Attention(), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, both: bool = True) -> torch.Tensor:
        y: torch.Tensor = self.main(x)
        return y + self.side(x) if both else y


@dataclass
class Trained:
    """What a run ends with."""

    ranks: dict[str, list[int]]
    events: list[Any]
    weights: dict[str, torch.Tensor]
    losses: list[float] = field(default_factory=list)


Wrapper = Callable[[nn.Module], nn.Module]


def alone(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    assert {layer.capacity for layer in ard.adapters(model).values()} == {"fixed"}
    return DistributedDataParallel(model, find_unused_parameters=True)


def bucket_views(model: nn.Module) -> nn.Module:
    """DDP whose gradients are views of its buckets."""
    return DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)


def held_out(model: nn.Module, rank: int, size: int) -> Callable[[], torch.Tensor]:
    """Return the loss of this process's share of a fixed batch."""
    x, y = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(5))
    return lambda: (model(x[rank::size]) - y[rank::size]).square().mean()


def train(rank: int, size: int, wrapper: Wrapper, config: AdapterConfig, held: bool = False) -> Trained:
    """Train on this process's share: two micro-batches a step, a short last batch, a branch that is unused at times."""
    torch.manual_seed(0)
    model = Branches()
    x, y = torch.randn(2, STEPS * BATCH, 32)
    ard.wrap(model, config)
    wrapped = wrapper(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01, eps=1e-4)
    controller = ard.attach(wrapped, optimizer, STEPS, held_out(model, rank, size) if held else None)
    losses = []
    for t in range(STEPS):
        batch = torch.arange(t * BATCH, (t + 1) * BATCH - (3 if t == STEPS - 1 else 0))
        share = batch[rank::size]
        micros = share.tensor_split(2)
        for i, micro in enumerate(micros):
            last = i == len(micros) - 1
            waiting = nullcontext() if last or not hasattr(wrapped, "no_sync") else wrapped.no_sync()
            with waiting:
                error = (wrapped(x[micro], both=t % 2 == 0) - y[micro]).square().sum()
                loss = error / (32 * len(batch)) * size  # the mean over processes is the mean over the batch
                loss.backward()
        losses.append(float(loss.detach()))
        nn.utils.clip_grad_norm_(trainable(model), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    keys = ("step", "event", "module", "unit", "from", "to")
    events = [tuple(map(record.get, keys)) for record in controller.records]
    weights = {f"{n}.{f}": w for n, layer in ard.adapters(model).items() for f, w in _live(layer).items()}
    return Trained(controller.ranks(), events, weights, losses)


def _live(layer: ard.LoraLinear) -> dict[str, torch.Tensor]:
    rows = dict(zip(("lora_A", "lora_B"), layer.layout.rows(layer.ranks), strict=True))
    return {f: p.detach()[: rows.get(f, sum(layer.ranks))].clone() for f, p in layer.factors.items()}


def train_all(rank: int, size: int, wrappers: list[Wrapper]) -> dict[str, list[Trained]]:
    return {
        name: [train(rank, size, w, config, name in HELD_OUT) for w in wrappers] for name, config in METHODS.items()
    }


@pytest.fixture(scope="module")
def reference() -> dict[str, Trained]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {name: train(0, 1, alone, config, name in HELD_OUT) for name, config in METHODS.items()}
    torch.set_num_threads(threads)
    return found


def assert_same(found: Trained, expected: Trained) -> None:
    """The same decisions; the same weights but for the order in which gradients were summed."""
    assert len(expected.events) > 3, "ranks moved"
    assert found.ranks == expected.ranks
    assert found.events == expected.events
    for key, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[key], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_train_as_one(size: int, reference: dict[str, Trained]) -> None:
    results = workers.run(size, train_all, size, [ddp, ard.replicate] if size == 2 else [bucket_views])
    for name, one in reference.items():
        for i, first in enumerate(results[0][name]):
            assert_same(first, one)
            for other in results[1:]:
                for key, weight in first.weights.items():
                    assert torch.equal(other[name][i].weights[key], weight), "processes hold the same bits"


# --- FSDP2: the base sharded, adapters whole -----------------------------------------------------------------------


def shards(model: nn.Module) -> nn.Module:
    ard.fully_shard(model)
    assert any(type(p).__name__ == "DTensor" for p in model.parameters())
    assert not any(type(p).__name__ == "DTensor" for p in model.parameters() if p.requires_grad)
    return model


class Causal:
    """A LLaMA with a norm that trains, its optimizer, and its batches."""

    def __init__(self, wrapper: Wrapper) -> None:
        self.model = self.base()
        self.tokens = torch.randint(0, 64, (STEPS, 4, 12))
        ard.wrap(
            self.model,
            ard.ArdConfig(
                **{"mode": "paper", "granularity": "head", **ARD, "head_dim": None}, modules_to_save=["norm"]
            ),
        )
        self.wrapped = wrapper(self.model)
        # A large eps: entries whose gradient is nearly 0 must not amplify the roundings of its sum.
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=0.01, eps=1e-2)
        self.controller = ard.attach(self.wrapped, self.optimizer, total_steps=STEPS)

    @staticmethod
    def base() -> nn.Module:
        torch.manual_seed(0)
        return llama()[0]

    def train(self, steps: range, rank: int, size: int) -> list[float]:
        losses = []
        for t in steps:
            ids = self.tokens[t][rank::size]
            loss = self.wrapped(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(float(loss.detach()))
            nn.utils.clip_grad_norm_(trainable(self.model), 0.5)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return losses

    def trained(self) -> Trained:
        events = [(r["step"], r["event"], r["module"], r["from"], r["to"]) for r in self.controller.records]
        layers = ard.adapters(self.model).items()
        weights = {f"{n}.{f}": w for n, layer in layers for f, w in _live(layer).items()}
        return Trained(self.controller.ranks(), events, weights)


def train_sharded(rank: int, size: int, folder: Path) -> Trained:
    bed = Causal(shards)
    assert {layer.capacity for layer in ard.adapters(bed.model).values()} == {"fixed"}
    bed.train(range(STEPS // 2), rank, size)
    ard.save_state(bed.model, bed.optimizer, folder)
    bed.train(range(STEPS // 2, STEPS), rank, size)
    with pytest.raises(ValueError, match=r"must have a whole weight, got a shard of it \(FSDP2\)"):
        ard.merge(bed.model)
    if rank == 0:
        ard.save_pretrained(bed.model, folder / "adapter")
    return bed.trained()


def resume_sharded(rank: int, size: int, folder: Path) -> Trained:
    bed = Causal(shards)
    ard.load_state(bed.model, bed.optimizer, folder)
    bed.train(range(STEPS // 2, STEPS), rank, size)
    return bed.trained()


def test_a_sharded_base_trains_as_one_and_resumes_with_any_number_of_processes(tmp_path: Path) -> None:
    one = Causal(alone)
    one.train(range(STEPS), 0, 1)
    found = workers.run(2, train_sharded, 2, tmp_path) + workers.run(4, resume_sharded, 4, tmp_path)
    alone_again = Causal(alone)
    ard.load_state(alone_again.model, alone_again.optimizer, tmp_path)
    alone_again.train(range(STEPS // 2, STEPS), 0, 1)
    for each in [*found, alone_again.trained()]:
        assert_same(each, one.trained())
    clone = ard.load_pretrained(Causal.base(), tmp_path / "adapter")
    ids = one.tokens[0]
    torch.testing.assert_close(clone(input_ids=ids).logits, one.model(input_ids=ids).logits, rtol=1e-3, atol=1e-4)


# --- Several adapters by name --------------------------------------------------------------------------------------


def train_named(rank: int, size: int, wrappers: list[Wrapper]) -> list[list[Trained]]:
    return [_train_named(rank, size, wrapper) for wrapper in wrappers]


def _train_named(rank: int, size: int, wrapper: Wrapper) -> list[Trained]:
    """Train one adapter, then another."""
    model = Causal.base()
    tokens = torch.randint(0, 64, (STEPS, 4, 12))
    options = {"modules_to_save": ["norm"]}
    ard.wrap(model, ard.ArdConfig(**{"mode": "paper", "granularity": "head", **ARD, "head_dim": None}, **options))
    ard.add_adapter(model, "other", ard.ElaConfig(r=4, r_max=8, k=2, b=3, **{**SVD, **options}))
    wrapped = wrapper(model)
    found = []
    for name in ("default", "other"):
        ard.set_adapter(model, name)
        optimizer = torch.optim.AdamW(trainable(model), lr=0.01, eps=1e-2)  # as above
        if name == "other" and wrapped is not model:
            with pytest.raises(ValueError, match=r"made while this adapter was active.*wrap the model anew"):
                ard.attach(wrapped, optimizer, total_steps=STEPS)
            wrapped = wrapper(model)
        controller = ard.attach(wrapped, optimizer, total_steps=STEPS)
        for t in range(STEPS):
            ids = tokens[t][rank::size]
            for i, micro in enumerate(ids.tensor_split(2) if len(ids) > 1 else [ids]):
                waiting = wrapped.no_sync() if i == 0 and len(ids) > 1 and size > 1 else nullcontext()
                with waiting:
                    (wrapped(input_ids=micro, labels=micro).loss * len(micro) / len(ids)).backward()
            optimizer.step()
            optimizer.zero_grad()
        events = [(r["step"], r["event"], r.get("module"), r.get("from"), r.get("to")) for r in controller.records]
        weights = {f"{n}.{f}": w for n, layer in ard.adapters(model).items() for f, w in _live(layer).items()}
        weights["norm"] = model.get_submodule("model.norm").weight.detach().clone()
        found.append(Trained(controller.ranks(), events, weights))
    return found


def test_adapters_by_name_train_one_after_the_other() -> None:
    one = _train_named(0, 1, alone)
    for process in workers.run(2, train_named, 2, [ddp, ard.replicate, shards]):
        for found in process:
            for trained, expected in zip(found, one, strict=True):
                assert_same(trained, expected)


# --- What is noticed ----------------------------------------------------------------------------------------------
