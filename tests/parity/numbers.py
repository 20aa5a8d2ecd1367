"""Checks of herding, metrics and schedules (goldens/dkt.md, sections 3 to 5)."""

import numpy as np

from cil.memory import herding_residual
from cil.metrics import AccuracyMatrix
from cil.optim import Schedule, learning_rates
from tests.parity.case import Array, Case, Comparison

SCHEDULE_TOLERANCE = 1e-12
MAX_ITERATIONS = 1000  # of the release's loop


def check_herding(case: Case, comparison: Comparison) -> None:
    features, golden = case["features"], case["order"]
    comparable = int(case["comparable"])
    found = herding_residual(case.tensor("features"), int(case["m"]), max_iterations=MAX_ITERATIONS)
    order = found.order.numpy()
    comparison.exact("picked", found.picked, case["picked"])
    comparison.exact("iterations", found.iterations, case["iterations"])
    comparison.exact("number of exemplars", len(order), len(golden))
    comparison.true("rows of the order are distinct", len(set(order.tolist())) == len(order))
    equal = [_same_row(features, a, b) for a, b in zip(order[:comparable], golden[:comparable], strict=True)]
    if all(equal):
        order = np.where(np.arange(len(order)) < comparable, golden, order)
    comparison.exact("order", order[:comparable], golden[:comparable])
    case.ignore("min_gap")


def _same_row(features: Array, found: int, golden: int) -> bool:
    """Whether two picks are one: the same row, or equal rows whose scores rounding may tell apart.

    A score of a row with a single entry has one product and no sum, so nothing is rounded: there the lowest index wins.
    """
    if found == golden or golden not in range(len(features)):
        return found == golden
    return bool(np.count_nonzero(features[golden]) > 1) and np.array_equal(features[found], features[golden])


def check_metrics(case: Case, comparison: Comparison) -> None:
    matrix = AccuracyMatrix.from_counts(case["correct"], case["n_images"])
    found = {
        "accuracy": matrix.values,
        "accuracy_after_image": matrix.accuracy_after(),
        "accuracy_after_task": matrix.accuracy_after_task_mean(),
        "avg_incremental_image": matrix.average_incremental_accuracy(),
        "avg_incremental_task": matrix.average_incremental_task_mean(),
        "last_image": matrix.last_accuracy(),
        "last_task": matrix.last_task_mean(),
        "forgetting_after": matrix.forgetting_after(),
        "forgetting_per_task": matrix.forgetting_per_task(),
        "forgetting": matrix.forgetting(),
        "bwt": matrix.backward_transfer(),
    }
    for name in case.arrays:
        if name.startswith("exact/"):
            numerator, denominator = case[name]
            fraction = numerator / denominator if denominator else np.nan
            comparison.close(name, found[name.removeprefix("exact/")], fraction)
        elif name in found:
            comparison.close(name, found[name], case[name])


def check_schedule(case: Case, comparison: Comparison) -> None:
    epochs, warmup_epochs, warmup_lr, peak, min_lr = case["hp"].tolist()
    for name, legacy_shift in (("lr", True), ("curve", False)):
        schedule = Schedule(
            name="cosine",
            warmup_epochs=int(warmup_epochs),
            warmup_lr=warmup_lr,
            min_lr=min_lr,
            legacy_shift=legacy_shift,
        )
        rates = learning_rates(schedule, int(epochs), peak)
        comparison.close(name, rates, case[name], absolute=0.0, relative=SCHEDULE_TOLERANCE)
