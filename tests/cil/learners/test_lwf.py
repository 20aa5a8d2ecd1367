import pytest
import torch
import torch.nn.functional as F

from cil.checking import check
from cil.cli import compose
from cil.learners.lwf import LwF
from cil.models.network import models
from cil.optim import Recipe
from cil.stages import Stage
from kd import Batch, WeightedSum
from kd.logit.kd import KD
from kd.schedule import Schedule
from tests.conftest import RunTiny
from tests.run_folders import facts_of, metrics_of

NEW = Batch(torch.rand(4, 1, 8, 8), torch.tensor([3, 4, 4, 3]), torch.arange(4))


def distillation() -> WeightedSum:
    return WeightedSum({"kd2": (0.25, KD(temperature=2.0))})


def learner_of(**settings: object) -> LwF:
    """In evaluation mode, at the start of its second task."""
    torch.manual_seed(0)
    learner = LwF(models["resnet_cifar"]((1, 8, 8), depth=20, width=4), distillation(), **settings)  # type: ignore[arg-type]
    learner.begin_stage(Stage(0, range(3), Recipe(), has_memory=False))
    learner.begin_stage(Stage(1, range(3, 5), Recipe(), has_memory=False))
    return learner.eval()


def disturb(learner: LwF) -> None:
    with torch.no_grad():
        for parameter in learner.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def test_it_trains_on_the_new_data_alone_whatever_is_remembered() -> None:
    for has_memory in (False, True):
        (phase,) = learner_of().phases(Stage(1, range(3, 5), Recipe(epochs=5, initial_epochs=9), has_memory))
        assert (phase.name, phase.source, phase.recipe.epochs, list(phase.frozen)) == ("training", "new", 5, [])


def test_a_student_equal_to_its_teacher_has_nothing_to_distil() -> None:
    losses = learner_of()(NEW)
    assert list(losses) == ["ce", "kd2"]
    assert float(losses["kd2"].detach()) == pytest.approx(0, abs=1e-6)


def test_the_term_has_the_gradient_of_the_published_one() -> None:
    learner = learner_of()
    disturb(learner)
    student, teacher = learner.network(NEW.images).logits[:, :3], learner.teacher(NEW.images).logits  # type: ignore[misc]
    published = 3 * -(F.softmax(teacher / 2, dim=1) * F.log_softmax(student / 2, dim=1)).sum(dim=1).mean()
    expected = torch.autograd.grad(published, learner.network.head.weight)[0]
    found = torch.autograd.grad(learner(NEW)["kd2"], learner.network.head.weight)[0]
    torch.testing.assert_close(found, expected)


def test_the_weight_is_that_of_the_learner_times_that_of_the_term() -> None:
    light, heavy = learner_of(weight=1.0), learner_of(weight=3.0)
    for learner in (light, heavy):
        torch.manual_seed(1)
        disturb(learner)
    torch.testing.assert_close(heavy(NEW)["kd2"], 3 * light(NEW)["kd2"])
    assert heavy(NEW)["ce"].equal(light(NEW)["ce"])


def test_the_cross_entropy_is_over_the_new_classes_or_over_all() -> None:
    learner = learner_of()
    logits = learner.network(NEW.images).logits
    assert learner(NEW)["ce"].equal(F.cross_entropy(logits[:, 3:], NEW.labels - 3))
    assert learner_of(logits="all")(NEW)["ce"].equal(F.cross_entropy(logits, NEW.labels))


def test_the_first_task_is_plain_cross_entropy() -> None:
    torch.manual_seed(0)
    learner = LwF(models["resnet_cifar"]((1, 8, 8), depth=20, width=4), distillation()).eval()
    learner.begin_stage(Stage(0, range(5), Recipe(), has_memory=False))
    learner.eval()
    losses = learner(NEW)
    assert list(losses) == ["ce"]
    assert losses["ce"].equal(F.cross_entropy(learner.network(NEW.images).logits, NEW.labels))


def test_the_teacher_is_not_asked_when_no_term_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of()
    terms = {"kd2": (0.25, KD(temperature=2.0))}
    learner.distillation = WeightedSum(terms, schedules={"kd2": Schedule(warmup_epochs=2, epoch_base=0)})
    learner.distillation.begin_epoch(0)
    monkeypatch.setattr(learner.teacher, "forward", lambda images: pytest.fail("asked"))
    assert list(learner(NEW)) == ["ce"]


def test_without_distillation_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"learner=lwf remembers by distillation alone, found kd=none.*finetune"):
        LwF(models["resnet_cifar"]((1, 8, 8), depth=20, width=4), None)


def test_the_published_recipe_composes() -> None:
    published = ["model=resnet32", "optim=sgd", "optim.epochs=250", "optim.schedule.milestones=[60,120,180,220]"]
    config = check(compose(["learner=lwf", *published]))
    assert (config.optim.initial_epochs, config.learner.parameters["weight"]) == (200, 3.0)
    term = config.kd["kd2"]
    assert (term["weight"] * term["temperature"] ** 2, term["temperature"]) == (1.0, 2.0)


def test_another_term_takes_the_place_of_its_own() -> None:
    assert list(check(compose(["learner=lwf", "kd=dkd"])).kd) == ["dkd"]


def test_it_forgets_less_than_training_on_each_task_alone(whole_run: RunTiny) -> None:
    settings = ("model=resnet32", "model.depth=20", "model.width=8", "scenario.classes=4", "optim.epochs=10")
    run = whole_run(*settings, learner="lwf")
    found, alone = metrics_of(run), metrics_of(whole_run(*settings, learner="finetune"))
    assert found["last_accuracy"] > alone["last_accuracy"] + 0.05
    assert found["exemplars"] == [0, 0]
    losses = [list(event["losses"]) for event in facts_of(run) if event["event"] == "epoch"]
    assert losses == [["ce"]] * 10 + [["ce", "kd2"]] * 10
