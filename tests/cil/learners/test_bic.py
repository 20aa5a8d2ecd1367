from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cil
from cil import checkpoint
from cil.checking import check
from cil.cli import compose
from cil.config import ConfigError
from cil.data.digits import Digits
from cil.engine import Engine
from cil.learners.bic import BIAS, BiC
from cil.models.network import models
from cil.optim import Recipe
from cil.stages import SetApart, Stage
from kd import Batch, WeightedSum
from kd.feature.fitnet import FitNet
from kd.logit.kd import KD
from tests.conftest import SMALL_RESNET, RunTiny, run_tiny_in
from tests.run_folders import facts_of, metrics_of, weights_of
from tests.test_distributed import EXACT, assert_equal_runs, ended, launch
from tests.test_resume import INTERRUPTED, assert_as_if_nothing_happened, interrupt

RESNET = ("model=resnet32", "model.depth=20", "model.width=4")
#: Room for 10 exemplars of each of 4 old classes, one of which is set apart, and steps that move two numbers.
SMALL = ("memory.size=40", "learner.bias_lr=0.1")
BATCH = Batch(torch.rand(5, 1, 8, 8), torch.tensor([0, 4, 2, 3, 4]), torch.arange(5))
NUM_OLD = 3
STAGES = [Stage(i, labels, Recipe(), has_memory=True) for i, labels in enumerate((range(3), range(3, 5), range(5, 6)))]


def learner_of(*, stage: int = 1, distillation: WeightedSum | None = None, **settings: Any) -> BiC:
    """In evaluation mode, in a task, with a teacher of other weights."""
    torch.manual_seed(0)
    learner = BiC(models["resnet_cifar"]((1, 8, 8), depth=20, width=4), distillation, **settings)
    for number in range(stage + 1):
        learner.begin_stage(STAGES[number])
    with torch.no_grad():
        for parameter in learner.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return learner.eval()


def kd2() -> WeightedSum:
    return WeightedSum({"kd2": (0.25, KD(temperature=2.0))})


def in_bias_phase(learner: BiC, stage: int = 1) -> BiC:
    """Trainable as the engine makes it."""
    _, learner.phase = learner.phases(STAGES[stage])
    assert learner.phase.name == BIAS
    learner.requires_grad_(True).train()
    if learner.teacher is not None:
        learner.teacher.requires_grad_(False)
    for item in learner.phase.frozen:
        item.requires_grad_(False)
        if learner.phase.frozen_in_eval and isinstance(item, nn.Module):
            item.eval()
    return learner


def trainable(learner: BiC) -> list[str]:
    return [name for name, parameter in learner.named_parameters() if parameter.requires_grad]


def test_the_terms_of_training_are_weighted_by_the_share_of_old_classes() -> None:
    learner = learner_of(distillation=kd2())
    losses = learner(BATCH)
    student, teacher = learner.network(BATCH.images), learner.teacher(BATCH.images)  # type: ignore[misc]
    assert list(losses) == ["ce", "kd2"]
    torch.testing.assert_close(losses["ce"], 2 / 5 * F.cross_entropy(student.logits, BATCH.labels))
    torch.testing.assert_close(losses["kd2"], 3 / 5 * 0.25 * KD(temperature=2.0)(student.first(3), teacher, BATCH))


def test_the_first_task_and_a_run_without_distillation_are_plain_cross_entropy() -> None:
    for learner in (learner_of(), learner_of(stage=0, distillation=kd2())):
        batch = Batch(BATCH.images, BATCH.labels % learner.network.num_classes, BATCH.ids)
        losses = learner(batch)
        assert list(losses) == ["ce"]
        assert losses["ce"].equal(F.cross_entropy(learner.network(batch.images).logits, batch.labels))


def test_the_two_phases_divide_new_data_and_exemplars_of_before() -> None:
    learner = learner_of(fraction=0.2)
    training, bias = learner.phases(STAGES[1])
    assert (training.name, bias.name) == ("training", BIAS)
    assert training.source == bias.source == "new+memory"  # "memory" would choose exemplars of the new classes first
    assert (training.set_apart, bias.set_apart) == (SetApart(0.2, shown=False), SetApart(0.2, shown=True))
    assert training.recipe == bias.recipe == STAGES[1].recipe
    assert [phase.name for phase in learner.phases(STAGES[1])] == ["training", BIAS]


