import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cil import checkpoint
from cil.build import make_learner, make_network
from cil.cam import tapped
from cil.checking import check
from cil.cli import compose
from cil.config import ConfigError
from cil.learners.lucir import LUCIR, cosine_distance, margin_ranking
from cil.loading import load
from cil.models.network import models
from cil.optim import Recipe, make_optimizer
from cil.stages import Stage
from kd import Batch, WeightedSum
from kd.logit.kd import KD
from tests.conftest import RunTiny, run_tiny_in
from tests.run_folders import assert_same_weights, facts_of, metrics_of, weights_of
from tests.test_distributed import EXACT, assert_equal_runs, ended, launch
from tests.test_resume import INTERRUPTED, assert_as_if_nothing_happened, interrupt

TINY_RESNET = ("model=resnet32", "model.depth=8", "model.width=4", "scenario.classes=4", "optim.epochs=1")
#: What learns digits in a few steps: 2 tasks of 2.
LEARNING = ("model=resnet32", "model.depth=20", "model.width=8", "scenario.classes=4", "optim=sgd")
LEARNING += ("optim.epochs=10", "optim.initial_epochs=10", "optim.batch_size=32", "optim.schedule.milestones=[7]")
SGD = Recipe(optimizer="sgd", lr=0.1, lr_reference_batch=None, momentum=0.9, weight_decay=0.1, epochs=4, batch_size=8)
FIRST = Stage(0, range(3), SGD, has_memory=True)
SECOND = Stage(1, range(3, 5), SGD, has_memory=True)
BATCH = Batch(torch.rand(6, 1, 8, 8), torch.tensor([0, 4, 2, 3, 4, 1]), torch.arange(6))
NEW = [
    Batch(torch.rand(4, 1, 8, 8), torch.tensor([3, 4, 4, 3]), torch.arange(4)),
    Batch(torch.rand(3, 1, 8, 8), torch.tensor([3, 3, 4]), torch.arange(4, 7)),
]
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def learner_of(*, kd: bool = False, **switches: object) -> LUCIR:
    torch.manual_seed(0)
    distillation = WeightedSum({"kd": (0.5, KD(temperature=2.0))}) if kd else None
    return LUCIR(models["resnet_cifar"]((1, 8, 8), depth=8, width=4), distillation, **switches)  # type: ignore[arg-type]


def in_second_task(*, kd: bool = False, **switches: object) -> LUCIR:
    """With a teacher of other weights."""
    learner = learner_of(kd=kd, **switches)
    learner.begin_stage(FIRST)
    learner.begin_stage(SECOND)
    with torch.no_grad():
        for parameter in learner.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return learner


def optimizer_in(learner: LUCIR, name: str) -> torch.optim.Optimizer:
    """Let a phase of the second task begin as the engine does."""
    (phase,) = (phase for phase in learner.phases(SECOND) if phase.name == name)
    learner.phase = phase
    learner.network.requires_grad_(True)
    learner.train()
    for item in phase.frozen:
        item.requires_grad_(False)
        if isinstance(item, nn.Module):
            item.eval()
    optimizer = make_optimizer(learner, phase.recipe)
    learner.begin_epoch(0, learning_rate=phase.recipe.peak_lr, view_key=0)
    return optimizer


def train(learner: LUCIR, name: str, batches: list[Batch]) -> None:
    optimizer = optimizer_in(learner, name)
    for batch in batches:
        learner.update(learner(batch), optimizer, NO_SCALER, None)


def values_of(learner: LUCIR) -> dict[str, Tensor]:
    return copy.deepcopy(learner.network.state_dict())


# Losses


def test_the_first_task_is_cross_entropy_of_scaled_cosines() -> None:
    learner = learner_of()
    learner.begin_stage(FIRST)
    with torch.no_grad():
        learner.head.eta.fill_(7)
    learner.eval()
    batch = Batch(BATCH.images[:3], torch.tensor([0, 1, 2]), BATCH.ids[:3])
    losses = learner(batch)
    embedding = learner.network(batch.images).embedding
    cosines = F.cosine_similarity(embedding[:, None], learner.head.weight[None], dim=2)
    assert list(losses) == ["ce"]
    torch.testing.assert_close(losses["ce"], F.cross_entropy(7 * cosines, batch.labels))


