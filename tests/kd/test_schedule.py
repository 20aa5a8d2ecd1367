import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kd import Batch, Distiller, Outputs, WeightedSum
from kd.logit.kd import KD
from kd.schedule import AtEpoch, LastDrop, Plateau, Schedule, shortened, stop_rules
from tests.parity.case import Case, read_cases
from tests.parity.runner import check

GOLDENS = [
    case
    for case in read_cases(Path(__file__).parents[1] / "goldens" / "kd.npz")
    if case.name.startswith(("takd/", "eskd/"))
]
BATCH = Batch(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]), torch.arange(2))
STUDENT = Outputs(torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]]))
TEACHER = Outputs(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 3.0]]))
STEPS = [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]  # drops at epochs 2 and 4
LOSSES = [None, 3.0, 2.0, 2.5, 2.0, 1.0]  # after the epoch before; the lowest stays at 2.0 for two epochs


class Constant(Distiller):
    """1, with a parameter and a note of everything that it is told."""

    def __init__(self, needs: set[str] | None = None) -> None:
        super().__init__()
        self.needs = needs or {"logits"}
        self.scale = nn.Parameter(torch.ones(()))
        self.told: list[str] = []

    def connect(self, student: Outputs, teacher: Outputs) -> None:
        self.told.append("connect")

    def remember(self, ids: Tensor, labels: Tensor) -> None:
        self.told.append(f"remember {len(ids)}")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        self.told.append("forward")
        return 1 * self.scale


def eskd(stop: Any, alpha: float = 0.9) -> WeightedSum:
    return WeightedSum({"kd": (alpha, Constant())}, schedules={"kd": Schedule(stop=stop)}, task_weight=1 - alpha)


def weights(distillation: WeightedSum, num_epochs: int = 6) -> list[float]:
    found = []
    for epoch in range(num_epochs):
        distillation.begin_epoch(epoch, learning_rate=STEPS[epoch], validation_loss=LOSSES[epoch])
        found.append(distillation.weight("kd"))
    return found


def saved(module: nn.Module) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: case.name)
def test_is_what_the_golden_file_says(case: Case):
    assert check(case).misses == []


# The factor


def test_without_warm_up_and_stop_the_factor_is_one():
    assert [Schedule().factor(epoch) for epoch in (0, 1, 1000)] == [1.0, 1.0, 1.0]


def test_the_first_epoch_of_a_warm_up_counts_as_one_or_as_none():
    assert [Schedule(warmup_epochs=20).factor(epoch) for epoch in (0, 9, 19, 20, 50)] == [0.05, 0.5, 1.0, 1.0, 1.0]
    authors = Schedule(warmup_epochs=20, epoch_base=0)
    assert [authors.factor(epoch) for epoch in (0, 5, 20, 21)] == [0.0, 0.25, 1.0, 1.0]


@given(st.integers(0, 30), st.sampled_from([0, 1]), st.integers(1, 40))
def test_the_factor_rises_to_one_and_ends_at_zero(warmup_epochs, epoch_base, end):
    schedule = Schedule(
        warmup_epochs=warmup_epochs, epoch_base=epoch_base if warmup_epochs else 1, stop=AtEpoch(epoch=end)
    )
    factors = [schedule.factor(epoch) for epoch in range(50)]
    assert factors[:end] == sorted(factors[:end])
    assert all(0 <= factor <= 1 for factor in factors)
    assert not any(factors[end:])


# Stop rules


