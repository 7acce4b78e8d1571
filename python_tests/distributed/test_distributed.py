"""Several processes train as one does on the concatenated batch: same ranks, same weights to fp32 rounding."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import workers
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ardlora_ext as ard
from ardlora_ext.config import AdapterConfig

from conftest import Attention, llama, trainable

with warnings.catch_warnings():  # torch compiles some of them by its own deprecated means
    warnings.simplefilter("ignore")
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

STEPS = 24
BATCH = 8

_common = {"head_dim": 8, "seed": 3}
_ard = {
    "r0": 2,
    "r_max": 4,
    "update_interval": 2,
    "lr_alpha": 0.1,
    "warmup_ratio": 0.05,
    "freeze_ratio": 0.2,
    **_common,
}
_svd = {"tinit": 2, "tfinal": 6, "deltaT": 3, "target_modules": "all-linear", "seed": 3}
METHODS: dict[str, AdapterConfig] = {
    "ard-secant": ard.ArdConfig(**_ard),
    "ard-bilevel": ard.ArdConfig(**_ard),
    "ard-tangent": ard.ArdConfig(slope="tangent", **_ard),
    "elalora": ard.ElaConfig(r=4, r_max=8, k=2, b=3, **_svd),
    "adalora": ard.AdaConfig(init_r=4, target_r=2, **_svd),
    "adalora-removal": ard.AdaConfig(init_r=4, target_r=2, removal=True, **_svd),
}


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


def train(rank: int, size: int, wrapper: Wrapper, config: AdapterConfig, bilevel: bool = False) -> Trained:
    """Train on this process's share: two micro-batches a step, a short last batch, a branch that is unused at times."""
    torch.manual_seed(0)
    model = Branches()
    x, y = torch.randn(2, STEPS * BATCH, 32)
    ard.wrap(model, config)
    wrapped = wrapper(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01, eps=1e-4)
    controller = ard.attach(wrapped, optimizer, STEPS, held_out(model, rank, size) if bilevel else None)
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
    events = [(r["step"], r["event"], r["module"], r["unit"], r["from"], r["to"]) for r in controller.records]
    weights = {f"{n}.{f}": w for n, layer in ard.adapters(model).items() for f, w in _live(layer).items()}
    return Trained(controller.ranks(), events, weights, losses)


def _live(layer: ard.LoraLinear) -> dict[str, torch.Tensor]:
    rows = dict(zip(("lora_A", "lora_B"), layer.layout.rows(layer.ranks), strict=True))
    return {f: p.detach()[: rows.get(f, sum(layer.ranks))].clone() for f, p in layer.factors.items()}


def train_all(rank: int, size: int, wrappers: list[Wrapper]) -> dict[str, list[Trained]]:
    return {
        name: [train(rank, size, w, config, name == "ard-bilevel") for w in wrappers]
        for name, config in METHODS.items()
    }


@pytest.fixture(scope="module")
def reference() -> dict[str, Trained]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {name: train(0, 1, alone, config, name == "ard-bilevel") for name, config in METHODS.items()}
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
        ard.wrap(self.model, ard.ArdConfig(**{**_ard, "head_dim": None}, modules_to_save=["norm"]))
        self.wrapped = wrapper(self.model)
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=0.01, eps=1e-4)
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
    ard.wrap(model, ard.ArdConfig(**{**_ard, "head_dim": None}, **options))
    ard.add_adapter(model, "other", ard.ElaConfig(r=4, r_max=8, k=2, b=3, **{**_svd, **options}))
    wrapped = wrapper(model)
    found = []
    for name in ("default", "other"):
        ard.set_adapter(model, name)
        optimizer = torch.optim.AdamW(trainable(model), lr=0.01, eps=1e-3)
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


