"""A slow transcription of training in the P Lambda Q form: autograd for everything, one object per component.

Shares no code with the package. Numbers are float64; Adam and the scores are written out by their formulas.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import nn

import ardlora_ext as ard

# With a tiny eps Adam turns the rounding noise of a vanishing gradient into steps of full size, and float32 and float64
# part ways.
BETAS, EPS = (0.9, 0.999), 1e-3
SIZES = ((20, 24), (24, 22), (22, 19), (19, 23), (23, 18))  # of the layers, (in, out)


class Chain(nn.Module):
    """Five linear layers of odd sizes with tanh between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(k, n) for k, n in SIZES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        out: torch.Tensor = self.layers[-1](x)
        return out


def chain_and_teacher(seed: int = 0) -> tuple[Chain, Chain]:
    """Return a model and one whose layers differ from it by updates of rank 0 to 4."""
    torch.manual_seed(seed)
    model, teacher = Chain(), Chain()
    teacher.load_state_dict(model.state_dict())
    for rank, layer in enumerate(teacher.layers):
        k, n = layer.in_features, layer.out_features
        layer.weight.data += 0.5 * torch.randn(n, rank) @ torch.randn(rank, k) / 3
    return model, teacher


def batch(step: int) -> torch.Tensor:
    """Return the inputs of a step, [16, 20]."""
    return torch.randn(16, SIZES[0][0], generator=torch.Generator().manual_seed(1000 + step))


def warmup_decay(step: int, total: int) -> float:
    """Return the factor of the learning rate: linear rise over 20 steps, linear fall to 0."""
    return min(1.0, (step + 1) / 20) * (1.0 - step / total)


class Component:
    """Triplet i of a matrix, as one trained vector: column p of P, row q of Q, lambda; with its moments and scores."""

    def __init__(self, p: torch.Tensor, q: torch.Tensor, lam: float = 0.0, born: int = -(10**9)) -> None:
        parts = [p.detach().double(), q.detach().double(), torch.tensor([lam], dtype=torch.float64)]
        self.value = torch.cat(parts).requires_grad_()
        self.sizes = [len(part) for part in parts]
        self.sensitivity, self.uncertainty = (
            torch.zeros(sum(self.sizes)).double(),
            torch.zeros(sum(self.sizes)).double(),
        )
        self.born = born
        self.masked = False
        self.forget()

    @property
    def p(self) -> torch.Tensor:
        return self.value[: self.sizes[0]]

    @property
    def q(self) -> torch.Tensor:
        return self.value[self.sizes[0] : -1]

    @property
    def lam(self) -> torch.Tensor:
        return self.value[-1]

    def forget(self) -> None:
        self.m, self.v = torch.zeros_like(self.sensitivity), torch.zeros_like(self.sensitivity)

    @torch.no_grad()
    def adam(self, gradient: torch.Tensor, lr: float, count: int) -> None:
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * gradient
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * gradient**2
        m_hat, v_hat = self.m / (1 - BETAS[0] ** count), self.v / (1 - BETAS[1] ** count)
        self.value -= lr * m_hat / (v_hat.sqrt() + EPS)

    @torch.no_grad()
    def score_step(self, gradient: torch.Tensor, beta1: float, beta2: float) -> None:
        now = (self.value * gradient).abs()  # E2
        self.sensitivity = beta1 * self.sensitivity + (1 - beta1) * now  # E3
        self.uncertainty = beta2 * self.uncertainty + (1 - beta2) * (now - self.sensitivity).abs()  # E4

    def score(self) -> float:
        entries = self.sensitivity * self.uncertainty  # E5
        return sum(float(part.mean()) for part in entries.split(self.sizes))  # E6


