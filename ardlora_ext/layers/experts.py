"""Adapters of a mixture of experts whose weights are 3-D parameters of one module: a rank for every expert.

`LoraExperts` stands where the experts module stood and lets it compute as ever, by whatever path it has; only its
stacked weights are, for the length of the call, `AdaptedWeight`s that bring their adapters along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ardlora_ext.layers.adapted_weight import AdaptedWeight, Call, Stack
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.layers.routing import Routing
from ardlora_ext.native.units import UnitLayout


class ExpertStack(LoraLinear):
    """The adapter of one stacked parameter: expert e has its own A_e [r_e, in_features] and B_e [r_e, out_features].

    `base_layer` is the experts module, which it knows but does not hold. It is never called itself.

    Attributes:
        parameter: name of the stacked parameter in the experts module.
        transposed: whether that is [experts, in, out]; else [experts, out, in].
        tokens: [experts] rows that each expert has seen in training mode since the controller last looked, on the
            device of the rows.
    """

    def __init__(
        self, base_layer: nn.Module, layout: UnitLayout, *args: Any, parameter: str, transposed: bool, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, layout, *args, **kwargs)
        self.parameter = parameter
        self.transposed = transposed
        self.tokens = torch.zeros(layout.units, dtype=torch.float64, device="cpu")
        self.owner: tuple[LoraExperts, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_layer":  # known, not held: its parameters have their names in `LoraExperts`
            vars(self)["_experts"] = (value,)
        else:
            super().__setattr__(name, value)

    @property
    def base_layer(self) -> nn.Module:  # type: ignore[override]
        """The experts module."""
        experts: nn.Module = vars(self)["_experts"][0]
        return experts

    @property
    def replacement(self) -> nn.Module:
        """The module that stands in the experts' place."""
        return self.owner[0]

    @property
    def weight(self) -> torch.Tensor:
        """The stacked parameter."""
        weight = self.base_layer._parameters[self.parameter]
        assert weight is not None
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """None: the experts module adds its biases itself."""
        return None

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raise: `LoraExperts` calls the experts module, which reads this stack's weight.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("ExpertStack: must not be called; call the experts module it belongs to")

    def placed(self, update: torch.Tensor) -> torch.Tensor:
        """Return updates [experts, out, in] in the layout of the parameter."""
        return update.mT if self.transposed else update

    @torch.no_grad()
    def fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return plain factors (A [experts, r, in], B [experts, out, r]) in float32, r the largest rank, 0 past r_e."""
        return fold_stack(self.layout, self.ranks, self.lora_A, self.lora_B, self.gate, self.scaling)


def fold_stack(
    layout: UnitLayout,
    ranks: Sequence[int],
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return plain factors (A [experts, r, in], B [experts, out, r]) in float32 of experts at `ranks`, 0 past r_e."""
    a, b = (lora_A.new_zeros(len(ranks), max(ranks), n, dtype=torch.float32) for n in (layout.a_width, layout.b_width))
    begin = 0
    for e, r in enumerate(ranks):
        rows = slice(begin, begin + r)
        a[e, :r] = lora_A[rows].float()
        b[e, :r] = scaling * (1.0 if gate is None else gate[rows].view(-1, 1)) * lora_B[rows].float()
        begin += r
    return a, b.mT.contiguous()


class LoraExperts(nn.Module):
    """An experts module whose stacked weights have adapters: children by the names of the parameters.

    Attributes:
        base_layer: the wrapped experts module, frozen.
        calls: what the stacks' products of one forward pass are computed by.
    """

    calls: Callable[[Stack, Routing], Call] = Call
    _is_kept_out = False

    def __new__(cls, *_args: Any, **_kwargs: Any) -> LoraExperts:
        """Keep the forward pass out of compiled graphs; not as a decorator, which would import torch's compiler."""
        if not LoraExperts._is_kept_out:
            disabled: Any = torch.compiler.disable(LoraExperts.forward)  # type: ignore[no-untyped-call]
            LoraExperts.forward, LoraExperts._is_kept_out = disabled, True  # type: ignore[method-assign]
        made: LoraExperts = super().__new__(cls)
        return made

    def __init__(self, base_layer: nn.Module, stacks: Sequence[ExpertStack]) -> None:
        super().__init__()
        self.base_layer = base_layer
        for stack in stacks:
            self._modules[stack.parameter] = stack  # add_module finds the name taken: by the base
            stack.owner = (self,)
        self.train(base_layer.training)

    @property
    def stacks(self) -> list[ExpertStack]:
        """The adapters, in the order of the parameters."""
        return [child for child in self._modules.values() if isinstance(child, ExpertStack)]

    def __getattr__(self, name: str) -> Any:
        """Models that look at their experts (`num_experts`, a bias) find what they know."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the experts module does of the same arguments, with adapted weights.

        Raises:
            TypeError: it computes with a weight in a way that no adapter can follow.
        """
        place = vars(self.base_layer)  # an instance's own attributes come before its parameters
        waiting = [stack for stack in self.stacks if stack.undo_merge is None]
        routing = Routing([*args, *kwargs.values()])
        try:
            for stack in waiting:
                place[stack.parameter] = AdaptedWeight(stack, self.calls(stack, routing))
            return self.base_layer(*args, **kwargs)
        finally:
            for stack in waiting:
                place.pop(stack.parameter, None)
