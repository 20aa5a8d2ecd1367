"""Accuracies of a run, and the numbers derived from them."""

from cil.metrics.accuracy_matrix import AccuracyMatrix, Definition

__all__ = ["AccuracyMatrix", "Definition"]
