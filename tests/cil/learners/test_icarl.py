from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cil import checkpoint
from cil.checking import check
from cil.cli import compose
from cil.config import ConfigError
from cil.learners.dkt_losses import binary_cross_entropy
from cil.learners.icarl import ICaRL
from cil.models.network import models
from cil.optim import Recipe
from cil.stages import Stage
from kd import Batch, Outputs, WeightedSum
from kd.logit.kd import KD
from tests.conftest import SMALL_RESNET, RunTiny, run_tiny_in
from tests.run_folders import facts_of, metrics_of
from tests.test_distributed import EXACT, assert_equal_runs, ended, launch
from tests.test_resume import INTERRUPTED, assert_as_if_nothing_happened, interrupt

RESNET = ("model=resnet32", "model.depth=20", "model.width=4")
BATCH = Batch(torch.rand(5, 1, 8, 8), torch.tensor([0, 4, 2, 3, 4]), torch.arange(5))
NUM_OLD, NUM_CLASSES = 3, 5
FIRST = Stage(0, range(NUM_OLD), Recipe(), has_memory=True)
SECOND = Stage(1, range(NUM_OLD, NUM_CLASSES), Recipe(), has_memory=True)


def kd2() -> WeightedSum:
    return WeightedSum({"kd2": (0.25, KD(temperature=2.0))})


def learner_of(*, distils: bool = False, moved: float = 0.1, **settings: Any) -> ICaRL:
    """In evaluation mode, in its second task, with a teacher of other weights."""
    torch.manual_seed(0)
    learner = ICaRL(models["resnet_cifar"]((1, 8, 8), depth=20, width=4), kd2() if distils else None, **settings)
    learner.begin_stage(FIRST)
    learner.begin_stage(SECOND)
    with torch.no_grad():
        for parameter in learner.network.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    return learner.eval()


def scores_of(learner: ICaRL) -> tuple[Tensor, Tensor]:
    """Those of the student and of the teacher."""
    assert learner.teacher is not None
    return learner.network(BATCH.images).logits, learner.teacher(BATCH.images).logits


def entropy(target: Tensor, score: Tensor) -> Tensor:
    """H(target, sigmoid(score)) as it is written."""
    p = 1 / (1 + torch.exp(-score))
    return -target * torch.log(p) - (1 - target) * torch.log(1 - p)


def test_by_default_it_is_cross_entropy_and_the_distillation_terms_with_weight_1() -> None:
    learner = learner_of(distils=True)
    losses = learner(BATCH)
    student, teacher = scores_of(learner)
    assert list(losses) == ["ce", "kd2"]
    assert losses["ce"].equal(F.cross_entropy(student, BATCH.labels))
    published = -(F.softmax(teacher / 2, 1) * F.log_softmax(student[:, :NUM_OLD] / 2, 1)).sum(1).mean()
    weight = learner.network.head.weight
    expected, found = (torch.autograd.grad(loss, weight)[0] for loss in (published, losses["kd2"]))
    torch.testing.assert_close(found, expected)


def test_the_loss_of_the_paper_has_the_sigmoids_of_the_old_network_for_labels_of_old_classes() -> None:
    learner = learner_of(loss="bce")
    with torch.no_grad():
        losses = learner(BATCH)
        student, teacher = scores_of(learner)
    assert list(losses) == ["bce", "bce_old"]
    new, old = 0.0, 0.0
    for row, label in enumerate(BATCH.labels):
        for k in range(NUM_CLASSES):
            if k < NUM_OLD:
                old += float(entropy(torch.sigmoid(teacher[row, k]), student[row, k]))
            else:
                new += float(entropy((label == k).float(), student[row, k]))
    assert float(losses["bce"]) == pytest.approx(new / len(BATCH.labels), rel=1e-5)
    assert float(losses["bce_old"]) == pytest.approx(old / len(BATCH.labels), rel=1e-5)


def test_a_teacher_that_is_sure_of_the_labels_makes_it_plain_binary_cross_entropy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner = learner_of(loss="bce")
    one_hot = F.one_hot(BATCH.labels, NUM_CLASSES)[:, :NUM_OLD].float()
    monkeypatch.setattr(learner.teacher, "forward", lambda images: Outputs(200 * one_hot - 100))
    losses = learner(BATCH)
    expected = binary_cross_entropy(learner.network(BATCH.images).logits, BATCH.labels, "batchmean")
    torch.testing.assert_close(losses["bce"] + losses["bce_old"], expected)


