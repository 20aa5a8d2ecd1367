import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cil.build import make_tasks, open_data
from cil.checking import check
from cil.cli import compose
from cil.config import Config
from cil.data import DataSet, ImageSet
from cil.results import History, metrics, plain_values, protocol


def config_of(*overrides: str) -> Config:
    return check(compose(["experiment=tiny", *overrides]))


def protocol_of(*overrides: str) -> str:
    config = config_of(*overrides)
    data = open_data(config)
    return protocol(config, data, make_tasks(config, data))


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=1"],
        ["name=other"],
        ["learner=dkt_official", "memory.selection=herding"],
        ["learner=replay"],
        ["model.width=16"],
        ["optim.epochs=9"],
        ["precision=bf16"],
        ["evaluation.batch_size=3"],
        ["data.augment.crop=null"],
        ["scenario.initial_increment=null", "scenario.increment=null", "scenario.task_sizes=[4,3,3]"],
        ["scenario.class_order=[0,1,2,3,4,5,6,7,8,9]"],
    ],
)
def test_runs_that_can_be_compared_have_one_protocol(overrides: list[str]) -> None:
    assert protocol_of(*overrides) == protocol_of()


def test_everything_that_makes_a_comparison_unfair_changes_the_protocol() -> None:
    others = [
        protocol_of(),
        protocol_of("scenario.increment=2"),
        protocol_of("scenario.initial_increment=3"),
        protocol_of("scenario.classes=7"),
        protocol_of("scenario.class_order=seeded"),
        protocol_of("scenario.class_order=seeded", "scenario.order_seed=1"),
        protocol_of("memory.size=50"),
        protocol_of("memory.budget=fixed_total"),
        protocol_of("data.validation=0.1"),
        protocol_of("data.validation=0.2"),
        protocol_of("data.validation=0.1", "evaluate_on=validation"),
    ]
    assert len(set(others)) == len(others)


def test_the_images_held_out_belong_to_the_protocol() -> None:
    held_out = ["data.validation=0.1", "evaluate_on=validation"]
    assert protocol_of(*held_out) != protocol_of(*held_out, "seed=1")


def test_other_pixels_are_another_protocol() -> None:
    config = config_of()
    data = open_data(config)
    images = data.test.images.clone()
    images[0, 0, 0, 0] ^= 1
    other = DataSet("digits", data.train, ImageSet(images, data.test.labels), data.class_names, data.mean, data.std)
    tasks = make_tasks(config, data)
    assert protocol(config, other, tasks) != protocol(config, data, tasks)


def test_a_run_that_goes_on_reports_what_it_has() -> None:
    config = config_of()
    data = open_data(config)
    tasks = make_tasks(config, data)
    history = History(correct=[[8], [6, 10]], before_finetuning=[None, 0.5], top5=[1.0, 1.0], exemplars=[100, 98])
    history.num_parameters = [11, 22]
    report = metrics(config, data, tasks, history, np.array([10, 20, 30]), wall_seconds=1.5)
    assert not report["finished"]
    assert report["accuracy_matrix"] == [[0.8, None, None], [0.6, 0.5, None]]
    assert report["accuracy_after"] == pytest.approx([0.8, 16 / 30])
    assert report["last_accuracy"] == pytest.approx(16 / 30)
    assert report["forgetting"] == pytest.approx(0.2)
    assert report["forgetting_after"] == [None, pytest.approx(0.2)]
    assert (report["num_parameters"], report["images_per_second"], report["wall_seconds"]) == (22, None, 1.5)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_run_of_one_task_has_forgotten_nothing_that_could_be_measured() -> None:
    config = config_of("scenario.initial_increment=10")
    data = open_data(config)
    history = History(correct=[[300]], before_finetuning=[None], top5=[1.0], exemplars=[100], num_parameters=[7])
    report = metrics(config, data, make_tasks(config, data), history, np.array([364]), wall_seconds=1.0)
    assert report["finished"]
    assert (report["forgetting"], report["backward_transfer"]) == (None, None)


def test_a_history_survives_json() -> None:
    history = History([[3], [2, 4]], [None, 0.25], [1.0, 0.5], [10, 9], [5, 6], 100, 1.25, 3)
    assert History(**json.loads(json.dumps(history.to_json()))) == history


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
)


@given(json_like)
def test_plain_values_are_json(value: object) -> None:
    plain = plain_values(value)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain_values(plain) == plain


def test_numbers_of_numpy_become_plain_and_what_is_not_defined_null() -> None:
    found = plain_values({"a": np.float64(0.5), "b": np.array([[1, np.nan]]), "c": (math.inf,), 3: np.int64(4)})
    assert found == {"a": 0.5, "b": [[1.0, None]], "c": [None], "3": 4}
    assert type(found["3"]) is int


def test_the_matrix_of_a_history_weighs_tasks_by_their_images() -> None:
    matrix = History(correct=[[1], [1, 30]]).matrix(np.array([2, 40]))
    assert matrix.accuracy_after().tolist() == pytest.approx([0.5, 31 / 42])
    assert torch.from_numpy(matrix.values).isnan().tolist() == [[False, True], [False, False]]
