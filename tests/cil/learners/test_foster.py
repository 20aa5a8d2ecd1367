from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import cil
from cil.checking import check
from cil.cli import compose
from cil.config import ConfigError
from cil.learners.foster import FOSTER, balanced_distillation, class_weights
from cil.models.network import models
from cil.optim import Recipe
from cil.stages import Stage
from kd import WeightedSum
from kd.logit.kd import KD
from tests.cil.learners.expansions import (
    DIGITS,
    METHODS,
    SMALL,
    STAGES,
    assert_goes_on_as_rebuilt,
    assert_interruptions_leave_no_trace,
    assert_method_teaches,
    batch_of,
    distillation_of,
    enter,
    in_stage,
    losses_of,
    network_of,
    step,
)
from tests.conftest import RunTiny, run_tiny_in
from tests.run_folders import facts_of, metrics_of, weights_of
from tests.test_distributed import EXACT, assert_equal_runs, ended, launch

SECOND = STAGES[1]


def kd2() -> WeightedSum:
    return WeightedSum({"kd2": (0.25, KD(temperature=2.0))})


def learner_of(stage: int, distillation: WeightedSum | None = None, **values: object) -> FOSTER:
    """At the start of a stage, after steps in those before."""
    learner = FOSTER(network_of(), distillation or kd2(), **values)  # type: ignore[arg-type]
    in_stage(learner, stage)
    return learner


def test_weights_of_classes_are_those_of_effective_numbers() -> None:
    # (1 - 0.5) / (1 - 0.5^n) is 1, 2/3 and 4/7 for n = 1, 2 and 3; their sum is 47/21
    expected = torch.tensor([1, 2 / 3, 4 / 7], dtype=torch.float64) * 3 * 21 / 47
    torch.testing.assert_close(class_weights(torch.tensor([1, 2, 3]), 0.5), expected)
    assert class_weights(torch.tensor([1, 2, 3]), 0.0).equal(torch.ones(3, dtype=torch.float64))
    released = class_weights(torch.tensor([20] * 50 + [500] * 10), 0.96)
    assert float(released[0] / released[-1]) == pytest.approx(1 / (1 - 0.96**20), rel=1e-6)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.floats(0, 0.999))
@settings(max_examples=30)
def test_rare_classes_have_the_larger_weights_and_their_mean_is_one(sizes: list[int], beta: float) -> None:
    weights = class_weights(torch.tensor(sizes), beta)
    assert float(weights.mean()) == pytest.approx(1)
    for one, weight in zip(sizes, weights.tolist(), strict=True):
        for other, lighter in zip(sizes, weights.tolist(), strict=True):
            assert one >= other or weight >= lighter - 1e-9


def test_balanced_distillation_learns_the_weighted_answers() -> None:
    student, teacher = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    e = torch.e
    # T 2: the teacher says 1/2, 1/2 and e, 1 / (e + 1); weights 3, 1 make it 3/4, 1/4 and 3e, 1 / (3e + 1)
    first = -(3 / 4 * torch.tensor(e / (e + 1)).log() + 1 / 4 * torch.tensor(1 / (e + 1)).log())
    second = -torch.tensor(0.5).log()
    found = balanced_distillation(student, teacher, torch.tensor([1.5, 0.5]), 2.0)
    torch.testing.assert_close(found, (first + second) / 2)


def test_with_equal_weights_its_gradient_is_that_of_distillation() -> None:
    student = torch.randn(4, 5, requires_grad=True)
    teacher = torch.randn(4, 5, requires_grad=True)
    found = torch.autograd.grad(balanced_distillation(student, teacher, torch.ones(5), 2.0), student)[0]
    log_q = F.log_softmax(student / 2, dim=1)
    published = -(F.softmax(teacher.detach() / 2, dim=1) * log_q).sum(dim=1).mean()
    torch.testing.assert_close(found, torch.autograd.grad(published, student)[0])
    balanced_distillation(student, teacher, torch.ones(5), 2.0).backward()
    assert teacher.grad is None


