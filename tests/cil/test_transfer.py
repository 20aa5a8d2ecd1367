"""Between the network of the last task and the grown one: adapters, banks and maps over several tasks."""

import copy
from typing import Any

import pytest
import torch

from cil.learners.replay import Replay
from cil.models.network import models
from cil.optim import Recipe
from cil.stages import Stage
from cil.transfer import said
from kd import Batch, WeightedSum, distillers
from tests.run_folders import assert_same_weights

NUM_NEW = 2


def learner_of(*methods: str, model: str = "resnet_cifar") -> Replay:
    torch.manual_seed(0)
    settings = {"crd": {"num_negatives": 8}}
    terms = {name: (1.0, distillers[name](**settings.get(name, {}))) for name in methods}
    network = models[model]((1, 8, 8), **({"depth": 8, "width": 4} if model == "resnet_cifar" else {}))
    return Replay(network, WeightedSum(terms))


def same(found: Any, expected: Any) -> bool:
    """Bit by bit, through the plain dictionaries of a state."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)
    return bool(found.equal(expected)) if isinstance(expected, torch.Tensor) else found == expected


def begin(learner: Replay, index: int) -> Batch:
    """Begin a stage; returns a batch of its samples, whose ids are 10 times the stage on."""
    learner.begin_stage(Stage(index, range(NUM_NEW * index, NUM_NEW * (index + 1)), Recipe(), has_memory=True))
    ids = torch.arange(10 * index, 10 * index + 8)
    labels = torch.arange(8) % (NUM_NEW * (index + 1))
    learner.remember(ids, labels)
    return Batch(torch.rand(8, 1, 8, 8), labels, ids)


def end(learner: Replay, index: int) -> None:
    learner.end_stage(Stage(index, range(NUM_NEW * index, NUM_NEW * (index + 1)), Recipe(), has_memory=True))


def test_without_distillation_no_old_network_is_kept():
    learner = Replay(models["resnet_cifar"]((1, 8, 8), depth=8, width=4), None)
    for index in range(2):
        begin(learner, index)
    assert learner.teacher is None


def test_adapters_go_on_learning_from_task_to_task_and_the_bank_grows():
    learner = learner_of("crd", "fitnet")
    begin(learner, 0)
    assert learner.teacher is None
    end(learner, 0)
    begin(learner, 1)
    adapters = dict(learner.distillation.named_parameters())
    assert adapters
    crd = learner.distillation.distillers["crd"]
    assert len(crd.memory) == 8  # nothing is compared in the first stage, so nothing of it is kept
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.add_(1)
    before = {name: parameter.detach().clone() for name, parameter in adapters.items()}
    row = crd.memory.recall(torch.tensor([10]))["student"]
    end(learner, 1)
    begin(learner, 2)
    assert_same_weights(dict(learner.distillation.named_parameters()), before)
    crd = learner.distillation.distillers["crd"]
    assert len(crd.memory) == 16
    assert crd.memory.recall(torch.tensor([10]))["student"].equal(row)


def test_only_the_maps_that_are_read_are_said_and_only_while_there_is_a_teacher():
    learner = learner_of("fitnet")
    batch = begin(learner, 0)
    assert not said(learner.network, batch).taps
    end(learner, 0)
    batch = begin(learner, 1)
    wanted = {"stage1.post", "stem"}  # the type check of the tests reads the first of all taps too
    assert set(said(learner.network, batch).taps) == wanted
    assert set(said(learner.teacher, batch).taps) == wanted
    end(learner, 1)
    assert not said(learner.network, batch).taps


def test_class_maps_and_scores_are_compared_for_the_old_classes():
    learner = learner_of("cat_kd", "kd")
    begin(learner, 0)
    end(learner, 0)
    learner.eval()
    batch = begin(learner, 1)
    learner.eval()
    losses = learner(batch)
    assert losses.keys() == {"ce", "cat_kd", "kd"}
    assert losses["cat_kd"] < 1e-12  # nothing has been trained since the copy was taken
    assert losses["kd"].abs() < 1e-6


def test_a_learner_is_rebuilt_with_its_adapters_between_and_inside_stages():
    learner = learner_of("crd", "reviewkd")
    begin(learner, 0)
    for index in (1, 2):
        end(learner, index - 1)
        batch = begin(learner, index)
        fresh = learner_of("crd", "reviewkd")
        fresh.rebuild(learner.structure())
        fresh.remember(batch.ids, batch.labels)
        fresh.load_state_dict(learner.state_dict())
        assert same(fresh.state_dict(), learner.state_dict())
        assert fresh.structure() == learner.structure()
        learner.eval()
        fresh.eval()
        found, right = (both(batch) for both in (fresh, learner))
        assert found == right
    end(learner, 2)
    fresh = learner_of("crd", "reviewkd")
    fresh.rebuild(learner.structure())
    fresh.load_state_dict(learner.state_dict())
    assert fresh.teacher is None


def test_a_rehearsal_leaves_no_trace_and_no_randomness():
    learner = learner_of("crd", "at")
    before = copy.deepcopy(learner.state_dict())
    state = torch.random.get_rng_state()
    learner.rehearse(Recipe())
    assert torch.random.get_rng_state().equal(state)
    assert same(learner.state_dict(), before)
    assert learner.network.num_classes == 0


def test_a_map_that_is_not_there_is_refused_before_the_first_task():
    from cil.build import Run
    from cil.checking import check
    from cil.cli import compose

    config = check(
        compose(["experiment=tiny", "learner=replay", "model=resnet8", "kd=fitnet", "kd.fitnet.hint=stage7.post"])
    )
    with pytest.raises(
        ValueError, match=r"kd=fitnet does not go with learner=replay model=resnet_cifar: .*'stage7.post'"
    ):
        Run.build(config)