def test_nothing_is_corrected_in_the_first_task_or_without_memory() -> None:
    for stage in (STAGES[0], Stage(1, range(3, 5), Recipe(), has_memory=False)):
        (phase,) = learner_of().phases(stage)
        assert (phase.name, phase.set_apart) == ("training", None)


def test_the_recipe_of_the_correction_may_have_other_epochs_and_another_rate() -> None:
    recipe = Recipe(epochs=5, initial_epochs=9)
    stage = Stage(1, range(3, 5), recipe, has_memory=True)
    training, bias = learner_of(bias_epochs=7).phases(stage)
    assert (training.recipe, bias.recipe) == (recipe, recipe.changed(epochs=7))
    training, bias = learner_of(bias_lr=0.25).phases(stage)
    assert (training.recipe, bias.recipe) == (recipe, recipe.changed(lr=0.25))


def test_corrections_rest_in_training_and_all_but_the_newest_rests_in_correction() -> None:
    learner = learner_of(stage=2, distillation=WeightedSum({"fitnet": (1.0, FitNet(hint="stage1.post"))}))
    for item in learner.phases(STAGES[2])[0].frozen:
        item.requires_grad_(False)
    resting = [name for name, _ in learner.network.head.named_parameters() if not name.startswith("linear.")]
    assert [name for name, parameter in learner.network.named_parameters() if not parameter.requires_grad] == [
        f"head.{name}" for name in resting
    ]
    assert any(name.startswith("distillation.") for name in trainable(learner))
    assert trainable(in_bias_phase(learner, 2)) == ["network.head.scales.1", "network.head.shifts.1"]


def test_the_correction_learns_from_cross_entropy_and_only_through_the_newest_scores() -> None:
    learner = in_bias_phase(learner_of(distillation=kd2()))
    losses = learner(BATCH)
    logits = learner.network(BATCH.images).logits
    assert list(losses) == ["ce"]
    torch.testing.assert_close(losses["ce"], F.cross_entropy(logits, BATCH.labels))
    a, b = learner.head.scales[0], learner.head.shifts[0]
    # dL/dz = (softmax - one-hot) / B, and z = a x + b for the new classes
    slope = (logits.softmax(1) - F.one_hot(BATCH.labels, 5)).detach()[:, NUM_OLD:] / 5
    uncorrected = ((logits[:, NUM_OLD:] - b) / a).detach()
    found = torch.autograd.grad(losses["ce"], [a, b])
    torch.testing.assert_close(found, ((slope * uncorrected).sum(), slope.sum()))


def test_a_few_steps_of_correction_undo_a_bias_of_the_new_scores() -> None:
    learner = in_bias_phase(learner_of())
    head = learner.head
    with torch.no_grad():
        head.linear.bias[NUM_OLD:] += 5
        before = learner.network(BATCH.images).logits
    assert set(before.argmax(1).tolist()) <= {3, 4}
    optimizer = torch.optim.SGD([head.scales[-1], head.shifts[-1]], lr=0.5)
    for _ in range(30):
        learner.update(learner(BATCH), optimizer, torch.amp.GradScaler("cpu", enabled=False), None)
    with torch.no_grad():
        after = learner.network(BATCH.images).logits
    assert after[:, :NUM_OLD].equal(before[:, :NUM_OLD])
    assert float(F.cross_entropy(after, BATCH.labels)) < float(F.cross_entropy(before, BATCH.labels)) - 1


def test_the_release_takes_the_softmax_twice_and_lets_batch_norm_move() -> None:
    for variant in ("single_softmax", "released"):
        learner = in_bias_phase(learner_of(variant=variant))
        before = {name: value.clone() for name, value in learner.network.named_buffers()}
        loss = learner(BATCH)["ce"]
        logits = learner.eval().network(BATCH.images).logits
        changed = [name for name, value in learner.network.named_buffers() if not value.equal(before[name])]
        if variant == "single_softmax":
            torch.testing.assert_close(loss, F.cross_entropy(logits, BATCH.labels))
            assert not changed
        else:
            assert len(changed) == len(before)
            again = learner.network.train()(BATCH.images).logits.softmax(1)
            torch.testing.assert_close(loss, F.cross_entropy(again, BATCH.labels))