def test_old_samples_are_ranked_against_the_nearest_new_classes() -> None:
    cosines = torch.tensor([[0.9, 0.1, 0.7, -0.5, 0.5], [0.2, 0.3, 0.9, 0.8, 0.7], [0.0, 0.0, 1.0, 0.5, 0.5]])
    labels = torch.tensor([0, 1, 4])  # the last sample is of a new class
    # of the first: 0.5 - 0.9 + (0.7, 0.5); of the second: 0.5 - 0.3 + (0.9, 0.8)
    assert float(margin_ranking(cosines, labels, 2)) == pytest.approx((0.3 + 0.1 + 1.1 + 1.0) / 4)
    assert float(margin_ranking(cosines, labels, 2, num_hardest=1)) == pytest.approx((0.3 + 1.1) / 2)
    assert float(margin_ranking(cosines, labels, 2, margin=0.0)) == pytest.approx((0 + 0 + 0.6 + 0.5) / 4)
    assert float(margin_ranking(cosines, labels, 4)) == pytest.approx((0.1 + 0.9) / 2)  # fewer new classes than K


def test_without_old_samples_nothing_is_ranked() -> None:
    cosines = torch.rand(3, 5, requires_grad=True)
    loss = margin_ranking(cosines, torch.tensor([3, 4, 3]), 3)
    assert loss == 0
    assert not torch.autograd.grad(loss, cosines)[0].any()


@given(st.floats(0.01, 100))
@settings(max_examples=10)
def test_features_of_one_direction_have_no_distance(factor: float) -> None:
    features = torch.randn(4, 6)
    assert float(cosine_distance(factor * features, features)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_distance(-factor * features, features)) == pytest.approx(2, abs=1e-6)


def test_terms_are_weighted_as_published() -> None:
    learner = in_second_task(margin_ranking=3.0).eval()
    assert learner.teacher is not None
    losses = learner(BATCH)
    student, teacher = learner.network(BATCH.images), learner.teacher(BATCH.images)
    assert list(losses) == ["ce", "margin_ranking", "less_forget"]
    assert losses["ce"].equal(F.cross_entropy(student.logits, BATCH.labels))
    cosines = student.logits / learner.head.eta
    torch.testing.assert_close(losses["margin_ranking"], 3 * margin_ranking(cosines, BATCH.labels, 3))
    expected = 5 * math.sqrt(3 / 2) * (1 - F.cosine_similarity(student.embedding, teacher.embedding).mean())
    torch.testing.assert_close(losses["less_forget"], expected)


def test_the_weight_follows_classes_or_tasks() -> None:
    by_classes, by_tasks = learner_of(less_forget=10.0), learner_of(less_forget=10.0, lambda_scale="tasks")
    for learner in (by_classes, by_tasks):
        for index, size in enumerate((6, 2, 2)):
            learner.begin_stage(Stage(index, range(10, 10 + size), SGD, has_memory=True))
    assert by_classes.weight == pytest.approx(10 * math.sqrt(8 / 2))
    assert by_tasks.weight == pytest.approx(10 * math.sqrt(2))


def test_a_student_equal_to_its_teacher_has_nothing_to_keep() -> None:
    learner = learner_of()
    learner.begin_stage(FIRST)
    learner.begin_stage(SECOND)
    assert float(learner.eval()(BATCH)["less_forget"].detach()) == pytest.approx(0, abs=1e-6)


def test_terms_of_weight_zero_are_left_out_and_ask_no_teacher() -> None:
    learner = in_second_task(less_forget=0.0, margin_ranking=0.0)
    assert learner.teacher is None
    assert list(learner(BATCH)) == ["ce"]


def test_a_distillation_takes_the_place_of_the_term_with_its_weight() -> None:
    learner = in_second_task(kd=True).eval()
    assert learner.teacher is not None
    losses = learner(BATCH)
    student, teacher = learner.network(BATCH.images), learner.teacher(BATCH.images)
    assert list(losses) == ["ce", "margin_ranking", "kd"]
    expected = 5 * math.sqrt(3 / 2) * 0.5 * KD(temperature=2.0)(student.first(3), teacher, BATCH)
    torch.testing.assert_close(losses["kd"], expected)


# Phases


