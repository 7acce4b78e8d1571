"""Stages that train: every method and optimizer against the CPU, captured and compiled, transformers' Trainer."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import ardlora_ext as ard
from ardlora_ext.bench.gpu.context import Context, Skipped, overlapping
from ardlora_ext.bench.machine import Json
from ardlora_ext.config import AdapterConfig

_STEPS, _DRY_STEPS = 30, 12
_FAST_ARD: dict[str, Any] = {
    "mode": "paper",
    "granularity": "head",
    "r0": 4,
    "r_max": 12,
    "head_dim": 8,
    "l1": 2e-2,
    "lr_alpha": 0.1,
    "update_interval": 2,
}
_CLOSE = 2e-3  # of losses, relative
_BFLOAT16 = 3e-2  # of logits, one of the two under autocast


class _Block(nn.Module):
    """Attention and an MLP, as small as they get."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o_proj(torch.tanh(self.q_proj(x)))
        out: torch.Tensor = self.down(torch.relu(self.up(x)))
        return out


def _methods(steps: int) -> dict[str, AdapterConfig]:
    svd: dict[str, Any] = {"tinit": 2, "tfinal": steps // 3, "deltaT": 2, "total_steps": steps}
    return {
        "lora": ard.LoraConfig(r=4),
        "lora, dropout": ard.LoraConfig(r=4, lora_dropout=0.1),
        "ard": ard.ArdConfig(total_steps=steps, **_FAST_ARD),
        "ard, dropout": ard.ArdConfig(total_steps=steps, lora_dropout=0.1, **_FAST_ARD),
        "elalora": ard.ElaConfig(r=4, b=2, grace=0, **svd),
        "adalora": ard.AdaConfig(init_r=6, target_r=4, **svd),
        "dora": ard.DoraConfig(r=4),
        "pissa": ard.LoraConfig(r=4, init="pissa"),
    }


_OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW capturable": lambda p: torch.optim.AdamW(p, lr=1e-2, capturable=p[0].is_cuda),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
}
Run = tuple[list[float], list[list[int]]]


def _train(
    config: AdapterConfig,
    steps: int,
    device: torch.device,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] = _OPTIMIZERS["AdamW foreach"],
    recipe: str = "",
    mode: str | None = None,
) -> Run:
    """Train a block whose ranks move, compiled where there is a mode for it; return losses and ranks."""
    torch.manual_seed(1)
    model = ard.wrap(_Block().to(device), config)
    made = optimizer([p for p in model.parameters() if p.requires_grad])
    ard.attach(model, made, total_steps=steps)
    call: Any = model if mode is None else torch.compile(model, mode=mode)
    x, losses = torch.randn(24, 32, generator=torch.Generator().manual_seed(2)).to(device), []
    scaler = torch.amp.GradScaler(device.type, enabled=recipe == "float16") if recipe else None
    for _ in range(steps):
        with torch.autocast(device.type, getattr(torch, recipe or "bfloat16"), enabled=bool(recipe)):
            loss = (call(x).float() - x.flip(0)).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            made.step()
        else:
            scaler.step(made)
            scaler.update()
        made.zero_grad()
        losses.append(loss.item())
    return losses, [list(layer.ranks) for layer in ard.adapters(model).values()]


def _compared(case: str, got: Run, expected: Run, close: float = _CLOSE) -> Json:
    far = max(abs(a - b) / abs(b) for a, b in zip(got[0], expected[0], strict=True))
    finite = all(map(math.isfinite, got[0]))
    ok = finite and far <= close and got[1] == expected[1]
    return {"case": case, "ok": ok, "error": far, "ranks": got[1], "cpu_ranks": expected[1]}


def methods(context: Context) -> Iterator[Json]:
    """Every method: losses and ranks are the CPU's."""
    steps = _DRY_STEPS if context.dry else _STEPS
    for name, config in _methods(steps).items():
        expected = _train(config, steps, torch.device("cpu"))
        with context.kernels():
            got = _train(config, steps, context.device)
        yield _compared(name, got, expected)


def optimizers(context: Context) -> Iterator[Json]:
    """Ranks move over capacity classes under every optimizer and precision."""
    steps = _DRY_STEPS if context.dry else _STEPS
    config = _methods(steps)["ard"]
    for name, optimizer in _OPTIMIZERS.items():
        expected = _train(config, steps, torch.device("cpu"), optimizer)
        with context.kernels():
            got = _train(config, steps, context.device, optimizer)
        yield _compared(name, got, expected)
    for recipe in ("bfloat16",) if context.dry else ("bfloat16", "float16"):
        with context.kernels():
            losses, _ = _train(config, steps, context.device, recipe=recipe)
        yield {"case": f"autocast {recipe}", "ok": losses[-1] < losses[0], "losses": [losses[0], losses[-1]]}
    for name in ("AdamW8bit", "PagedAdamW8bit"):
        if context.dry or importlib.util.find_spec("bitsandbytes") is None:
            yield {"case": name, "ok": True, "skipped": "needs a GPU and bitsandbytes"}
            continue
        kind: Any = getattr(importlib.import_module("bitsandbytes.optim"), name)
        losses, ranks = _train(config, steps, context.device, partial(kind, lr=1e-2))
        yield {"case": name, "ok": losses[-1] < losses[0], "ranks": ranks}


