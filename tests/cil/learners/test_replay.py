import torch
import torch.nn.functional as F

from cil.learners.base import learners
from cil.learners.replay import Replay
from cil.models.network import models
from cil.optim import Recipe
from cil.stages import Stage
from kd import Batch
from tests.conftest import RunTiny
from tests.run_folders import facts_of


def learner_of() -> Replay:
    torch.manual_seed(0)
    network = models["resnet_cifar"]((1, 8, 8), depth=20, width=4)
    network.grow(5)
    return Replay(network).eval()


def test_it_trains_on_new_data_and_exemplars_together() -> None:
    (phase,) = learner_of().phases(Stage(1, range(3, 5), Recipe(), has_memory=True))
    assert (phase.name, phase.source, list(phase.frozen)) == ("training", "new+memory", [])


def test_the_loss_is_over_every_class() -> None:
    learner = learner_of()
    batch = Batch(torch.rand(4, 1, 8, 8), torch.tensor([0, 4, 2, 3]), torch.arange(4))
    losses = learner(batch)
    assert list(losses) == ["ce"]
    assert losses["ce"].equal(F.cross_entropy(learner.network(batch.images).logits, batch.labels))


def test_it_is_at_a_loss_without_memory_and_can_keep_a_teacher() -> None:
    assert (Replay.needs_memory, Replay.keeps_teacher) == (True, True)
    assert learners["replay"] is Replay


def test_a_task_shows_its_images_and_the_exemplars_of_old_classes(run_tiny: RunTiny) -> None:
    run = run_tiny("optim.epochs=1", "memory.size=24", learner="replay")
    new = [event["num_new_samples"] for event in facts_of(run) if event["event"] == "stage_started"]
    shown = [event["num_samples"] for event in facts_of(run) if event["event"] == "phase_started"]
    assert shown == [new[0], new[1] + 24, new[2] + 24]
