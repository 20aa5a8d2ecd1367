"""Optimisers that know which gradient comes from the teacher."""

from kd.optim.dot import DOT

__all__ = ["DOT"]
