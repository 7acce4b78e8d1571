"""How many parameters of a wrapped model are adapters, and how many train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ardlora_ext.model.record import adapters, injection

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM accepts as max_lora_rank


def served_rank(rank: int) -> int:
    """Return the smallest rank that a server can be started with for a module of this rank."""
    return next((r for r in SERVED_RANKS if r >= rank), rank)


@dataclass(frozen=True)
class ParametersReport:
    """Parameter counts of a wrapped model.

    Attributes:
        live: adapter parameters in use: factors, trained gates (lambda of ElaLoRA and AdaLoRA), DoRA's magnitudes.
        allocated: adapter parameters held, with the slack of their capacity.
        trainable: everything that gets a gradient: live adapters and `modules_to_save`.
        total: the whole model with its live adapters.
        exported: in the PEFT file of the portable form, which pads every module to one rank.
        compact: in that of the compact form, where every module keeps its rank.
        served_rank: that rank: the smallest that a server accepts and no module exceeds.
    """

    live: int
    allocated: int
    trainable: int
    total: int
    exported: int = 0
    compact: int = 0
    served_rank: int = 0

    def __str__(self) -> str:
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {100 * self.trainable / max(self.total, 1):.4f} || adapters: {self.live:,}"
        )


def parameters_report(model: nn.Module) -> ParametersReport:
    """Count the parameters of a wrapped model; `print` it for PEFT's one-line form.

    All that the optimizer trains counts: lora_E (lambda, one number a component) and DoRA's magnitudes too. ARD-LoRA's
    gates follow from its ranks and are no parameters. The budgets of ElaLoRA and AdaLoRA are in components, as in their
    papers; those of ARD-LoRA and `compress` in parameters as counted here.
    """
    injection(model)
    layers = list(adapters(model).values())
    own = {id(p) for layer in layers for p in layer.trained.values()}
    live = sum(layer.live_parameters for layer in layers)
    others = [p for p in model.parameters() if id(p) not in own]
    hidden = [(layer.table.hidden, layer.in_features + layer.out_features) for layer in layers]
    served = served_rank(max((rank for rank, _ in hidden), default=0))
    return ParametersReport(
        live=live,
        allocated=sum(p.numel() for layer in layers for p in layer.trained.values()),
        trainable=live + sum(p.numel() for p in others if p.requires_grad),
        total=live + sum(p.numel() for p in others),
        exported=sum(served * width for rank, width in hidden if rank),
        compact=sum(rank * width for rank, width in hidden),
        served_rank=served,
    )