def test_phases_of_the_first_task_and_of_later_ones() -> None:
    learner = in_second_task(finetune_epochs=20)
    assert [phase.name for phase in learner.phases(FIRST)] == ["training"]
    imprinting, training, finetuning = learner.phases(SECOND)
    assert (imprinting.source, training.source, finetuning.source) == ("new", "new+memory", "memory")
    assert (imprinting.recipe.epochs, training.recipe, finetuning.recipe.epochs) == (1, SGD, 20)
    assert (finetuning.recipe.peak_lr, finetuning.recipe.schedule.milestones) == (0.01, [10])
    assert list(training.frozen) == list(imprinting.frozen) == [learner.head.weights[0]]
    assert list(finetuning.frozen) == [learner.network.backbone, learner.head.eta]
    assert [phase.name for phase in in_second_task(imprint=False).phases(SECOND)] == ["training"]
    assert list(in_second_task(frozen_old=False).phases(SECOND)[1].frozen) == []


def test_imprinting_changes_no_weight_and_no_statistics() -> None:
    learner = in_second_task()
    before = values_of(learner)
    train(learner, "imprinting", NEW)
    assert_same_weights(learner.network.state_dict(), before)
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_new_vectors_begin_at_the_mean_direction_of_their_features() -> None:
    learner = in_second_task()
    old = learner.head.weights[0].detach().clone()
    train(learner, "imprinting", NEW)
    learner.network.eval()
    directions = F.normalize(torch.cat([learner.network(batch.images).embedding for batch in NEW]).detach())
    labels = torch.cat([batch.labels for batch in NEW])
    length = old.norm(dim=1).mean()
    expected = torch.stack([length * F.normalize(directions[labels == k].mean(dim=0), dim=0) for k in (3, 4)])
    optimizer_in(learner, "training")
    torch.testing.assert_close(learner.head.weights[1].detach(), expected)
    assert learner.head.weights[0].equal(old)


def test_new_vectors_are_set_before_the_first_epoch_of_training_alone() -> None:
    learner = in_second_task()
    train(learner, "imprinting", NEW)
    optimizer_in(learner, "training")
    with torch.no_grad():
        learner.head.weights[1].fill_(1)
    learner.begin_epoch(1, learning_rate=0.1, view_key=0)
    assert (learner.head.weights[1] == 1).all()
    drawn = in_second_task(imprint=False)
    before = drawn.head.weights[1].detach().clone()
    optimizer_in(drawn, "training")
    assert drawn.head.weights[1].equal(before)


def test_a_class_whose_features_have_no_direction_keeps_the_vector_that_was_drawn() -> None:
    learner = in_second_task()
    before = learner.head.weights[1].detach().clone()
    train(learner, "imprinting", [Batch(NEW[0].images[:1], torch.tensor([4]), torch.arange(1))])
    optimizer_in(learner, "training")
    assert learner.head.weights[1][0].equal(before[0])
    assert not learner.head.weights[1][1].equal(before[1])


def test_a_learner_rebuilt_between_imprinting_and_training_goes_on_to_the_bit() -> None:
    learner = in_second_task()
    train(learner, "imprinting", NEW)
    other = learner_of()
    other.rebuild(learner.structure())
    other.load_state_dict(learner.state_dict())
    for one in (learner, other):
        train(one, "training", [BATCH, BATCH])
    assert_same_weights(other.state_dict(), learner.state_dict())


@pytest.mark.parametrize("frozen_old", [True, False])
def test_no_bit_of_old_vectors_moves_with_weight_decay_and_momentum(frozen_old: bool) -> None:
    learner = in_second_task(frozen_old=frozen_old)
    before = values_of(learner)
    train(learner, "training", [BATCH] * 3)
    after = learner.network.state_dict()
    assert after["head.weights.0"].equal(before["head.weights.0"]) == frozen_old
    assert not after["head.weights.1"].equal(before["head.weights.1"])
    assert not after["head.eta"].equal(before["head.eta"])


def test_fine_tuning_moves_all_vectors_and_nothing_else() -> None:
    learner = in_second_task(finetune_epochs=2)
    before = values_of(learner)
    optimizer_in(learner, "finetuning")
    assert list(learner(BATCH)) == ["ce", "margin_ranking"]
    train(learner, "finetuning", [BATCH] * 2)
    moved = [name for name, value in learner.network.state_dict().items() if not value.equal(before[name])]
    assert moved == ["head.weights.0", "head.weights.1"]


# Configs


