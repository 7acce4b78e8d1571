"""AdaLoRA (arXiv:2303.10512): components of all units compete for a falling budget."""

from __future__ import annotations

from dataclasses import dataclass

from ardlora_ext.config.checks import require
from ardlora_ext.config.svd import SvdConfig


@dataclass(frozen=True, kw_only=True)
class AdaConfig(SvdConfig):
    """AdaLoRA (arXiv:2303.10512): from `init_r` components per unit down to the best `target_r` on average.

    The budget falls as a cubic of the progress. `ranks()` are the components not masked; a unit may end with none.

    Attributes:
        init_r: rank every unit starts with; it sets `scaling`. Default as in PEFT.
        target_r: mean rank at the end. Default as in PEFT.
        removal: take components out instead of masking them: memory falls with the budget, none comes back. Masked
            ones are taken out after the last step.
        orth_reg_weight: as in PEFT.
    """

    init_r: int = 12
    target_r: int = 8
    removal: bool = False
    orth_reg_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.target_r >= 1, f"AdaConfig: target_r must be >= 1, got {self.target_r}")
        require(
            self.init_r >= self.target_r,
            f"AdaConfig: init_r must be >= target_r = {self.target_r}, got {self.init_r}",
        )

    @property
    def initial_rank(self) -> int:
        return self.init_r
