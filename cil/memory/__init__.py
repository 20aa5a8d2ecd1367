from cil.memory.memory import Budget, ExemplarMemory
from cil.memory.rules import HerdingOrder, SelectionRule, herding, herding_residual, selection_rules

__all__ = [
    "Budget",
    "ExemplarMemory",
    "HerdingOrder",
    "SelectionRule",
    "herding",
    "herding_residual",
    "selection_rules",
]
