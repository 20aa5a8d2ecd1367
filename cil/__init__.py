"""Class-incremental learning: a task-sequence engine, its learners, and what they are compared by."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cil.estimator import IncrementalClassifier
    from cil.loading import Model, load

__all__ = ["IncrementalClassifier", "Model", "load"]


def __getattr__(name: str) -> Any:
    """What `cil` offers, on first use, so that `import cil` costs no torch."""
    if name == "IncrementalClassifier":
        from cil.estimator import IncrementalClassifier

        return IncrementalClassifier
    if name in __all__:
        from cil import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'cil' has no attribute {name!r}")