def test_a_stage_is_boosting_and_then_a_shorter_compression() -> None:
    learner = FOSTER(network_of(), kd2())
    recipe = Recipe(epochs=170, initial_epochs=200, weight_decay=5e-4, batch_size=64)
    (training,) = learner.phases(Stage(0, range(2), recipe, has_memory=True))
    assert (training.name, training.recipe.epochs, list(training.frozen)) == ("training", 200, [])
    in_stage(learner, 1)
    boosting, compression = learner.phases(Stage(1, range(2, 4), recipe, has_memory=True))
    assert (boosting.name, boosting.recipe.epochs, boosting.recipe.weight_decay) == ("boosting", 170, 5e-4)
    assert boosting.source == compression.source == "new+memory"
    assert (compression.name, compression.recipe.epochs, compression.recipe.weight_decay) == ("compression", 130, 0)
    assert (compression.recipe.schedule.name, compression.recipe.peak_lr) == ("cosine", recipe.peak_lr)
    learner.compression_epochs = 7
    assert learner.phases(Stage(1, range(2, 4), recipe, has_memory=True))[1].recipe.epochs == 7


def test_the_losses_of_boosting() -> None:
    learner = learner_of(1, beta1=0.9, kd_weight=3.0)
    learner.class_sizes = torch.tensor([1, 2, 30, 40])
    batch = batch_of(SECOND)
    step(learner, batch)
    assert learner.teacher is not None
    outputs, teacher = learner.eval().network(batch.images), learner.teacher(batch.images)
    losses = learner(batch)
    assert list(losses) == ["ce", "ce_new", "kd2"]
    weights = class_weights(torch.tensor([1, 2, 30, 40]), 0.9).float()
    torch.testing.assert_close(losses["ce"], F.cross_entropy(outputs.logits / weights, batch.labels))
    head = learner.network.auxiliary
    assert head is not None
    assert head.out_features == 4
    torch.testing.assert_close(losses["ce_new"], F.cross_entropy(head(outputs.embedding[:, 8:]), batch.labels))
    expected = 3 * 0.25 * KD(temperature=2.0)(outputs.first(2), teacher, batch)
    assert losses["kd2"].equal(expected)


def test_without_beta_the_loss_of_boosting_is_plain_cross_entropy() -> None:
    learner = learner_of(1, beta1=0.0).eval()
    batch = batch_of(SECOND)
    assert learner(batch)["ce"].equal(F.cross_entropy(learner.network(batch.images).logits, batch.labels))
    first = learner_of(0).eval()
    losses = first(batch_of(STAGES[0]))
    assert list(losses) == ["ce"]


def test_the_loss_of_compression() -> None:
    learner = learner_of(1, beta2=0.8, temperature=3.0)
    learner.class_sizes = torch.tensor([1, 2, 30, 40])
    enter(learner, learner.phases(SECOND)[1])
    batch = batch_of(SECOND)
    assert learner.student is not None
    learner.eval()
    losses = learner(batch)
    assert list(losses) == ["bkd"]
    student, teacher = learner.student(batch.images), learner.network(batch.images)
    weights = class_weights(torch.tensor([1, 2, 30, 40]), 0.8)
    assert losses["bkd"].equal(balanced_distillation(student.logits, teacher.logits, weights, 3.0))


def test_both_networks_begin_as_the_old_one() -> None:
    learner = learner_of(0)
    step(learner, batch_of(STAGES[0]))
    learner.end_stage(STAGES[0])
    learner.eval()
    images = batch_of(SECOND).images
    old = learner.predict(images)
    learner.begin_stage(SECOND)
    learner.eval()
    assert learner.student is not None
    torch.testing.assert_close(learner.student(images).logits[:, :2], old)
    with torch.no_grad():
        learner.network.head.weight[:2, 8:] = 0
    torch.testing.assert_close(learner.network(images).logits[:, :2], old)
    assert learner.network.structure() == {"task_sizes": [2, 2], "num_copies": 2}
    assert learner.student.structure() == {"task_sizes": [2, 2], "num_copies": 1}


def test_each_phase_moves_one_network() -> None:
    learner = learner_of(2)
    for phase in learner.phases(STAGES[2]):
        enter(learner, phase)
        before = {name: value.clone() for name, value in learner.state_dict().items()}
        step(learner, batch_of(STAGES[2]))
        moved = {name for name, value in learner.state_dict().items() if not value.equal(before[name])}
        if phase.name == "boosting":
            assert {n for n in before if n.startswith("network.") and ".each.0." not in n} == moved
        else:
            assert {n for n in before if n.startswith("student.")} == moved