@pytest.mark.parametrize(
    ("stop", "end"),
    [
        (AtEpoch(epoch=3), 3),
        (LastDrop(milestones=[2, 4]), 4),
        (LastDrop(num_drops=1), 2),
        (LastDrop(num_drops=2), 4),
        (LastDrop(num_drops=3), 6),
        (Plateau(patience=1), 3),
        (Plateau(patience=2), 4),
        (Plateau(patience=3), 6),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
def test_distillation_counts_until_the_stop_and_the_task_for_all_after_it(stop, end):
    distillation = eskd(stop)
    task_weights, seen = [], []
    for epoch in range(6):
        distillation.begin_epoch(epoch, learning_rate=STEPS[epoch], validation_loss=LOSSES[epoch])
        task_weights.append(distillation.task_weight)
        seen.append(distillation.weight("kd"))
    assert seen == [0.9] * end + [0.0] * (6 - end)
    assert task_weights == pytest.approx([0.1] * end + [1.0] * (6 - end), abs=1e-15)
    assert all(weight == 1.0 for weight in task_weights[end:])


def test_a_stop_stays_when_the_loss_falls_again():
    distillation = eskd(Plateau(patience=1))
    assert weights(distillation) == [0.9, 0.9, 0.9, 0.0, 0.0, 0.0]


def test_every_task_starts_again():
    for stop in (LastDrop(num_drops=1), Plateau(patience=1), AtEpoch(epoch=2)):
        distillation = eskd(stop)
        first = weights(distillation)
        assert 0.0 in first
        assert weights(distillation) == first


def test_an_epoch_that_is_begun_twice_is_observed_once():
    distillation = eskd(Plateau(patience=2))
    for epoch, loss in [(0, None), (1, 3.0), (2, 4.0), (2, 4.0), (2, 4.0)]:
        distillation.begin_epoch(epoch, validation_loss=loss)
    assert distillation.weight("kd") == 0.9


def test_a_loss_that_is_no_number_is_no_improvement():
    distillation = eskd(Plateau(patience=1))
    distillation.begin_epoch(0)
    distillation.begin_epoch(1, validation_loss=math.nan)
    assert distillation.weight("kd") == 0


@pytest.mark.parametrize("stop", [lambda: LastDrop(num_drops=2), lambda: Plateau(patience=2), lambda: AtEpoch(epoch=4)])
@pytest.mark.parametrize("epochs_before", [1, 3, 5])
def test_a_resumed_run_stops_where_the_whole_one_does(stop, epochs_before):
    whole = eskd(stop())
    expected = weights(whole)
    first = eskd(stop())
    weights(first, epochs_before)
    resumed = eskd(stop())
    resumed.load_state_dict(saved(first))
    assert resumed.weight("kd") == first.weight("kd")
    for epoch in range(epochs_before, 6):
        resumed.begin_epoch(epoch, learning_rate=STEPS[epoch], validation_loss=LOSSES[epoch])
        assert resumed.weight("kd") == expected[epoch]
    assert saved(resumed)["schedules.kd._extra_state"] == saved(whole)["schedules.kd._extra_state"]


def test_a_state_of_another_rule_is_refused():
    distillation = eskd(Plateau(patience=2))
    with pytest.raises(ValueError, match="saved under another rule"):
        distillation.load_state_dict(saved(eskd(LastDrop(num_drops=1))))
    with pytest.raises(ValueError, match="saved under another rule"):
        eskd(None).load_state_dict(saved(distillation))


def test_a_rule_says_what_it_was_not_told():
    with pytest.raises(ValueError, match="pass begin_epoch the learning_rate"):
        eskd(LastDrop(num_drops=1)).begin_epoch(0)
    distillation = eskd(Plateau(patience=1))
    distillation.begin_epoch(0)
    with pytest.raises(ValueError, match="pass begin_epoch the validation_loss"):
        distillation.begin_epoch(1)


# The weighted sum


def test_a_term_that_does_not_count_is_not_computed():
    for distillation in (eskd(AtEpoch(epoch=1)), WeightedSum({"kd": (0.0, Constant())})):
        distillation.begin_epoch(1)
        assert not distillation.counts
        assert distillation.terms(STUDENT, TEACHER, BATCH) == {}
        assert distillation(STUDENT, TEACHER, BATCH).shape == ()
        assert distillation(STUDENT, TEACHER, BATCH) == 0
        assert distillation.distillers["kd"].told == []


def test_every_term_has_its_own_schedule():
    terms = {"warm": (2.0, Constant()), "short": (3.0, Constant()), "plain": (4.0, Constant())}
    schedules = {"warm": Schedule(warmup_epochs=4), "short": Schedule(stop=AtEpoch(epoch=2))}
    distillation = WeightedSum(terms, schedules=schedules)
    expected = [
        {"warm": 0.5, "short": 3.0, "plain": 4.0},
        {"warm": 1.0, "short": 3.0, "plain": 4.0},
        {"warm": 1.5, "plain": 4.0},
    ]
    for epoch, values in enumerate(expected):
        distillation.begin_epoch(epoch)
        assert {name: term.item() for name, term in distillation.terms(STUDENT, TEACHER, BATCH).items()} == values
        assert distillation(STUDENT, TEACHER, BATCH).item() == sum(values.values())
        assert distillation.counts


def test_the_task_counts_in_full_once_every_scheduled_term_has_stopped():
    terms = {"first": (0.5, Constant()), "second": (0.2, Constant())}
    schedules = {"first": Schedule(stop=AtEpoch(epoch=1)), "second": Schedule(stop=AtEpoch(epoch=2))}
    distillation = WeightedSum(terms, schedules=schedules, task_weight=0.3)
    found = []
    for epoch in range(3):
        distillation.begin_epoch(epoch)
        found.append(distillation.task_weight)
    assert found == [0.3, 0.3, 1.0]


def test_without_schedules_the_weights_stand_and_no_epoch_is_needed():
    distillation = WeightedSum({"kd": (2.0, KD(temperature=1.0))}, task_weight=0.25)
    expected = 2 * KD(temperature=1.0)(STUDENT, TEACHER, BATCH)
    torch.testing.assert_close(distillation(STUDENT, TEACHER, BATCH), expected)
    assert distillation.task_weight == 0.25
    assert distillation.weights == {"kd": 2.0}


def test_a_schedule_without_an_epoch_is_an_error():
    with pytest.raises(ValueError, match=r"kd\.kd has a schedule: call begin_epoch"):
        eskd(AtEpoch(epoch=3))(STUDENT, TEACHER, BATCH)


def test_schedules_alone_leave_a_trace_in_the_state_dict():
    distillation = WeightedSum({"kd": (1.0, Constant())})
    assert list(distillation.state_dict()) == ["distillers.kd.scale"]
    distillation.load_state_dict({"distillers.kd.scale": torch.tensor(2.0)})
    assert distillation(STUDENT, TEACHER, BATCH) == 2
    assert "schedules.kd._extra_state" in eskd(AtEpoch(epoch=3)).state_dict()


def test_what_is_told_to_the_sum_is_told_to_every_term():
    first, second = Constant({"logits", "taps"}), Constant({"embedding"})
    distillation = WeightedSum({"first": (1.0, first), "second": (1.0, second)})
    assert distillation.needs == {"logits", "taps", "embedding"}
    distillation.connect(STUDENT, TEACHER)
    distillation.remember(torch.arange(5), torch.zeros(5, dtype=torch.int64))
    assert first.told == second.told == ["connect", "remember 5"]
    assert [id(parameter) for parameter in distillation.auxiliary_parameters()] == [id(first.scale), id(second.scale)]


def test_a_schedule_of_no_term_is_refused():
    with pytest.raises(ValueError, match=r"unknown distillation term 'dk'; did you mean 'kd'"):
        WeightedSum({"kd": (1.0, KD())}, schedules={"dk": Schedule()})


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match=r"kd\.kd\.weight must not be negative"):
        WeightedSum({"kd": (-1.0, KD())})
    with pytest.raises(ValueError, match="task weight must not be negative"):
        WeightedSum({"kd": (1.0, KD())}, task_weight=math.nan)


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no term"):
        WeightedSum({})(STUDENT, TEACHER, BATCH)


# Parameters


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(warmup_epochs=-1), "warmup_epochs must not be negative"),
        (lambda: Schedule(epoch_base=0), "no effect without warmup_epochs"),
        (lambda: AtEpoch(epoch=0), "at least 1"),
        (lambda: LastDrop(), "not both: found milestones=None and num_drops=None"),
        (lambda: LastDrop(milestones=[2], num_drops=1), "not both"),
        (lambda: LastDrop(milestones=[]), "at least one"),
        (lambda: LastDrop(milestones=[0, 4]), "from 1 on"),
        (lambda: LastDrop(num_drops=0), "at least 1"),
        (lambda: Plateau(patience=0), "at least 1"),
    ],
)
def test_parameters_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_unknown_epoch_base_is_refused():
    with pytest.raises((ValueError, TypeError), match="epoch_base"):
        Schedule(warmup_epochs=3, epoch_base=2)  # type: ignore[arg-type]


def test_rules_are_found_by_name():
    assert dict(stop_rules) == {"epoch": AtEpoch, "last_drop": LastDrop, "plateau": Plateau}


# Teachers


def test_an_early_stopped_teacher_has_a_shorter_schedule_that_is_complete():
    assert shortened(200, [60, 120, 160], 0.25) == (50, [15, 30, 40])
    assert shortened(240, [150, 180, 210], 1.0) == (240, [150, 180, 210])
    assert shortened(90, [], 0.5) == (45, [])


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, math.nan])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        shortened(200, [60], fraction)


def test_a_schedule_too_short_to_be_one_is_refused():
    with pytest.raises(ValueError, match=r"no epoch before the first drop: found 2 epochs with milestones \[0\]"):
        shortened(200, [40], 0.01)