def test_networks_without_one_embedding_are_refused() -> None:
    with pytest.raises(ValueError, match=r"learner=lucir puts a cosine head .* found DKTNetwork: use model=resnet32"):
        LUCIR(models["dkt"]((1, 8, 8)))


def test_a_distillation_of_weight_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"learner\.less_forget is the weight of what kd names.*or kd=none"):
        learner_of(kd=True, less_forget=0.0)


def test_a_run_without_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"learner=lucir replays exemplars and memory\.size is 0"):
        check(compose(["learner=lucir", "model=resnet32", "memory.size=0"]))


def test_a_transformer_has_an_embedding_too() -> None:
    network = models["timm"]((3, 32, 32), architecture="vit_tiny_patch16_224")
    learner = LUCIR(network)
    for stage in (FIRST, SECOND):
        learner.begin_stage(stage)
    batch = Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 4]), torch.arange(2))
    assert list(learner(batch)) == ["ce", "margin_ranking", "less_forget"]


def test_the_published_recipe_composes_and_its_file_lists_every_default() -> None:
    published = ["model=resnet32", "optim=sgd", "optim.epochs=160", "optim.initial_epochs=160"]
    published += ["optim.schedule.milestones=[80,120]", "optim.weight_decay=5e-4", "memory=per_class"]
    tree = compose(["learner=lucir", *published])
    config = check(tree)
    assert config.learner.parameters == {name: value for name, value in tree["learner"].items() if name != "name"}
    assert (config.kd, config.memory.size, config.memory.budget) == ({}, 20, "per_class")
    learner = make_learner(config, make_network(config.model, 0, (3, 32, 32)))
    defaults = LUCIR(models["resnet_cifar"]((3, 32, 32)))
    for name in config.learner.parameters:
        assert getattr(learner, name, None) == getattr(defaults, name, None)


# Runs


def test_it_forgets_less_than_training_on_each_task_alone(whole_run: RunTiny) -> None:
    run = whole_run(*LEARNING, learner="lucir")
    found, alone = metrics_of(run), metrics_of(whole_run(*LEARNING, learner="finetune"))
    assert found["last_accuracy"] > alone["last_accuracy"] + 0.2
    epochs = [(event["phase"], list(event["losses"])) for event in facts_of(run) if event["event"] == "epoch"]
    terms = ["ce", "margin_ranking", "less_forget"]
    assert epochs == [("training", ["ce"])] * 10 + [("imprinting", ["ce"])] + [("training", terms)] * 10
    weights = weights_of(run)
    assert weights["stage_001/head.weights.0"].equal(weights["stage_000/head.weights.0"])


def test_what_a_run_has_learned_is_loaded_with_its_head(whole_run: RunTiny) -> None:
    model = load(whole_run(*LEARNING, learner="lucir"))
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    scores = model.logits(images)
    assert scores.shape == (3, 4)
    assert scores.abs().max() <= model.network.head.eta.abs()
    outputs = tapped(model)(model.transform.test(images))
    means = outputs.taps["class_maps"].mean((2, 3)) / outputs.embedding.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.network.head.eta * means, scores)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, whole_run: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    switches = (*TINY_RESNET, "learner.finetune_epochs=1", "optim.optimizer=sgd", "optim.momentum=0.9")
    switches += ("optim.carry_state=true",)
    whole = whole_run(*switches, learner="lucir")
    assert len(metrics_of(whole)["accuracy_before_finetuning"]) == 2
    # training and the end of the first task; imprinting, training, fine-tuning and the end of the second
    for _ in range(2 + 4):
        with monkeypatch.context() as patch:
            interrupt(patch, checkpoint, "save_state", 1, after=True, what=KeyboardInterrupt)
            run_tiny_in(tmp_path, *switches, learner="lucir", code=INTERRUPTED, report=False)
    assert_as_if_nothing_happened(run_tiny_in(tmp_path, *switches, learner="lucir", report=False), whole)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    switches = (*EXACT, *TINY_RESNET, "learner.finetune_epochs=1", "optim.batch_size=61")
    alone = run_tiny_in(tmp_path / "one", *switches, learner="lucir", report=False)
    code, _, errors = ended(launch(2, tmp_path / "two", *switches, learner="lucir"))
    assert code == 0, errors
    assert_equal_runs(alone, tmp_path / "two" / "run")