@pytest.mark.parametrize("prediction", ["compressed", "boosted"])
def test_the_network_that_answers_is_the_one_that_is_asked_for(prediction: str) -> None:
    learner = learner_of(1, prediction=prediction)
    boosted, compressed, images = learner.network, learner.student, batch_of(SECOND).images
    assert compressed is not None
    answers = compressed if prediction == "compressed" else boosted
    for number, expected in enumerate([boosted, answers]):
        enter(learner, learner.phases(SECOND)[number])
        learner.eval()
        assert learner.predict(images).equal(expected(images).logits)
        assert learner.embed(images).equal(expected(images).embedding)
    learner.phase = None
    assert learner.embed(images).equal(answers(images).embedding)
    learner.end_stage(SECOND)
    assert learner.network is answers
    assert (learner.student is None) == (prediction == "compressed")
    assert learner.predict(images).equal(answers(images).logits)
    kept = {name: value.clone() for name, value in compressed.copies.state_dict().items()}
    learner.begin_stage(STAGES[2])
    old = learner.network.copies.each[0].state_dict()
    assert all(value.equal(kept[f"each.0.{name}"]) for name, value in old.items())
    assert [len(network.copies.each) for network in (learner.network, learner.student)] == [2, 1]  # type: ignore[union-attr]


def test_all_networks_are_asked_about_training_images() -> None:
    learner = learner_of(1)
    assert learner.teacher is not None
    assert learner.speakers() == [learner.network, learner.teacher.network, learner.student]


def test_new_rows_are_aligned_before_compression_and_at_the_end_if_asked_for() -> None:
    for aligned in (False, True):
        learner = learner_of(1, align_boosted=aligned, align_compressed=aligned)
        assert learner.student is not None
        heads = [learner.network.head, learner.student.head]
        for head in heads:
            with torch.no_grad():
                head.weight[2:] *= 5
        boosting, compression = learner.phases(SECOND)
        for phase, epochs in ((boosting, 1), (compression, 2)):
            before = heads[0].weight.detach().clone()
            enter(learner, phase)
            for epoch in range(epochs):
                learner.begin_epoch(epoch, learning_rate=0.1, view_key=0)
            assert heads[0].weight.equal(before) != (aligned and phase is compression)
        learner.end_stage(SECOND)
        for head in heads:
            norms = head.weight.detach().norm(dim=1)
            assert torch.allclose(norms[2:].mean(), norms[:2].mean()) == aligned


def test_images_of_a_class_are_counted_unless_a_number_is_given() -> None:
    learner = learner_of(1)
    learner.remember(torch.arange(9), torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3]))
    assert learner.weights(0.5).equal(class_weights(torch.tensor([1, 2, 3, 3]), 0.5))
    learner.new_class_size = 500
    assert learner.weights(0.5).equal(class_weights(torch.tensor([1, 2, 500, 500]), 0.5))


def test_a_class_without_images_is_an_error() -> None:
    learner = learner_of(1)
    for labels, found in (([0, 1], "those of 2"), ([0, 1, 3], "those of 3")):
        learner.remember(torch.arange(len(labels)), torch.tensor(labels))
        with pytest.raises(ValueError, match=rf"weights each of its 4 classes .*, found {found}: call remember"):
            learner(batch_of(SECOND))
    learner.class_sizes = None
    with pytest.raises(ValueError, match="found none: call remember"):
        learner(batch_of(SECOND))


def test_the_old_network_is_asked_for_maps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(1)
    monkeypatch.setattr(learner.teacher, "forward", lambda images: pytest.fail("asked"))
    assert "kd2" in learner(batch_of(SECOND))
    assert "at" in learner_of(1, distillation_of("at"))(batch_of(SECOND))


@pytest.mark.parametrize("method", METHODS)
def test_every_distillation_method_teaches_it(method: str) -> None:
    assert_method_teaches(lambda terms: FOSTER(network_of(), terms), method)


def test_without_distillation_no_old_network_is_kept() -> None:
    learner = FOSTER(network_of(), None)
    in_stage(learner, 1)
    assert learner.teacher is None
    assert list(learner(batch_of(SECOND))) == ["ce", "ce_new"]


