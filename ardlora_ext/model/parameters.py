"""How many parameters of a wrapped model are adapters, and how many train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ardlora_ext.model.record import adapters, injection


@dataclass(frozen=True)
class ParametersReport:
    """Parameter counts of a wrapped model.

    Attributes:
        live: adapter parameters in use: factors, trained gates (lambda of ElaLoRA and AdaLoRA), DoRA's magnitudes.
        allocated: adapter parameters held, with the slack of their capacity.
        trainable: everything that gets a gradient: live adapters and `modules_to_save`.
        total: the whole model with its live adapters.
    """

    live: int
    allocated: int
    trainable: int
    total: int

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
    return ParametersReport(
        live=live,
        allocated=sum(p.numel() for layer in layers for p in layer.trained.values()),
        trainable=live + sum(p.numel() for p in others if p.requires_grad),
        total=live + sum(p.numel() for p in others),
    )
