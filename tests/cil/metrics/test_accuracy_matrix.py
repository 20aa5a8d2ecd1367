from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cil.metrics import AccuracyMatrix
from cil.metrics.accuracy_matrix import continuum_forward_transfer

GOLDENS = Path(__file__).parents[2] / "goldens" / "dkt.npz"
with np.load(GOLDENS) as stored:
    ARRAYS = {name: stored[name] for name in stored.files if name.startswith("metrics/")}
CASES = sorted({name.split("/")[1] for name in ARRAYS})

# Accuracies printed by the logs of the DKT release (row: after a task, column: test images of a task), in percent.
TEN_STEPS_ONE_GPU = """
94.2
89.7 84.2
84.6 79.2 85.2
81.5 77.1 75   76.5
77.7 74.3 67.9 74   76.7
74.3 72.8 62.9 73.4 77.6 83.3
73.1 67.7 56.4 69   76.7 81   69.8
70.7 65.4 53.7 66.4 71.8 81.7 54.6 78.9
69.6 59.6 48.3 60.4 70.5 79.3 60   59.8 78.6
68.5 58   43.4 60.4 67.7 74.6 58.9 66.5 66.8 69.7
"""
TEN_STEPS_TWO_GPUS = """
94.1
90.2 85.4
85.3 80.9 83.8
78.3 77   73.6 80.3
75.2 75.2 67.7 77.6 78.2
74.5 68.6 57.7 72   81.6 86.3
72.6 64.3 54.3 64.9 77.4 85.4 68.6
70.1 60.8 52.6 60.8 71.5 81.1 67.7 79.7
68.1 57.6 49.8 56.8 61.8 76.2 59.9 80.2 74.2
65.6 52.7 41.7 56.4 57.2 72.2 55.7 74.1 78.9 65.7
"""
FIVE_STEPS = """
88.3
78.55 81.85
74.2  70.65 85.9
68.15 63.5  79.2  76.95
63.45 57.4  70.55 70.35 74.1
"""
IMAGENET100 = """
91.6
87   84.6
79.2 80.8 84.6
75.8 76   83   82.6
68.8 73.6 78.8 82.2 83
68.4 72.6 77.6 78   83.8 79
63.2 69.6 72.4 74.4 77.4 83.4 74
58.6 66.6 68.6 70.8 71.8 82.2 82.4 71.8
57.2 63.4 66   71.8 70.6 78   78.4 78.8 67.6
57.8 63.6 65   67.8 66   77.8 73.4 77.6 76   62.4
"""
# matrix: average, last, forgetting (true, logged), backward transfer (true, logged), "forward transfer" logged
PUBLISHED = {
    "ten_steps_one_gpu": (TEN_STEPS_ONE_GPU, 75.69, 63.45, (18.17, 16.86), (-18.07, -12.60), 68.94),
    "ten_steps_two_gpus": (TEN_STEPS_TWO_GPUS, 75.54, 62.02, (20.00, 20.47), (-19.57, -15.02), 68.53),
    "five_steps": (FIVE_STEPS, 76.91, 67.17, (17.81, 16.16), (-17.81, -11.73), 69.60),
    "imagenet100": (IMAGENET100, 77.62, 68.74, (12.71, 12.87), (-10.42, -10.57), 73.25),
}
ROUNDED = 0.0051  # the logs print two digits
ROUNDED_TWICE = 0.01  # and averages of such numbers