@pytest.mark.parametrize("prediction", ["compressed", "boosted"])
@pytest.mark.parametrize("method", ["kd", "crd"])
def test_a_rebuilt_learner_goes_on_to_the_bit(prediction: str, method: str) -> None:
    learner = learner_of(2, distillation_of(method), prediction=prediction)
    step(learner, batch_of(STAGES[2]))
    fresh = FOSTER(network_of(), distillation_of(method), prediction=prediction)  # type: ignore[arg-type]
    assert_goes_on_as_rebuilt(learner, fresh, STAGES[2], learner.phases(STAGES[2]))


def test_a_network_without_a_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"learner=foster copies the backbone .*, found DKTNetwork: use model="):
        FOSTER(models["dkt"]((1, 8, 8)), None)


def test_a_run_without_memory_and_values_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"learner=foster replays exemplars and memory\.size is 0"):
        check(compose(["learner=foster", "model=resnet32", "memory.size=0"]))
    with pytest.raises(ConfigError, match=r"learner\.beta1: input should be less than 1, found 1"):
        check(compose(["learner=foster", "model=resnet32", "learner.beta1=1"]))


def test_the_published_recipe_composes() -> None:
    shown = (Path(cil.__file__).parents[1] / "configs/learner/foster.yaml").read_text()
    command = shown[shown.index("learner=foster") : shown.index("# Source")]
    config = check(compose([word for word in command.split() if "=" in word]))
    assert (config.optim.initial_epochs, config.optim.weight_decay, config.optim.schedule.name) == (200, 5e-4, "cosine")
    assert (config.memory.size, config.memory.budget, config.scenario.initial_increment) == (20, "per_class", 50)
    term = config.kd["kd2"]
    assert (list(config.kd), term["weight"] * term["temperature"] ** 2) == (["kd2"], 1.0)


def test_it_forgets_less_than_training_on_each_task_alone(whole_run: RunTiny) -> None:
    run = whole_run(*DIGITS, learner="foster")
    found, alone = metrics_of(run), metrics_of(whole_run(*DIGITS, learner="finetune"))
    assert found["last_accuracy"] > alone["last_accuracy"] + 0.3
    assert losses_of(run) == [["ce"]] * 6 + ([["ce", "ce_new", "kd2"]] * 6 + [["bkd"]] * 5) * 2


@pytest.mark.parametrize("prediction", ["compressed", "boosted"])
def test_a_run_saves_the_network_that_answers(whole_run: RunTiny, prediction: str) -> None:
    run = whole_run(*SMALL, f"learner.prediction={prediction}", "kd=fitnet", "kd.fitnet.weight=1", learner="foster")
    model = cil.load(run)
    assert model.logits(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 6)
    num_copies = 1 if prediction == "compressed" else 2
    assert model.network.structure() == {"task_sizes": [2, 2, 2], "num_copies": num_copies}
    boosted = [event["num_parameters"] for event in facts_of(run) if event["event"] == "stage_started"][2]
    saved = sum(value.numel() for name, value in weights_of(run).items() if name.startswith("stage_002"))
    assert (saved < 0.6 * boosted) == (prediction == "compressed")


@pytest.mark.parametrize(("prediction", "num_tasks"), [("compressed", 2), ("boosted", 3)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prediction: str, num_tasks: int
) -> None:
    values = (*SMALL, f"learner.prediction={prediction}", "kd=fitnet", "kd.fitnet.weight=1")
    values += (f"scenario.classes={2 * num_tasks}", "learner.align_boosted=true", "evaluation.every_epochs=1")
    # tasks save after two epochs of each phase and at their end; interrupted from the second task on
    num_more = 4 + 5 * (num_tasks - 2)
    assert_interruptions_leave_no_trace(
        monkeypatch, tmp_path, *values, learner="foster", first=3 + 1, num_more=num_more
    )


@pytest.mark.slow
@pytest.mark.parametrize("kd", ["kd2", "at"])
def test_two_processes_train_what_one_trains(tmp_path: Path, kd: str) -> None:
    settings = (*EXACT, *SMALL, f"kd={kd}", "optim.batch_size=61", "learner.align_boosted=true")
    alone = run_tiny_in(tmp_path / "one", *settings, learner="foster", report=False)
    code, _, errors = ended(launch(2, tmp_path / "two", *settings, learner="foster"))
    assert code == 0, errors
    assert_equal_runs(alone, tmp_path / "two" / "run")
