"""The switches and phases of DKT; its losses and gradients are compared with the release by tests.parity."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cil.learners.base import learners
from cil.learners.dkt import DKT, DKTOfficial
from cil.learners.dkt_losses import BaseLoss, balanced_cross_entropy, binary_cross_entropy
from cil.models.dkt import DKTNetwork
from cil.models.network import models
from cil.optim import Recipe, Sampling, Schedule
from cil.stages import Stage
from kd import Batch, WeightedSum
from kd.logit.kd import KD
from tests.conftest import run_tiny_in
from tests.run_folders import facts_of

RECIPE = Recipe(
    lr=1e-3,
    lr_reference_batch=64,
    batch_size=128,
    epochs=7,
    initial_epochs=9,
    schedule=Schedule(warmup_epochs=2),
    sampling=Sampling(views=3, round_to=256, drop_last=True),
)


def network_of(*task_sizes: int) -> DKTNetwork:
    torch.manual_seed(0)
    network = DKTNetwork((1, 8, 8), width=8, num_heads=2, depth=2, mlp_ratio=1, stem_width=4, pool_stride=1)
    for size in task_sizes:
        network.grow(size)
    return network


def learner_of(*task_sizes: int, kind: type[DKT] = DKT, **switches: Any) -> DKT:
    distillation = WeightedSum({"dkt": (1.0, KD(temperature=1.0, reduction="batchmean"))})
    return kind(network_of(*task_sizes), distillation, **switches)


def stage_of(index: int, first: int = 2, size: int = 2, memory: bool = True) -> Stage:
    return Stage(index, range(first, first + size) if index else range(size), RECIPE, memory)


def begun(*task_sizes: int, **switches: Any) -> tuple[DKT, Stage]:
    """A learner in the last of some tasks, and that stage."""
    learner, first = learner_of(**switches), 0
    for index, size in enumerate(task_sizes):
        if index:
            learner.end_stage(stage)
        stage = Stage(index, range(first, first + size), RECIPE, has_memory=True)
        learner.begin_stage(stage)
        first += size
    return learner, stage


def batch_of(num_classes: int, size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(size) % num_classes
    return Batch(torch.randn(size, 1, 8, 8, generator=generator), labels, torch.arange(size))


# Phases


def test_the_first_task_has_one_phase_on_the_new_data() -> None:
    (phase,) = learner_of(2).phases(stage_of(0))
    assert (phase.name, phase.source, list(phase.frozen)) == ("training", "new", [])
    assert phase.recipe == RECIPE.for_task(0)
    assert phase.recipe.epochs == 9


def test_later_tasks_train_and_then_fine_tune_on_the_memory() -> None:
    main, finetuning = learner_of(2, 2, finetune_epochs=3, finetune_lr=5e-5).phases(stage_of(1))
    assert (main.name, main.source, main.recipe.epochs) == ("training", "new+memory", 7)
    assert (finetuning.name, finetuning.source, finetuning.recipe.epochs) == ("finetuning", "memory", 3)
    assert finetuning.recipe.peak_lr == pytest.approx(1e-4)  # scaled by the batch size
    assert finetuning.recipe.schedule == Schedule(name="constant")
    assert finetuning.recipe.sampling == Sampling()  # whole and shuffled, without repeated views
    assert finetuning.frozen_in_eval


def test_asking_for_the_phases_changes_nothing() -> None:
    learner, stage = begun(2, 2)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    assert learner.phases(stage)[1].recipe == learner.phases(stage)[1].recipe
    assert all(value.equal(before[name]) for name, value in learner.state_dict().items())
    for index in range(5):  # the engine asks for stages to come as well, before the network has grown
        learner_of().phases(stage_of(index))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (4, [4, 4, 4, 4]),
        ([1, 1, 10], [1, 1, 10, 10]),
        ([2], [2, 2, 2, 2]),
        ([0, 3], [None, 3, 3, 3]),
        (0, [None] * 4),
    ],
)
def test_epochs_of_fine_tuning_are_one_number_or_one_per_task_of_which_the_last_goes_on(
    given: int | list[int], expected: list[int | None]
) -> None:
    learner = learner_of(2, 2, finetune_epochs=given)
    found = []
    for index in range(1, 5):
        phases = learner.phases(stage_of(index))
        found.append(phases[1].recipe.epochs if len(phases) > 1 else None)
    assert found == expected


def test_without_memory_there_is_no_fine_tuning() -> None:
    assert [phase.name for phase in learner_of(2, 2).phases(stage_of(1, memory=False))] == ["training"]


def test_the_switches_of_fine_tuning_reach_its_recipe() -> None:
    switches = {"finetune_shuffle": False, "finetune_drop_last": True, "finetune_frozen_in_eval": False}
    finetuning = learner_of(2, 2, finetune_batch_size=32, **switches).phases(stage_of(1))[1]
    assert finetuning.recipe.sampling == Sampling(shuffle=False, drop_last=True)
    assert (finetuning.batch_size, finetuning.recipe.peak_lr) == (32, 2.5e-5)
    assert not finetuning.frozen_in_eval


@pytest.mark.parametrize(("train_it", "is_frozen"), [(False, True), (True, False)])
def test_the_general_token_learns_in_fine_tuning_only_for_the_release(train_it: bool, is_frozen: bool) -> None:
    learner = learner_of(2, 2, finetune_general_token=train_it)
    frozen = learner.phases(stage_of(1))[1].frozen
    assert any(item is learner.network.token_pool.general_token for item in frozen) == is_frozen


def test_the_batch_size_may_change_from_the_second_task_on() -> None:
    learner = learner_of(2, 2, incremental_batch_size=64)
    assert [phase.batch_size for index in (0, 1) for phase in learner.phases(stage_of(index))] == [128, 64, 64]


def test_the_late_override_of_the_release_changes_the_rate_and_not_the_batches() -> None:
    learner = learner_of(2, 2, incremental_batch_size=64, late_batch_override=True)
    main, finetuning = learner.phases(stage_of(1))
    assert (main.batch_size, main.recipe.peak_lr) == (128, pytest.approx(1e-3))
    assert finetuning.batch_size == 64


# Losses


def test_the_first_task_has_the_base_loss_alone() -> None:
    learner, _ = begun(2)
    batch = batch_of(2)
    losses = learner.eval()(batch)
    expected = binary_cross_entropy(learner.network(batch.images).logits, batch.labels, "batchmean")
    assert list(losses) == ["bce"]
    assert losses["bce"].equal(expected)


def test_later_tasks_balance_old_and_new_classes_by_their_numbers() -> None:
    learner, _ = begun(3, 1, separation=0.5, base_weight=2.0)
    batch = batch_of(4)
    losses = learner.eval()(batch)
    student = learner.network(batch.images)
    assert learner.teacher is not None
    assert learner.distillation is not None
    teacher = learner.teacher(batch.images)
    bce = binary_cross_entropy(student.logits, batch.labels, "batchmean")
    assert list(losses) == ["bce", "dkt", "separation"]
    assert torch.allclose(losses["bce"], 2 * 0.25 * bce)
    assert torch.allclose(losses["dkt"], 0.75 * learner.distillation(student.first(3), teacher, batch))
    assert learner.separation is not None
    assert torch.allclose(losses["separation"], learner.separation(student, teacher, batch))


def test_fine_tuning_has_the_base_loss_alone_and_does_not_ask_the_teacher() -> None:
    learner, stage = begun(2, 2)
    learner.phase = learner.phases(stage)[1]
    learner.teacher = None  # whoever asks it fails
    batch = batch_of(4)
    losses = learner.eval()(batch)
    expected = binary_cross_entropy(learner.network(batch.images).logits, batch.labels, "batchmean")
    assert list(losses) == ["bce"]
    assert losses["bce"].equal(expected)


@pytest.mark.parametrize("base_loss", ["cross_entropy", "balanced_cross_entropy"])
def test_cross_entropy_can_take_the_place_of_bce(base_loss: BaseLoss) -> None:
    learner, stage = begun(2, 2, base_loss=base_loss)
    labels = torch.tensor([0, 1, 2, 2, 2, 3, 3, 3])
    learner.remember(torch.arange(8), labels)
    batch = batch_of(4)
    learner.eval()
    scores = learner.network(batch.images).logits
    plain = F.cross_entropy(scores, batch.labels)
    shares = torch.tensor([1, 1, 3, 3]) / 8
    weighted = shares * scores.exp()
    balanced = -torch.log(weighted[torch.arange(len(scores)), batch.labels] / weighted.sum(dim=1)).mean()
    losses = learner(batch)
    assert list(losses) == [base_loss, "dkt", "separation"]
    expected = balanced if base_loss == "balanced_cross_entropy" else plain
    assert torch.allclose(losses[base_loss], 0.5 * expected)
    learner.phase = learner.phases(stage)[1]  # the memory is balanced
    assert torch.allclose(learner(batch)[base_loss], plain)


def test_classes_of_equal_shares_have_the_plain_cross_entropy() -> None:
    logits, labels = torch.randn(5, 4), torch.arange(5) % 4
    found = balanced_cross_entropy(logits, labels, torch.full((4,), 7))
    assert torch.allclose(found, F.cross_entropy(logits, labels))
    absent = balanced_cross_entropy(logits[:3], labels[:3], torch.tensor([7, 7, 7, 0]))
    assert torch.allclose(absent, F.cross_entropy(logits[:3, :3], labels[:3]))


def test_a_reduction_of_bce_without_bce_is_refused() -> None:
    with pytest.raises(ValueError, match=r"learner\.base_reduction=mean is about bce"):
        learner_of(2, base_loss="cross_entropy", base_reduction="mean")


def test_terms_that_are_switched_off_are_not_there() -> None:
    learner, _ = begun(2, 2, separation=0.0)
    learner.distillation = None
    assert list(learner(batch_of(4))) == ["bce"]


def test_the_two_reductions_differ_by_the_number_of_classes() -> None:
    logits, labels = torch.randn(5, 7), torch.arange(5)
    mean = binary_cross_entropy(logits, labels, "mean")
    assert torch.allclose(binary_cross_entropy(logits, labels, "batchmean"), 7 * mean)
    with pytest.raises(ValueError, match="reduction must be one of batchmean, mean, found 'sum'"):
        binary_cross_entropy.__wrapped__(logits, labels, "sum")  # type: ignore[attr-defined]


@pytest.mark.parametrize("sizes", [(3, 1, 4), (1, 5), (4, 4, 1, 2)])
def test_uneven_tasks_are_learned(sizes: tuple[int, ...]) -> None:
    learner, stage = begun(*sizes)
    learner.phase = learner.phases(stage)[0]
    losses = learner(batch_of(sum(sizes), size=12))
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert learner.network.num_classes == sum(sizes)
    assert learner.network.plasticity is not None
    assert learner.network.plasticity.head.out_features == sizes[-1]


# The teacher


def test_the_teacher_is_the_network_as_it_was_before_the_task_and_stays_so() -> None:
    learner, _ = begun(2, 2)
    before = {name: value.clone() for name, value in learner.network.state_dict().items()}
    learner.end_stage(stage_of(1))
    assert learner.teacher is None
    learner.begin_stage(stage_of(2, first=4))
    assert learner.teacher is not None
    learner.train()
    optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=0.1)
    losses = learner(batch_of(6))
    learner.update(losses, optimizer, torch.amp.GradScaler("cpu", enabled=False), clip_norm=None)
    found = learner.teacher.network.state_dict()
    assert all(found[name].equal(value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in learner.teacher.parameters())


def test_a_fresh_learner_is_rebuilt_with_its_teacher() -> None:
    learner, stage = begun(3, 1, 2)
    fresh = learner_of()
    fresh.rebuild(learner.structure())
    assert fresh.structure() == learner.structure()
    assert fresh.state_dict().keys() == learner.state_dict().keys()
    fresh.load_state_dict(learner.state_dict())
    batch = batch_of(6)
    losses, expected = fresh.eval()(batch), learner.eval()(batch)
    assert losses.keys() == expected.keys()
    assert all(loss.equal(expected[name]) for name, loss in losses.items())
    assert fresh.teacher is not None
    assert not any(parameter.requires_grad for parameter in fresh.teacher.parameters())
    first, again = fresh.phases(stage), learner.phases(stage)
    assert [phase.recipe for phase in first] == [phase.recipe for phase in again]


def test_between_tasks_there_is_no_teacher_to_rebuild() -> None:
    learner, stage = begun(2, 2)
    learner.end_stage(stage)
    structure = learner.structure()
    assert (structure["network"], structure["teacher"]) == ({"task_sizes": [2, 2]}, None)
    fresh = learner_of()
    fresh.rebuild(learner.structure())
    assert fresh.teacher is None


# Switches


def test_the_release_differs_from_the_corrected_method_only_in_its_defaults() -> None:
    official = learner_of(kind=DKTOfficial)
    found = {name: getattr(official, name) for name in ("base_weight", "base_reduction", "finetune_epochs")}
    assert found == {"base_weight": 2.0, "base_reduction": "mean", "finetune_epochs": [1, 1, 10]}
    assert not official.finetune_shuffle
    assert official.finetune_drop_last
    assert official.finetune_general_token
    assert not official.finetune_frozen_in_eval
    assert learner_of(kind=DKTOfficial, finetune_shuffle=True).finetune_shuffle
    assert {learners["dkt"], learners["dkt_official"]} == {DKT, DKTOfficial}


def test_switches_without_anything_to_act_on_are_refused() -> None:
    with pytest.raises(ValueError, match="found an empty list"):
        learner_of(finetune_epochs=[])
    with pytest.raises(ValueError, match=r"no effect without learner\.incremental_batch_size"):
        learner_of(late_batch_override=True)
    other = models["resnet_cifar"]((1, 8, 8), depth=20, width=4)
    with pytest.raises(ValueError, match="needs the network with a token pool, found ResNetCifar"):
        DKT(other, None)


def test_fine_tuning_of_the_release_leaves_out_what_fills_no_whole_batch(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    run = run_tiny_in(
        tmp_path_factory.mktemp("runs"), "learner.finetune_batch_size=16", learner="dkt_official", report=False
    )
    epochs = [event for event in facts_of(run) if event["event"] == "epoch"]
    shown = [event["num_images"] for event in epochs if event["phase"] == "finetuning"]
    assert shown == [16, 16]  # of 24 exemplars