def published(text: str) -> AccuracyMatrix:
    rows = [[float(value) for value in line.split()] for line in text.split("\n") if line]
    padded: list[list[float | None]] = [[*row, *[None] * (len(rows) - len(row))] for row in rows]
    return AccuracyMatrix.from_fractions(padded, num_images=[1000] * len(rows))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_matrices_give_the_true_figures(name: str) -> None:
    text, average, last, (forgetting, _), (transfer, _), _ = PUBLISHED[name]
    matrix = published(text)
    assert matrix.average_incremental_accuracy() == pytest.approx(average, abs=ROUNDED_TWICE)
    assert matrix.last_accuracy() == pytest.approx(last, abs=ROUNDED)
    assert matrix.forgetting() == pytest.approx(forgetting, abs=ROUNDED)
    assert matrix.backward_transfer() == pytest.approx(transfer, abs=ROUNDED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_matrices_give_the_logged_figures_with_the_definition_of_continuum(name: str) -> None:
    text, _, _, (_, forgetting), (_, transfer), forward = PUBLISHED[name]
    matrix = published(text)
    assert matrix.forgetting("continuum") == pytest.approx(forgetting, abs=ROUNDED)
    assert matrix.backward_transfer("continuum") == pytest.approx(transfer, abs=ROUNDED)
    assert continuum_forward_transfer(matrix.values, matrix.num_tasks - 1) == pytest.approx(forward, abs=ROUNDED)


@pytest.mark.parametrize("case", CASES)
def test_goldens_are_met(case: str) -> None:
    golden = {name.split("/", 2)[2]: array for name, array in ARRAYS.items() if name.startswith(f"metrics/{case}/")}
    matrix = AccuracyMatrix.from_counts(golden["correct"], golden["n_images"])
    found = {
        "accuracy": matrix.values,
        "accuracy_after_image": matrix.accuracy_after(),
        "accuracy_after_task": matrix.accuracy_after_task_mean(),
        "forgetting_after": matrix.forgetting_after(),
        "forgetting_per_task": matrix.forgetting_per_task(),
        "avg_incremental_image": matrix.average_incremental_accuracy(),
        "avg_incremental_task": matrix.average_incremental_task_mean(),
        "last_image": matrix.last_accuracy(),
        "last_task": matrix.last_task_mean(),
        "forgetting": matrix.forgetting(),
        "bwt": matrix.backward_transfer(),
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, golden[name], rtol=1e-12, atol=1e-12, err_msg=f"{case}: {name}")


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Images per task, and the counts of the finished stages."""
    num_images = draw(st.lists(st.integers(1, 50), min_size=1, max_size=6))
    finished = draw(st.integers(0, len(num_images)))
    return num_images, [[draw(st.integers(0, n)) for n in num_images[: t + 1]] for t in range(finished)]


def recorded(num_images: list[int], rows: list[list[int]]) -> AccuracyMatrix:
    matrix = AccuracyMatrix(num_images)
    for stage, row in enumerate(rows):
        matrix.record(stage, row)
    return matrix


@given(runs())
def test_counts_survive_the_round_trip_through_json(run: tuple[list[int], list[list[int]]]) -> None:
    matrix = recorded(*run)
    stored = matrix.to_json()
    again = AccuracyMatrix.from_json(stored)
    assert again.to_json() == stored
    assert all(isinstance(count, int) for row in stored["correct"] for count in row)
    assert again.num_finished == len(run[1])
    np.testing.assert_array_equal(again.values, matrix.values)
    np.testing.assert_array_equal(AccuracyMatrix.from_counts(**stored).values, matrix.values)


@given(runs())
def test_accuracy_after_is_the_share_of_all_images_seen(run: tuple[list[int], list[list[int]]]) -> None:
    num_images, rows = run
    after = recorded(num_images, rows).accuracy_after()
    for stage, row in enumerate(rows):
        assert after[stage] == pytest.approx(sum(row) / sum(num_images[: stage + 1]))
    assert np.isnan(after[len(rows) :]).all()


@given(runs())
def test_an_unfinished_run_has_the_numbers_of_a_run_that_ends_there(run: tuple[list[int], list[list[int]]]) -> None:
    num_images, rows = run
    if not rows:
        return
    unfinished, shorter = recorded(num_images, rows), recorded(num_images[: len(rows)], rows)
    for scalar in ("average_incremental_accuracy", "last_accuracy", "last_task_mean", "forgetting"):
        np.testing.assert_equal(getattr(unfinished, scalar)(), getattr(shorter, scalar)())
    np.testing.assert_equal(unfinished.backward_transfer(), shorter.backward_transfer())
    np.testing.assert_array_equal(unfinished.forgetting_per_task(), shorter.forgetting_per_task())


@given(runs())
def test_forgetting_is_at_least_the_loss_since_each_task_was_learned(run: tuple[list[int], list[list[int]]]) -> None:
    matrix = recorded(*run)
    if len(run[1]) < 2:
        assert np.isnan(matrix.forgetting())
        assert np.isnan(matrix.backward_transfer())
    else:
        assert matrix.forgetting() >= -matrix.backward_transfer() - 1e-12
        assert matrix.forgetting() == pytest.approx(matrix.forgetting_per_task().mean())


@given(runs())
def test_every_number_lies_where_its_definition_allows(run: tuple[list[int], list[list[int]]]) -> None:
    num_images, rows = run
    if not rows:
        return
    matrix = recorded(num_images, rows)
    after = matrix.accuracy_after()[: len(rows)]
    assert matrix.average_incremental_accuracy() == pytest.approx(after.mean())
    assert after.min() - 1e-12 <= matrix.average_incremental_accuracy() <= after.max() + 1e-12
    assert 0 <= matrix.last_accuracy() == after[-1] <= 1
    assert np.isnan(matrix.values[np.triu_indices(len(num_images), k=1)]).all()
    if len(rows) > 1:
        assert -1 <= matrix.backward_transfer() <= 1
        assert -1 <= matrix.forgetting() <= 1


@given(runs(), st.integers(1, 10))
def test_more_images_of_every_task_at_the_same_accuracies_change_no_number(
    run: tuple[list[int], list[list[int]]], times: int
) -> None:
    num_images, rows = run
    more = recorded([times * n for n in num_images], [[times * n for n in row] for row in rows])
    for name, value in recorded(num_images, rows).summary().items():
        numbers = [np.array(each, dtype=np.float64) for each in (more.summary()[name], value)]  # null becomes NaN
        np.testing.assert_allclose(*numbers, rtol=1e-12, atol=1e-12, err_msg=name)


@given(runs())
def test_tasks_of_one_size_make_both_averages_equal(run: tuple[list[int], list[list[int]]]) -> None:
    num_images, rows = run
    matrix = recorded([50] * len(num_images), rows)
    np.testing.assert_allclose(matrix.accuracy_after(), matrix.accuracy_after_task_mean())


def test_nothing_finished_means_nothing_is_known() -> None:
    matrix = AccuracyMatrix([10, 20])
    summary = matrix.summary()
    assert summary["accuracy_matrix"] == [[None, None], [None, None]]
    assert summary["accuracy_after"] == [None, None]
    for name in ("average_incremental_accuracy", "last_accuracy", "forgetting", "backward_transfer"):
        assert summary[name] is None
    assert matrix.forgetting_per_task().size == 0


def test_summary_has_null_where_a_task_was_unseen() -> None:
    summary = recorded([10, 30], [[9], [4, 24]]).summary()
    assert summary["accuracy_matrix"] == [[0.9, None], [0.4, 0.8]]
    assert summary["accuracy_after"] == [0.9, 0.7]
    assert summary["forgetting_after"] == [None, 0.5]
    assert summary["average_incremental_accuracy"] == pytest.approx(0.8)
    assert summary["backward_transfer"] == pytest.approx(-0.5)
    assert summary["forward_transfer"] is None


def test_summary_takes_the_definition_of_continuum() -> None:
    matrix = published(FIVE_STEPS)
    assert matrix.summary("continuum")["forgetting"] == matrix.forgetting("continuum")
    assert matrix.summary("continuum")["backward_transfer"] == matrix.backward_transfer("continuum")
    assert matrix.summary("continuum")["last_accuracy"] == matrix.last_accuracy()


def test_forward_transfer_is_reported_only_if_measured() -> None:
    matrix = recorded([10, 10, 10], [[9], [4, 8]])
    assert matrix.forward_transfer() is None
    assert matrix.forward_transfer(before=[0.3, 0.2], untrained=[0.1, 0.2]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="untrained"):
        matrix.forward_transfer(before=[0.3, 0.2])


@pytest.mark.parametrize(
    ("stage", "correct", "message"),
    [
        (1, [5, 5], "stage 0 of 2 is next"),
        (0, [5, 5], "1 seen tasks, found 2"),
        (0, [11], r"0 to \[10\], found \[11"),
        (0, [-1], "found"),
    ],
)
def test_results_that_do_not_fit_are_refused(stage: int, correct: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccuracyMatrix([10, 10]).record(stage, correct)


def test_no_stage_is_recorded_after_the_last() -> None:
    with pytest.raises(ValueError, match="stage 1 of 1"):
        recorded([10], [[9]]).record(1, [9, 9])


@pytest.mark.parametrize("num_images", [[], [10, 0]])
def test_tasks_without_test_images_are_refused(num_images: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one test image"):
        AccuracyMatrix(num_images)


@pytest.mark.parametrize(
    ("correct", "message"),
    [
        ([[9]], "square"),
        ([[9, 1], [4, 8]], "not seen yet"),
        ([[9, -1], [-1, 8]], "seen tasks need"),
        ([[-1, -1], [4, 8]], "not seen yet"),
    ],
)
def test_matrices_with_holes_are_refused(correct: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccuracyMatrix.from_counts(correct, [10, 10])
