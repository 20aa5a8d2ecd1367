"""Knowledge distillation as a library: losses and the pieces around them, on plain tensors and modules."""

from kd.base import Batch, Distiller, Outputs, WeightedSum, distillers
from kd.cam import CAM
from kd.connect import probe
from kd.optim import DOT
from kd.schedule import Schedule
from kd.taps import Tapped, Taps
from kd.teacher import Frozen, frozen

__all__ = [
    "CAM",
    "DOT",
    "Batch",
    "Distiller",
    "Frozen",
    "Outputs",
    "Schedule",
    "Tapped",
    "Taps",
    "WeightedSum",
    "distillers",
    "frozen",
    "probe",
]
