"""ARD-LoRA's step bounds where the smoothness is known: `python -m ardlora_ext.bench descent`.

Theorem III.1 (arXiv:2506.18267) takes L_meta = L_task + price * (sum |alpha| + tv/2 |alpha(t) - alpha(t-1)|^2) and the
steps

    eta_Theta <= 1 / L_T,     eta_alpha <= 1 / (L_T + price * tv).

Here the task is full-batch least squares, sum_u |dW_u - D_u|^2 / 2 with planted D_u, by plain gradient descent on
factors and alpha at once, through the package's own layers and controller. L_T is the largest eigenvalue of the
Hessian of L_task in factors and alpha together, met on the way. Factors then train at their bound, and alpha at c times
its own: told is in how many runs L_meta never rose, how many steps rose, the largest rise in parts of the first L_meta,
where L_meta ended, and what `ArdController.step_bound` takes for L_T, in parts of the largest curvature in alpha alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext.errors import InputError
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.ranks.controllers.ard.controller import ArdController

Gate = Literal["ramp", "sigmoid"]
Form = Literal["prox", "explicit"]

UNITS, WIDTH, R0, R_MAX = 4, 8, 2, 4
PRICE, TV, FLOOR, GATE_WIDTH = 0.05, 2.0, 1e-3, 0.5
GATES: tuple[Gate, ...] = ("ramp", "sigmoid")
FORMS: tuple[Form, ...] = ("prox", "explicit")
MULTIPLES = (1.0, 2.0, 3.0, 5.0, 20.0)
_POINTS = 20  # of a path at which the Hessian is taken
_ROUNDING = 1e-6  # of the first L_meta: a rise below is float32's


class Bed(nn.Module):
    """Linear units without a weight; each has an update of rank 1 to R_MAX to learn."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.units = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(UNITS))
        for unit in self.units:
            nn.init.zeros_(unit.get_parameter("weight"))
        left, right = torch.randn(2, UNITS, WIDTH, R_MAX, generator=generator) / WIDTH**0.5
        planted = torch.arange(R_MAX) <= torch.arange(UNITS)[:, None] % R_MAX
        self.targets = (left * planted[:, None]) @ right.mT  # [units, width, width]

    def loss(self) -> torch.Tensor:
        """Return L_task."""
        updates = torch.stack([unit(torch.eye(WIDTH)).T for unit in self.units])
        loss: torch.Tensor = (updates - self.targets).square().sum() / 2
        return loss


@dataclass(frozen=True)
class Path:
    """One run.

    Attributes:
        losses: L_meta before each step.
        smoothness: largest eigenvalue of the Hessian on the way; 0 if it was not asked for.
        in_alpha: largest second derivative by an alpha.
        helper: what `step_bound` took for L_T.
    """

    losses: list[float]
    smoothness: float
    in_alpha: float
    helper: float

    @property
    def rises(self) -> list[float]:
        """Each rise of L_meta in parts of its first value; what is no longer a number counts as one."""
        first = self.losses[0]
        return [(b - a) / first for a, b in itertools.pairwise(self.losses) if not b - a <= _ROUNDING * first]


def gates(kind: Gate, rho: torch.Tensor, live: int) -> torch.Tensor:
    """Return the gates [live] of a unit as a differentiable function of its soft rank."""
    d = rho - torch.arange(live, dtype=rho.dtype)
    if kind == "sigmoid":
        found = torch.sigmoid((d - 0.5) / GATE_WIDTH)
    else:
        found = torch.where(d >= 0, d.clamp(FLOOR, 1.0), (FLOOR * (1 + d)).clamp(min=0.0))
    return torch.cat([torch.ones_like(found[:1]), found[1:]])


def hessian(layer: LoraLinear, alpha: float, target: torch.Tensor, kind: Gate) -> torch.Tensor:
    """Return the Hessian of a unit's L_task in its live factors and alpha (the last), float64."""
    live = layer.ranks[0]
    factors = [factor.detach()[:live].double().flatten() for factor in (layer.lora_A, layer.lora_B)]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        a, b = flat[:-1].reshape(2, live, WIDTH)
        update = layer.scaling * b.T @ (gates(kind, R0 * flat[-1], live)[:, None] * a)
        squares: torch.Tensor = (update - target.double()).square()
        return squares.sum() / 2

    flat = torch.cat([*factors, torch.tensor([alpha], dtype=torch.float64)])
    found: torch.Tensor = torch.autograd.functional.hessian(loss, flat, vectorize=True)  # type: ignore[no-untyped-call]
    return found


