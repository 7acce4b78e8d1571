"""What several processes notice and refuse."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
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

from helpers import workers
from helpers.models import Attention, trainable
from helpers.process_runs import METHODS, STEPS

with warnings.catch_warnings():  # torch compiles some of them by its own deprecated means
    warnings.simplefilter("ignore")
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer


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
    refused(
        "elastic",
        lambda: ard.attach(*small(ard.ArdConfig(mode="paper", granularity="head", capacity="elastic", head_dim=8))),
    )
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
    model, _ = small(ard.ArdConfig(mode="paper", granularity="head", capacity="fixed", r0=2, head_dim=8))
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