class SlowModel:
    """The chain with W + s sum_i lambda_i p_i q_i^T in every layer."""

    def __init__(self, wrapped: nn.Module, orth: str, gamma: float) -> None:
        layers = ard.adapters(wrapped)
        self.names = list(layers)
        self.scaling = next(iter(layers.values())).scaling
        self.base = [(g.base_layer.weight.double(), g.base_layer.bias.double()) for g in layers.values()]
        self.matrices = [[Component(g.lora_B[i], g.lora_A[i]) for i in range(g.ranks[0])] for g in layers.values()]
        self.orth, self.gamma = orth, gamma
        self.first_rank = len(self.matrices[0])
        self.count = 0  # of Adam

    @property
    def ranks(self) -> list[int]:
        return [len(matrix) for matrix in self.matrices]

    def components(self) -> list[Component]:
        return [c for matrix in self.matrices for c in matrix]

    def delta(self, m: int) -> torch.Tensor:
        matrix = self.matrices[m]
        if not matrix:
            return torch.zeros_like(self.base[m][0])
        p, q = torch.stack([c.p for c in matrix], dim=1), torch.stack([c.q for c in matrix])
        return self.scaling * p @ torch.diag(torch.stack([c.lam for c in matrix])) @ q

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for m, (weight, bias) in enumerate(self.base):
            x = x @ (weight + self.delta(m)).T + bias
            x = torch.tanh(x) if m < len(self.base) - 1 else x
        return x

    def regulariser(self) -> torch.Tensor:
        """Return E1 (`squared`, scaled to the first gradient of the other) or the code's mean of unsquared norms."""
        total = torch.zeros((), dtype=torch.float64)
        for matrix in self.matrices:
            for vectors in ([c.p for c in matrix], [c.q for c in matrix]):
                if not vectors:
                    continue
                rows = torch.stack(vectors)
                square = ((rows @ rows.T - torch.eye(len(rows))) ** 2).sum()
                if self.orth == "norm":
                    total = total + square.sqrt() / (2 * len(self.matrices))
                else:
                    width, r = rows.shape[1], self.first_rank
                    nu = 0.02**2 * width
                    first = (r * ((1 - nu) ** 2 + nu**2 * (r + 1) / width)) ** 0.5
                    total = total + square / (4 * len(self.matrices) * first)
        return self.gamma * total

    def step(
        self, x: torch.Tensor, y: torch.Tensor, lr: float, clip: float | None = None
    ) -> tuple[float, list[torch.Tensor]]:
        """Take one Adam step on the whole loss, clipped as a whole; return the loss of the task and all gradients."""
        task = ((self.forward(x.double()) - y.double()) ** 2).mean()
        components = self.components()
        gradients = list(torch.autograd.grad(task + self.regulariser(), [c.value for c in components]))
        if clip is not None:
            norm = torch.cat(gradients).norm()
            gradients = [g * torch.clamp(clip / (norm + 1e-6), max=1.0) for g in gradients]
        self.count += 1
        for c, gradient in zip(components, gradients, strict=True):
            c.adam(gradient, lr, self.count)
        return task.item(), gradients

    def score(self, gradients: Sequence[torch.Tensor], beta1: float, beta2: float) -> None:
        """Update the averages with the weights after the step, as the released code does."""
        for c, gradient in zip(self.components(), gradients, strict=True):
            c.score_step(gradient, beta1, beta2)

    def restart(self) -> None:
        """Begin with a fresh Adam."""
        self.count = 0
        for c in self.components():
            c.forget()


def gaussians(seed: int, name: str, new: int, widths: tuple[int, int]) -> list[list[torch.Tensor]]:
    """Return the Gaussian vectors that a rank change draws for the new rows of (Q, P) of a module."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return [[torch.randn(width, generator=generator).double() for _ in range(new)] for width in widths]


def assert_same(model: nn.Module, slow: SlowModel, rel: float = 1e-5) -> None:
    """Check ranks and factors of every layer against the transcription, relative to the largest entry of their kind."""
    ranks = [len(matrix) for matrix in slow.matrices]
    layers = list(ard.adapters(model).values())
    assert [layer.ranks for layer in layers] == [[r] for r in ranks]
    for name, kind in {"lora_B": "p", "lora_A": "q", "lora_E": "lam"}.items():
        values = torch.cat([getattr(c, kind).detach().reshape(-1) for c in slow.components()])
        ours = torch.cat([g.factors[name].detach()[:r].reshape(-1) for g, r in zip(layers, ranks, strict=True)])
        error, largest = (float(t.abs().max()) for t in (ours - values, values))
        assert error < rel * max(largest, 1e-2), (name, error, largest)