@pytest.mark.parametrize("loss", ["bce", "ce_bce"])
def test_a_student_equal_to_its_teacher_has_nothing_to_distil(loss: str) -> None:
    learner = learner_of(loss=loss, moved=0.0)
    gradient = torch.autograd.grad(learner(BATCH)["bce_old"], learner.network.head.weight)[0]
    assert float(gradient.abs().max()) < 1e-6
    moved = learner_of(loss=loss)
    gradient = torch.autograd.grad(moved(BATCH)["bce_old"], moved.network.head.weight)[0]
    assert gradient.any(dim=1).tolist() == [True] * NUM_OLD + [False] * (NUM_CLASSES - NUM_OLD)


def test_a_mean_divides_by_the_classes_too() -> None:
    summed, mean = (learner_of(loss="bce", bce_reduction=how)(BATCH) for how in ("batchmean", "mean"))
    for name in ("bce", "bce_old"):
        torch.testing.assert_close(mean[name], summed[name] / NUM_CLASSES)


def test_cross_entropy_beside_the_sigmoids_of_old_classes() -> None:
    learner = learner_of(loss="ce_bce")
    losses = learner(BATCH)
    student, teacher = scores_of(learner)
    assert list(losses) == ["ce", "bce_old"]
    assert losses["ce"].equal(F.cross_entropy(student, BATCH.labels))
    by_class = [F.binary_cross_entropy(student[:, k].sigmoid(), teacher[:, k].sigmoid()) for k in range(NUM_OLD)]
    torch.testing.assert_close(losses["bce_old"], torch.stack(by_class).sum())


def test_a_distillation_takes_the_place_of_that_of_the_paper_which_is_said_once() -> None:
    learner, own = learner_of(distils=True, loss="bce"), learner_of(loss="bce")
    losses = learner(BATCH)
    assert list(losses) == ["bce", "kd2"]
    assert losses["bce"].equal(own(BATCH)["bce"])
    assert losses["kd2"].equal(learner_of(distils=True)(BATCH)["kd2"])
    assert learner.notice(BATCH) == "learner.loss=bce: kd=kd2 replaces its own distillation, kd=none keeps it"
    learner.begin_stage(Stage(2, range(5, 6), Recipe(), has_memory=True))
    assert learner.notice(BATCH) is None
    assert own.notice(BATCH) is None
    assert learner_of(distils=True).notice(BATCH) is None


@pytest.mark.parametrize(("loss", "name"), [("ce_kd", "ce"), ("bce", "bce"), ("ce_bce", "ce")])
def test_the_first_task_has_labels_alone(loss: str, name: str) -> None:
    torch.manual_seed(0)
    learner = ICaRL(models["resnet_cifar"]((1, 8, 8), depth=20, width=4), None, loss=loss)  # type: ignore[arg-type]
    learner.begin_stage(Stage(0, range(NUM_CLASSES), Recipe(), has_memory=True))
    losses = learner.eval()(BATCH)
    logits = learner.network(BATCH.images).logits
    plain = {
        "ce": F.cross_entropy(logits, BATCH.labels),
        "bce": binary_cross_entropy(logits, BATCH.labels, "batchmean"),
    }
    assert list(losses) == [name]
    torch.testing.assert_close(losses[name], plain[name])


def test_only_losses_that_read_the_old_network_keep_it() -> None:
    assert learner_of().teacher is None
    assert list(learner_of()(BATCH)) == ["ce"]
    for settings in ({"distils": True}, {"loss": "bce"}, {"loss": "ce_bce"}):
        learner = learner_of(**settings)  # type: ignore[arg-type]
        assert learner.teacher is not None
        assert not any(parameter.requires_grad for parameter in learner.teacher.parameters())


def test_what_a_loss_does_not_have_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"loss=ce_bce distils by a term of its own, found kd=kd2 beside it: use kd=none"
    ):
        learner_of(distils=True, loss="ce_bce")
    for loss in ("ce_kd", "ce_bce"):
        with pytest.raises(ValueError, match=rf"bce_reduction=mean is about .*=bce and has no effect with {loss}"):
            learner_of(loss=loss, bce_reduction="mean")
    with pytest.raises(ConfigError, match=r"learner=icarl replays exemplars and memory\.size is 0"):
        check(compose(["learner=icarl", "memory.size=0"]))
    with pytest.raises(ConfigError, match=r"learner\.prediction: input should be 'classifier' or 'nearest_mean'"):
        check(compose(["learner=icarl", "learner.prediction=knn"]))