def small(config: AdapterConfig | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = ard.wrap(Attention(), config or METHODS["ard-secant"])
    return model, torch.optim.AdamW(trainable(model), lr=0.01)


def notice(rank: int) -> dict[str, Any]:
    """What goes wrong with two processes, each refused by name before training starts or at the first difference."""
    found: dict[str, Any] = {}

    def refused(what: str, attempt: Callable[[], object]) -> None:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            attempt()
        found[what] = str(caught.value)

    model, optimizer = small()
    wrapped = DistributedDataParallel(model)
    refused("inner", lambda: ard.save_pretrained(wrapped, "nowhere"))
    ard.attach(wrapped, optimizer, total_steps=STEPS)

    def unsynchronised() -> None:
        for t in range(STEPS):
            with wrapped.no_sync():
                wrapped(
                    torch.randn(4, 32, generator=torch.Generator().manual_seed(7 * t + rank))
                ).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    refused("different", unsynchronised)
    found["records"] = len(ard.attach(*small()).records)

    def join(**options: Any) -> None:
        model, optimizer = small()
        wrapped = DistributedDataParallel(model)
        ard.attach(wrapped, optimizer, total_steps=STEPS)
        with wrapped.join(**options):
            for _ in range(2 + rank):
                wrapped(torch.randn(4, 32)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()

    refused("join", join)
    refused("join, all stop", lambda: join(throw_on_early_termination=True))
    refused("elastic", lambda: ard.attach(*small(ard.ArdConfig(capacity="elastic", head_dim=8))))
    refused("unbounded", lambda: small(ard.ElaConfig()))

    mesh = init_device_mesh("cpu", (2,))
    model, optimizer = small()
    refused("FSDP2", lambda: ard.attach(fully_shard(model, mesh=mesh), optimizer))
    refused("sharded first", lambda: ard.wrap(fully_shard(Attention(), mesh=mesh), ard.LoraConfig()))
    model, optimizer = small()
    parallelize_module(model, mesh, {"up.base_layer": ColwiseParallel()})
    refused("tensor parallel", lambda: ard.attach(model, optimizer))
    model, optimizer = small()
    refused("FSDP1", lambda: ard.attach(fsdp1(model), optimizer))
    model, optimizer = small()
    refused("replicated", lambda: ard.replicate(ard.replicate(model)))
    ard.add_adapter(model, "late", ard.LoraConfig())
    ard.set_adapter(model, "late")
    refused("late", lambda: ard.attach(model, torch.optim.AdamW(trainable(model))))
    ard.replicate(model)
    ard.attach(model, torch.optim.AdamW(trainable(model)))
    model, _ = small()
    refused("ZeRO", lambda: ard.attach(model, ZeroRedundancyOptimizer(trainable(model), torch.optim.AdamW, lr=0.1)))

    found["sent"] = sent(rank)
    model, optimizer = small()
    averaging = PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(period=4))
    refused("local SGD", lambda: ard.attach(model, averaging))
    model = ard.wrap(Attention(), ard.LoraConfig(lora_dropout=0.5))
    with torch.no_grad():
        for layer in ard.adapters(model).values():
            layer.lora_B.fill_(1.0)
    torch.manual_seed(0)
    found["dropped out"] = model(torch.ones(4, 32)).detach()
    return found


def sent(rank: int) -> list[int]:
    """Return the elements of each all-reduce of a replicated model, the first backward of which fails half-way."""
    model, _ = small(ard.ArdConfig(capacity="fixed", r0=2, head_dim=8))
    ard.replicate(model)
    sizes: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    def fails(_gradient: torch.Tensor) -> None:
        raise ArithmeticError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        x = torch.randn(4, 32, requires_grad=True)
        handle = x.register_hook(fails)
        with pytest.raises(ArithmeticError):
            model(x).square().sum().backward()
        handle.remove()
        model.zero_grad()
        for _ in range(2):
            model(torch.randn(4, 32)).square().sum().backward()
        with model.no_sync():
            model(torch.randn(4, 32)).square().sum().backward()
    assert ard.parameters_report(model).allocated > ard.parameters_report(model).live
    flags = len(trainable(model))
    return [size - ard.parameters_report(model).live - flags for size in sizes]


def fsdp1(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def test_what_cannot_work_is_refused_by_name() -> None:
    first, second = workers.run(2, notice)
    expected = {
        "inner": r"must be given without DistributedDataParallel around it: use its \.module",
        "different": r"rank change after step \d+ must be the same on every process; are gradients reduced before the "
        r'step\? Got\nprocess 0: (?s:.*)"modules"(?s:.*)\nprocess 1: (?s:.*)',
        "join": r"must not be inside join\(\) without throw_on_early_termination=True",
        "join, all stop": "exhausted (all )?inputs",  # torch's own words
        "elastic": "capacity must be 'fixed' with 2 processes, because DistributedDataParallel keeps the sizes",
        "unbounded": "r_max of ElaConfig must be given with 2 processes",
        "FSDP2": r"adapters must not be sharded \(FSDP2\), got 'q_proj' sharded; keep adapters whole with "
        r"ardlora_ext\.fully_shard",
        "sharded first": r"parameters must be whole, got 'q_proj' sharded already \(DTensor\); wrap first",
        "tensor parallel": r"got 'up' as a DTensor of another kind \(tensor parallelism\)",
        "FSDP1": r"must not be inside FullyShardedDataParallel: it flattens parameters \(FSDP1\); keep adapters whole",
        "replicated": "model must not be replicated already",
        "late": r"adapter must be replicated as the others are; call ardlora_ext\.replicate\(model\) once more",
        "ZeRO": "must not be ZeroRedundancyOptimizer: it partitions its state over the processes",
        "local SGD": "must not be PostLocalSGDOptimizer: it lets the processes differ between averages",
    }
    for what, pattern in expected.items():
        for found in (first, second):
            assert re.search(pattern, found[what]), f"{what}: {found[what]}"
    assert first["sent"] == second["sent"] == [0, 0], "live rows, once per backward, also after one that failed"
    assert not torch.equal(first["dropped out"], second["dropped out"]), "processes seeded alike draw other masks"


class DeepSpeedEngine(nn.Module):
    """Has the name that is refused; DeepSpeed itself needs a compiler and is not installed for tests."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class DeepSpeedOptimizer:
    """DeepSpeed's base class of ZeRO's optimizers, which are none of torch's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


class ZeROOptimizer(DeepSpeedOptimizer):
    """As DeepSpeed derives it."""


def test_wrappers_of_one_process_are_refused_by_name() -> None:
    model, optimizer = small()
    for wrapper in (DeepSpeedEngine, nn.DataParallel):
        with pytest.raises(ValueError, match=f"attach: model must not be inside {wrapper.__name__}: .*fully_shard"):
            ard.attach(wrapper(model), optimizer)
    accelerated = DeepSpeedOptimizerWrapper.__new__(DeepSpeedOptimizerWrapper)
    for other in (ZeROOptimizer(optimizer), accelerated):
        with pytest.raises(ValueError, match=r"must not be DeepSpeedOptimizer: it \(ZeRO-1, 2 and 3\) steps on flat"):
            ard.attach(model, other)
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group\(\) first"):
        ard.fully_shard(model)
    ard.attach(model, optimizer)  # nothing has changed


@pytest.mark.parametrize(("announced", "capacity"), [("1", "elastic"), ("2", "fixed")])
def test_capacity_follows_the_launcher(announced: str, capacity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", announced)
    assert {layer.capacity for layer in ard.adapters(small()[0]).values()} == {capacity}
