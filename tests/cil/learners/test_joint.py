import pytest
import torch
import torch.nn.functional as F

from cil.learners.joint import Joint
from cil.models.network import models
from cil.optim import Recipe
from cil.seeding import seeded
from cil.stages import Stage
from kd import Batch
from tests.conftest import RunTiny
from tests.run_folders import facts_of, weights_of


def learner_of(start: str = "fresh") -> Joint:
    torch.manual_seed(0)
    return Joint(models["resnet_cifar"]((1, 8, 8), depth=20, width=4), start=start)  # type: ignore[arg-type]


def begin(learner: Joint, index: int, labels: range) -> None:
    with seeded(0, "begin", index):
        learner.begin_stage(Stage(index, labels, Recipe(), has_memory=False))


def disturb(learner: Joint) -> None:
    with torch.no_grad():
        for value in learner.network.state_dict().values():
            value.add_(1)


def test_it_trains_on_everything_seen() -> None:
    (phase,) = learner_of().phases(Stage(1, range(3, 5), Recipe(), has_memory=True))
    assert (phase.name, phase.source, list(phase.frozen)) == ("training", "seen", [])


def test_a_fresh_start_forgets_what_was_learned_and_knows_all_classes() -> None:
    learner, other = learner_of(), learner_of()
    begin(learner, 0, range(3))
    disturb(learner)
    begin(learner, 1, range(3, 5))
    begin(other, 1, range(3, 5))
    assert learner.network.num_classes == other.network.num_classes == 5
    found, expected = learner.network.state_dict(), other.network.state_dict()
    assert all(found[name].equal(value) for name, value in expected.items())


def test_going_on_keeps_what_was_learned() -> None:
    learner = learner_of("continue")
    begin(learner, 0, range(3))
    disturb(learner)
    before = {name: value.clone() for name, value in learner.network.state_dict().items()}
    begin(learner, 1, range(3, 5))
    after = learner.network.state_dict()
    assert all(after[name].equal(value) for name, value in before.items() if not name.startswith("head"))
    assert after["head.weight"][:3].equal(before["head.weight"])


def test_the_untrained_network_is_no_part_of_the_state() -> None:
    learner = learner_of()
    assert learner.state_dict().keys() == {f"network.{name}" for name in learner.network.state_dict()}


def test_the_loss_is_over_every_class() -> None:
    learner = learner_of().eval()
    begin(learner, 1, range(3, 5))
    learner.eval()
    batch = Batch(torch.rand(4, 1, 8, 8), torch.tensor([0, 4, 2, 3]), torch.arange(4))
    losses = learner(batch)
    assert list(losses) == ["ce"]
    assert losses["ce"].equal(F.cross_entropy(learner.network(batch.images).logits, batch.labels))


@pytest.mark.parametrize("start", ["fresh", "continue"])
def test_a_fresh_learner_is_rebuilt(start: str) -> None:
    learner = learner_of(start)
    begin(learner, 0, range(3))
    begin(learner, 1, range(3, 5))
    other = learner_of(start)
    other.rebuild(learner.structure())
    other.load_state_dict(learner.state_dict())
    assert other.structure() == learner.structure()


def test_every_task_shows_everything_seen(run_tiny: RunTiny) -> None:
    run = run_tiny("optim.epochs=1", learner="joint")
    new = [event["num_new_samples"] for event in facts_of(run) if event["event"] == "stage_started"]
    shown = [event["num_samples"] for event in facts_of(run) if event["event"] == "phase_started"]
    assert shown == [sum(new[: task + 1]) for task in range(3)]
    assert {value.dtype for value in weights_of(run).values()} == {torch.float32, torch.int64}


def test_in_double_precision_the_fresh_network_is_double_too(run_tiny: RunTiny) -> None:
    run = run_tiny("optim.epochs=1", "precision=fp64", learner="joint")
    assert {value.dtype for value in weights_of(run).values()} == {torch.float64, torch.int64}
