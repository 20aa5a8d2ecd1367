"""Knowledge distillation as a library: losses and the pieces around them, on plain tensors and modules."""

from kd.base import Batch, Distiller, Outputs, WeightedSum, distillers
from kd.teacher import Frozen, frozen

__all__ = ["Batch", "Distiller", "Frozen", "Outputs", "WeightedSum", "distillers", "frozen"]
