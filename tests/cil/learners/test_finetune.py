import pytest
import torch
import torch.nn.functional as F

from cil.learners.finetune import Finetune
from cil.models.network import models
from cil.optim import Recipe
from cil.stages import Stage
from kd import Batch
from tests.conftest import RunTiny
from tests.run_folders import facts_of, weights_of


def learner_of(**settings: str) -> Finetune:
    torch.manual_seed(0)
    network = models["resnet_cifar"]((1, 8, 8), depth=20, width=4)
    for size in (3, 2):
        network.grow(size)
    return Finetune(network, **settings).eval()  # type: ignore[arg-type]


NEW = Batch(torch.rand(4, 1, 8, 8), torch.tensor([3, 4, 4, 3]), torch.arange(4))


def test_it_trains_on_the_new_data_alone_whatever_is_remembered() -> None:
    for has_memory in (False, True):
        (phase,) = learner_of().phases(Stage(1, range(3, 5), Recipe(epochs=5, initial_epochs=9), has_memory))
        assert (phase.name, phase.source, phase.recipe.epochs, list(phase.frozen)) == ("training", "new", 5, [])


def test_the_softmax_is_over_the_new_classes_and_old_rows_of_the_head_rest() -> None:
    learner = learner_of()
    loss = learner(NEW)["ce"]
    logits = learner.network(NEW.images).logits
    assert loss.equal(F.cross_entropy(logits[:, 3:], NEW.labels - 3))
    loss.backward()
    gradient = learner.network.head.weight.grad
    assert not gradient[:3].any()
    assert gradient[3:].any()


def test_over_all_classes_the_old_ones_are_pushed_down() -> None:
    learner = learner_of(logits="all")
    loss = learner(NEW)["ce"]
    assert loss.equal(F.cross_entropy(learner.network(NEW.images).logits, NEW.labels))
    loss.backward()
    assert learner.network.head.bias.grad[:3].gt(0).all()


def test_old_rows_of_the_head_rest_in_a_whole_run(run_tiny: RunTiny) -> None:
    run = run_tiny("model=resnet32", "model.depth=20", "model.width=4", "optim.epochs=1", learner="finetune")
    weights = weights_of(run)
    before, after = weights["stage_000/head.bias"], weights["stage_001/head.bias"]
    assert after[:2].equal(before)  # biases do not decay
    sources = [event["num_samples"] for event in facts_of(run) if event["event"] == "phase_started"]
    assert sources == [event["num_new_samples"] for event in facts_of(run) if event["event"] == "stage_started"]


def test_it_keeps_no_teacher_and_needs_no_memory() -> None:
    learner = learner_of()
    learner.begin_stage(Stage(1, range(5, 7), Recipe(), has_memory=False))
    assert learner.teacher is None
    assert (Finetune.keeps_teacher, Finetune.needs_memory) == (False, False)
    assert learner.structure() == {"network": {"task_sizes": [3, 2, 2]}, "teacher": None, "connection": None}


@pytest.mark.parametrize("logits", ["new", "all"])
def test_in_the_first_task_both_settings_are_one(logits: str) -> None:
    torch.manual_seed(0)
    network = models["resnet_cifar"]((1, 8, 8), depth=20, width=4)
    network.grow(5)
    learner = Finetune(network, logits=logits).eval()  # type: ignore[arg-type]
    assert learner(NEW)["ce"].equal(F.cross_entropy(network(NEW.images).logits, NEW.labels))