def test_a_penalty_on_the_shift_is_a_term_of_its_own() -> None:
    learner = in_bias_phase(learner_of(shift_penalty=0.1))
    losses = learner(BATCH)
    assert list(losses) == ["ce", "shift"]
    torch.testing.assert_close(losses["shift"], 0.05 * learner.head.shifts[0] ** 2)


def test_the_teacher_answers_after_its_own_correction() -> None:
    learner = learner_of(distillation=kd2())
    expected = learner.network(BATCH.images).logits
    learner.end_stage(STAGES[1])
    learner.begin_stage(STAGES[2])
    assert learner.teacher is not None
    assert learner.teacher(BATCH.images).logits.equal(expected)
    assert float(learner.teacher.network.head.scales[0]) != 1  # type: ignore[union-attr, index]
    student = learner.eval().network(BATCH.images)
    torch.testing.assert_close(student.logits[:, :5], expected)
    assert [float(value.detach()) for value in (learner.head.scales[1], learner.head.shifts[1])] == [1, 0]


def test_a_fresh_learner_is_rebuilt_with_its_teacher() -> None:
    learner = learner_of(stage=2, distillation=kd2())
    fresh = BiC(models["resnet_cifar"]((1, 8, 8), depth=20, width=4), kd2())
    fresh.rebuild(learner.structure())
    fresh.load_state_dict(learner.state_dict())
    batch = Batch(BATCH.images, torch.tensor([0, 5, 2, 3, 4]), BATCH.ids)
    found, expected = fresh.eval()(batch), learner(batch)
    assert list(found) == list(expected) == ["ce", "kd2"]
    assert all(found[name].equal(expected[name]) for name in expected)


def test_networks_that_it_cannot_correct_are_refused() -> None:
    with pytest.raises(ValueError, match=r"learner=bic corrects the scores of one linear head, found DKTNetwork: use"):
        BiC(models["dkt"]((1, 8, 8)), None)
    network = models["resnet_cifar"]((1, 8, 8), depth=8)
    network.grow(3)
    with pytest.raises(ValueError, match=r"which would lose the 3 classes it has: start from a network without"):
        BiC(network, None)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_settings_out_of_range_are_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"learner\.fraction: input should be"):
        check(compose(["learner=bic", "model=resnet32", f"learner.fraction={fraction}"]))
    with pytest.raises(ConfigError, match=r"learner=bic replays exemplars and memory\.size is 0"):
        check(compose(["learner=bic", "model=resnet32", "memory.size=0"]))


def test_the_published_recipe_composes() -> None:
    published = ["model=resnet32", "optim=sgd", "optim.epochs=170", "optim.schedule.milestones=[60,100,140]"]
    config = check(compose(["learner=bic", *published, "optim.initial_epochs=170"]))
    assert (config.optim.initial_epochs, config.memory.size, list(config.kd)) == (170, 2000, ["kd2"])


def test_it_forgets_less_than_training_on_each_task_alone(whole_run: RunTiny) -> None:
    run = whole_run(*SMALL_RESNET, *SMALL, learner="bic")
    found, alone = metrics_of(run), metrics_of(whole_run(*SMALL_RESNET, learner="finetune"))
    assert found["last_accuracy"] > alone["last_accuracy"] + 0.3
    assert found["exemplars"] == [40, 40]
    epochs = [(event["phase"], list(event["losses"])) for event in facts_of(run) if event["event"] == "epoch"]
    first, second = [("training", ["ce"])], [("training", ["ce", "kd2"])]
    assert epochs == first * 10 + second * 10 + [(BIAS, ["ce"])] * 10


