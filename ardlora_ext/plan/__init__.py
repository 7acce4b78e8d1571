"""What adapters on a model would cost, from its config alone: no weights are loaded and nothing is computed.

models (config -> model of fake tensors) -> trace (what a step keeps) -> memory, paper, cluster -> show
"""

from ardlora_ext.plan.memory import Plan, make_plan
from ardlora_ext.plan.skeleton import BUILT_IN, skeleton

__all__ = ["BUILT_IN", "Plan", "make_plan", "skeleton"]
