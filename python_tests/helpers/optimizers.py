"""Small optimizers of the kinds that people train adapters with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

Closure = Callable[[], torch.Tensor]


def wanting_a_closure(optimizer: Optimizer, loss: Callable[[], torch.Tensor]) -> None:
    """One step of an optimizer that computes gradients again."""

    def run() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    run()
    optimizer.step(run)  # type: ignore[arg-type]


class Sam(Optimizer):
    """Sharpness-aware minimisation: the base optimizer steps on gradients of perturbed weights."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"rho": 0.05})
        self.base_optimizer = AdamW(self.param_groups, lr=0.01)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.data.clone()
                p.add_(group["rho"] * p.grad / (p.grad.norm() + 1e-12))

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        assert closure is not None
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Lookahead(Optimizer):
    """Slow weights that follow the fast ones every few steps."""

    def __init__(self, inner: Optimizer, period: int = 10) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups, self.period, self.count = inner, inner.param_groups, period, 0
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.count += 1
        if self.count % self.period == 0:
            for slow, p in zip(self.slow, (p for g in self.param_groups for p in g["params"]), strict=True):
                p.copy_(slow.lerp_(p, 0.5))


class Distance(Optimizer):
    """Keeps the start of the weights and sums of gradients flat, by rows and by columns, as Prodigy and others do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["p0"] = p.flatten().clone() if bool(p.any()) else torch.tensor(0.0)
                    state["sum"] = torch.zeros_like(p).flatten()
                    state["rows"] = torch.zeros(len(p), 1)
                    state["columns"] = torch.zeros(p.shape[1])
                state["sum"] += p.grad.flatten()
                state["rows"] += p.grad.square().sum(1, keepdim=True)
                state["columns"] += p.grad.square().sum(0)
                p.sub_(group["lr"] * state["sum"].view_as(p) / (state["rows"].sqrt() + 1e-6))


class Fused(Optimizer):
    """Updates weights during backward; its step does nothing."""

    def __init__(self, params: list[nn.Parameter], step_raises: bool) -> None:
        super().__init__(params, {"lr": 0.01})
        self.step_raises = step_raises

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.step_raises:
            raise NotImplementedError("call fused_backward")


class Curvature(Optimizer):
    """Wants the graph of the gradients, and keeps what has no place for rows."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                assert p.grad.grad_fn is not None or p.grad.requires_grad
                self.state[p]["gram"] = (p.grad @ p.grad.T).detach()