def test_the_correction_alone_makes_a_run_better_on_balanced_test_images(whole_run: RunTiny) -> None:
    model = ("model=resnet32", "model.depth=20", "model.width=8", "scenario.classes=4", "optim.epochs=10")
    model_with = cil.load(whole_run(*model, *SMALL, learner="bic"))
    head = model_with.network.head
    assert isinstance(head, nn.Module)
    data = Digits(Path("data")).load()
    known = [index for index, label in enumerate(data.test.labels.tolist()) if label < 4]
    images, labels = data.test.fetch(torch.tensor(known)), data.test.labels[known]
    corrected = (model_with.logits(images).argmax(1) == labels).float().mean()
    reported = metrics_of(whole_run(*model, *SMALL, learner="bic"))["last_accuracy"]
    assert float(corrected) == pytest.approx(reported)
    with torch.no_grad():
        head.scales[0].fill_(1)  # type: ignore[union-attr, index]
        head.shifts[0].fill_(0)  # type: ignore[union-attr, index]
    uncorrected = (model_with.logits(images).argmax(1) == labels).float().mean()
    assert float(corrected) > float(uncorrected)


def test_every_task_from_the_second_learns_a_correction_that_stays(whole_run: RunTiny) -> None:
    weights = weights_of(whole_run(*RESNET, *SMALL, learner="bic"))
    for part, start in (("scales", 1.0), ("shifts", 0.0)):
        assert f"stage_000/head.{part}.0" not in weights
        assert weights[f"stage_001/head.{part}.0"] != start
        assert weights[f"stage_002/head.{part}.0"].equal(weights[f"stage_001/head.{part}.0"])
        assert weights[f"stage_002/head.{part}.1"] not in (start, weights[f"stage_001/head.{part}.0"])


def test_correction_changes_nothing_but_two_numbers(run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[dict[str, torch.Tensor]] = []
    original = Engine.fit

    def fit(self: Engine, *arguments: Any) -> None:
        original(self, *arguments)
        states.append({name: value.clone() for name, value in self.learner.network.state_dict().items()})

    monkeypatch.setattr(Engine, "fit", fit)
    run_tiny(*RESNET, *SMALL, learner="bic", report=False)
    assert len(states) == 5
    for task, (before, after) in enumerate([states[1:3], states[3:5]]):
        changed = [name for name, value in after.items() if not value.equal(before[name])]
        assert changed == [f"head.scales.{task}", f"head.shifts.{task}"]


def test_it_trains_on_exemplars_as_they_were_before_the_task(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, list[int], dict[int, int]]] = []
    original = Engine.train_epoch

    def train_epoch(self: Engine, stage: Any, number: int, phase: Any, epoch: int, ids: Any, rates: Any) -> None:
        if epoch == 0:
            counts = np.bincount(self.samples.labels[ids].numpy(), minlength=stage.num_seen)
            seen.append((phase.name, counts.tolist(), self.memory.per_class()))
        original(self, stage, number, phase, epoch, ids, rates)

    monkeypatch.setattr(Engine, "train_epoch", train_epoch)
    run_tiny(*RESNET, *SMALL, learner="bic", report=False)
    (_, first, _), *later = seen
    assert [name for name, *_ in later] == ["training", BIAS] * 2
    for (_, training, before), (_, bias, still), num_old, quota in zip(
        later[::2], later[1::2], (2, 4), (20, 10), strict=True
    ):
        assert before == still == dict.fromkeys(range(num_old), quota)
        assert bias == [quota // 10] * (num_old + 2)
        assert training[:num_old] == [quota - quota // 10] * num_old
        assert min(training[num_old:]) > 100
    assert len(first) == 2


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, whole_run: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*RESNET, *SMALL)
    whole = whole_run(*settings, learner="bic")
    num_saves = 3 + 5 + 5  # two epochs of each phase, and the end of the task
    for _ in range(num_saves):
        with monkeypatch.context() as patch:
            interrupt(patch, checkpoint, "save_state", 1, after=True, what=KeyboardInterrupt)
            run_tiny_in(tmp_path, *settings, learner="bic", code=INTERRUPTED, report=False)
    assert_as_if_nothing_happened(run_tiny_in(tmp_path, *settings, learner="bic", report=False), whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["single_softmax", "released"])
def test_two_processes_train_the_same_model_as_one(tmp_path: Path, variant: str) -> None:
    settings = (*EXACT, *RESNET, *SMALL, "optim.batch_size=61", f"learner.variant={variant}")
    alone = run_tiny_in(tmp_path / "one", *settings, learner="bic", report=False)
    code, _, errors = ended(launch(2, tmp_path / "two", *settings, learner="bic"))
    assert code == 0, errors
    assert_equal_runs(alone, tmp_path / "two" / "run")