def descend(
    seed: int, steps: int, gate: Gate, form: Form, smoothness: float, c: float = 1.0, curvature: bool = False
) -> Path:
    """Train with eta_Theta = 1 / L_T and eta_alpha = c / (L_T + price * tv); stops where L_meta is no number.

    Args:
        seed: of the problem and of the start.
        steps: of gradient descent.
        gate: of the soft rank.
        form: of the variation.
        smoothness: L_T.
        c: multiple of alpha's bound.
        curvature: take Hessians on the way.
    """
    bed = Bed(seed)
    options: dict[str, Any] = {
        "mode": "paper",
        "r0": R0,
        "r_max": R_MAX,
        "lora_alpha": R0,
        "granularity": "matrix",
        "seed": seed,
    }
    options |= {"gate": gate, "gate_width": GATE_WIDTH, "gate_floor": FLOOR, "update_interval": 1, "hysteresis": R_MAX}
    options |= {"slope": "tangent", "normalize": False, "cost_weighted": False, "reorder": False}
    options |= {"l1": PRICE, "tv": TV, "variation_form": form, "lr_alpha": c / (smoothness + PRICE * TV)}
    ard.wrap(bed, ard.ArdConfig(**options))
    layers = list(ard.adapters(bed).values())
    optimizer = torch.optim.SGD([p for p in bed.parameters() if p.requires_grad], lr=1.0 / smoothness)
    controller = ard.attach(bed, optimizer)
    assert isinstance(controller, ArdController)
    losses, largest, in_alpha = [], 0.0, 0.0
    for step in range(steps):
        if curvature and step % max(1, steps // _POINTS) == 0:
            for layer, alpha, target in zip(layers, controller.alpha.tolist(), bed.targets, strict=True):
                found = hessian(layer, alpha, target, gate)
                largest = max(largest, float(torch.linalg.eigvalsh(found).max()))
                in_alpha = max(in_alpha, float(found[-1, -1]))
        loss = bed.loss()
        change = controller.alpha - controller.previous
        losses.append(loss.item() + PRICE * float(controller.alpha.sum() + TV / 2 * (change**2).sum()))
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Path(losses, largest, in_alpha, controller.lipschitz)


def known_smoothness(seed: int, steps: int, gate: Gate) -> Path:
    """Return a run at the bounds, with an L_T that no curvature on its way exceeds."""
    bound = 4.0
    while (path := descend(seed, steps, gate, "prox", bound, curvature=True)).smoothness > bound:
        bound = 1.05 * path.smoothness
    return replace(path, smoothness=bound)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `descent`."""
    parser.epilog = __doc__
    parser.add_argument("--seeds", type=int, default=5, help="planted problems")
    parser.add_argument("--steps", type=int, default=120, help="steps of a run")


def run(arguments: argparse.Namespace, command: str) -> None:
    """Print a line per gate, form of the variation, and multiple of alpha's bound."""
    for name in ("seeds", "steps"):
        if getattr(arguments, name) < 1:
            raise InputError(f"bench: --{name} must be at least 1, got {getattr(arguments, name)}")
    print(command)
    headings = f"{'never rose':>12}{'steps rose':>12}{'largest':>10}{'end/start':>11}{'helper':>8}"
    print(f"{'gate':9}{'form':10}{'c':>5}{headings}")
    for gate in GATES:
        known = [known_smoothness(seed, arguments.steps, gate) for seed in range(arguments.seeds)]
        ratios = (f"{path.smoothness:.3g} ({path.in_alpha:.3g})" for path in known)
        print(f"{gate:9}L_T (in alpha alone): {', '.join(ratios)}")
        for form, c in itertools.product(FORMS, MULTIPLES):
            paths = [descend(s, arguments.steps, gate, form, path.smoothness, c) for s, path in enumerate(known)]
            print(_line(gate, form, c, paths, known))


def _line(gate: Gate, form: Form, c: float, paths: list[Path], known: list[Path]) -> str:
    rises = [rise for path in paths for rise in path.rises]
    share = len(rises) / max(1, sum(len(path.losses) - 1 for path in paths))
    calm = f"{sum(not path.rises for path in paths)} of {len(paths)}"
    end = statistics.fmean(path.losses[-1] / path.losses[0] for path in paths)
    helper = statistics.fmean(path.helper / best.in_alpha for path, best in zip(paths, known, strict=True))
    return f"{gate:9}{form:10}{c:>5g}{calm:>12}{share:>12.2%}{max(rises, default=0.0):>10.2g}{end:>11.3f}{helper:>8.2g}"