def test_the_published_recipes_compose() -> None:
    pycil = ["model=resnet32", "optim=sgd", "optim.epochs=170", "optim.schedule.milestones=[80,120]"]
    config = check(compose(["learner=icarl", *pycil]))
    assert (config.optim.initial_epochs, list(config.kd)) == (200, ["kd2"])
    paper = ["learner.loss=bce", "kd=none", "optim=sgd", "optim.lr=0.02", "optim.weight_decay=2e-3", "optim.epochs=70"]
    paper += ["optim.initial_epochs=null", "optim.schedule={milestones: [49, 63], decay_rate: 0.2}"]
    config = check(compose(["learner=icarl", "model=resnet32", *paper]))
    assert (config.kd, config.optim.schedule.name, config.optim.schedule.milestones) == ({}, "multistep", [49, 63])
    assert config.optim.for_task(0).epochs == 70


@pytest.mark.parametrize("loss", ["ce_kd", "bce", "ce_bce"])
def test_it_forgets_less_than_training_on_each_task_alone(whole_run: RunTiny, loss: str) -> None:
    kd = ("kd=none",) if loss != "ce_kd" else ()
    run = whole_run(*SMALL_RESNET, *kd, f"learner.loss={loss}", learner="icarl")
    found, alone = metrics_of(run), metrics_of(whole_run(*SMALL_RESNET, learner="finetune"))
    assert found["last_accuracy"] > alone["last_accuracy"] + 0.3
    assert found["exemplars"] == [24, 24]
    terms = {
        "ce_kd": (["ce"], ["ce", "kd2"]),
        "bce": (["bce"], ["bce", "bce_old"]),
        "ce_bce": (["ce"], ["ce", "bce_old"]),
    }
    losses = [list(event["losses"]) for event in facts_of(run) if event["event"] == "epoch"]
    assert losses == [terms[loss][0]] * 10 + [terms[loss][1]] * 10


@pytest.mark.parametrize("prediction", ["nearest_mean", "classifier"])
def test_one_prediction_counts_and_the_other_is_told_with_a_transformer_too(
    whole_run: RunTiny, prediction: str
) -> None:
    run = whole_run(f"learner.prediction={prediction}", "scenario.classes=4", learner="icarl")
    found = metrics_of(run)
    other = "classifier" if prediction == "nearest_mean" else "nearest_mean"
    assert list(found["accuracy_by"]) == [prediction, other]
    assert found["last_accuracy"] == found["accuracy_by"][prediction]["last"]
    both = [
        metrics_of(whole_run(f"learner.prediction={by}", "scenario.classes=4", learner="icarl"))
        for by in (prediction, other)
    ]
    assert both[0]["accuracy_by"] == both[1]["accuracy_by"]
    assert both[0]["last_accuracy"] != both[1]["last_accuracy"]


@pytest.mark.parametrize("settings", [("learner.loss=ce_kd",), ("learner.loss=bce", "kd=none")])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, whole_run: RunTiny, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    settings = (*RESNET, "scenario.classes=4", *settings)
    whole = whole_run(*settings, learner="icarl")
    for _ in range(2 * 3):  # two epochs, and the end of the task
        with monkeypatch.context() as patch:
            interrupt(patch, checkpoint, "save_state", 1, after=True, what=KeyboardInterrupt)
            run_tiny_in(tmp_path, *settings, learner="icarl", code=INTERRUPTED, report=False)
    assert_as_if_nothing_happened(run_tiny_in(tmp_path, *settings, learner="icarl", report=False), whole)


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(tmp_path: Path) -> None:
    settings = (*EXACT, *RESNET, "scenario.classes=4", "optim.batch_size=61", "learner.loss=bce", "kd=none")
    alone = run_tiny_in(tmp_path / "one", *settings, learner="icarl", report=False)
    code, _, errors = ended(launch(2, tmp_path / "two", *settings, learner="icarl"))
    assert code == 0, errors
    assert_equal_runs(alone, tmp_path / "two" / "run")