class _Captured:
    """A function of no arguments as a CUDA graph, by torch's own recipe; in a rehearsal a call is the function."""

    def __init__(self, run: Callable[[], torch.Tensor], dry: bool) -> None:
        self.run, self.dry = run, dry
        if dry:
            return
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = run()

    def __call__(self) -> torch.Tensor:
        if self.dry:
            return self.run().clone()
        self.graph.replay()
        return self.out.clone()


def graph(context: Context) -> Iterator[Json]:
    """A captured step gives what the eager one does; replays with dropout differ; a new rank needs a new capture."""
    for dropout in (0.0, 0.5):
        torch.manual_seed(1)
        model = ard.wrap(_Block().to(context.device), ard.LoraConfig(r=4, lora_dropout=dropout))
        for layer in ard.adapters(model).values():
            nn.init.normal_(layer.lora_B)
        x = torch.randn(24, 32, device=context.device)

        def step(model: nn.Module = model, x: torch.Tensor = x) -> torch.Tensor:
            for parameter in model.parameters():
                parameter.grad = None
            y: torch.Tensor = model(x)
            y.square().mean().backward()  # type: ignore[no-untyped-call]
            grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            return torch.cat([y.detach().flatten(), *grads])

        with context.kernels():
            eager, captured = step(), _Captured(step, context.dry)
            first, second = captured(), captured()
            with overlapping():
                third = _Captured(step, context.dry)()
        if dropout:
            yield {"case": "replays with dropout differ", "ok": not torch.equal(first, second)}
        else:
            yield {"case": "a replay is the eager step", "ok": torch.equal(first, eager) and torch.equal(second, eager)}
            yield {"case": "so is one of launches that overlap", "ok": torch.equal(third, eager)}


def compiled(context: Context) -> Iterator[Json]:
    """torch.compile(mode="reduce-overhead"): what it captures has neither the ranks nor the dropout of the capture."""
    steps, mode = _DRY_STEPS if context.dry else _STEPS, "reduce-overhead"
    config = replace(_methods(steps)["ard"], capacity="fixed")
    with context.kernels():
        eager = _train(config, steps, context.device)
        yield _compared("ranks move", _train(config, steps, context.device, mode=mode), eager)
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)).to(context.device)
        model = ard.wrap(net, ard.LoraConfig(r=4, lora_dropout=0.5, target_modules=["0", "2"], capacity="fixed"))
        for layer in ard.adapters(model).values():
            nn.init.normal_(layer.lora_B)
        call, x = torch.compile(model, mode=mode), torch.randn(24, 32, device=context.device)
        draws = []
        for seed in (1, 2, 3, 4, 4):  # the first call warms up, the second is captured, the others are replays
            torch.manual_seed(seed)
            y = call(x)
            draws.append(y.detach().clone())
            y.square().mean().backward()
    yield {"case": "dropout is drawn anew", "ok": not torch.equal(draws[2], draws[3])}
    yield {"case": "a seed draws the same", "ok": torch.equal(draws[3], draws[4])}


def trainer(context: Context) -> Iterator[Json]:
    """transformers' Trainer in bfloat16 on a small LLaMA: train, save, load, merge."""
    if importlib.util.find_spec("accelerate") is None:
        raise Skipped("transformers' Trainer needs accelerate")
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)
    ids = torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row, "labels": row} for row in ids]
    steps = 6 if context.dry else 40

    def base() -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = LlamaForCausalLM(config)
        return made

    model = ard.wrap(base(), ard.ArdConfig(r0=4, total_steps=steps, update_interval=2))
    folder = context.out / "trainer"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        bf16=True,
        use_cpu=context.dry,
        report_to=[],
        save_strategy="no",
        logging_steps=steps,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    with context.kernels():
        run = Trainer(model, arguments, train_dataset=data, callbacks=[ard.RankCallback()])
        loss = run.train().training_loss
        yield {"case": "trains", "ok": math.isfinite(loss), "loss": loss}
        model.eval()
        batch = ids[:4].to(context.device)
        with torch.no_grad():
            want = model(input_ids=batch).logits
            ard.save_pretrained(model, folder)
            loaded = ard.load_pretrained(base().to(context.device).eval(), folder)
            got = loaded(input_ids=batch).logits
            merged = ard.merge(model)(input_ids=batch).logits
    for name, logits in (("saved and loaded", got), ("merged", merged)):
        error = float((logits - want).norm() / want.norm())
        yield {"case": name, "ok": error <= _BFLOAT16, "error": error}  # Trainer's model computes under autocast
