"""Phases, losses and runs of DyTox; its losses and gradients are compared with published arrays by tests.parity."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from cil import checkpoint
from cil.checking import check
from cil.cli import compose, config_folder
from cil.learners.base import learners
from cil.learners.dkt_losses import binary_cross_entropy
from cil.learners.dytox import DyTox
from cil.models.dytox import DyToxNetwork
from cil.models.network import models
from cil.optim import Recipe, Sampling, Schedule
from cil.stages import Phase, Stage
from kd import Batch, WeightedSum
from kd.logit.kd import KD
from tests.conftest import RunTiny, run_tiny_in
from tests.run_folders import facts_of, metrics_of, weights_of
from tests.test_distributed import EXACT, assert_equal_runs, ended, launch
from tests.test_resume import INTERRUPTED, assert_as_if_nothing_happened, interrupt

RECIPE = Recipe(
    lr=1e-3,
    lr_reference_batch=64,
    batch_size=128,
    epochs=7,
    initial_epochs=9,
    schedule=Schedule(warmup_epochs=2),
    sampling=Sampling(views=3, round_to=256, drop_last=True),
)
#: As small as the network of DKT in `tests.conftest.SMALL_DKT`.
SMALL = (
    *("model=dytox_tiny", "model.width=16", "model.num_heads=2", "model.depth=1", "model.mlp_ratio=1"),
    "learner.finetune_epochs=2",
)


def learner_of(*, distils: bool = True, **settings: Any) -> DyTox:
    torch.manual_seed(0)
    network = DyToxNetwork((1, 8, 8), width=8, num_heads=2, depth=2, patch_size=4, mlp_ratio=1)
    term = {"dytox": (1.0, KD(temperature=1.0, reduction="mean"))}
    return DyTox(network, WeightedSum(term) if distils else None, **settings)


def begun(*task_sizes: int, **settings: Any) -> tuple[DyTox, Stage]:
    """A learner in the last of some tasks, in evaluation mode and away from its teacher, and that stage."""
    learner, first = learner_of(**settings), 0
    for index, size in enumerate(task_sizes):
        if index:
            learner.end_stage(stage)
        stage = Stage(index, range(first, first + size), RECIPE, has_memory=True)
        learner.begin_stage(stage)
        first += size
    with torch.no_grad():
        for parameter in learner.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    learner.phase = learner.phases(stage)[0]
    return learner.eval(), stage


def batch_of(num_classes: int, size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(size) % num_classes
    return Batch(torch.randn(size, 1, 8, 8, generator=generator), labels, torch.arange(size))


def frozen_names(learner: DyTox, phase: Phase) -> set[str]:
    parts = [part.parameters() if isinstance(part, nn.Module) else [part] for part in phase.frozen]
    held = {id(parameter) for part in parts for parameter in part}
    return {name for name, parameter in learner.network.named_parameters() if id(parameter) in held}


def names_below(learner: DyTox, *beginnings: str) -> set[str]:
    return {name for name, _ in learner.network.named_parameters() if name.startswith(beginnings)}


# Phases


def test_the_first_task_has_one_phase_on_the_new_data() -> None:
    learner, stage = begun(2)
    (phase,) = learner.phases(stage)
    assert (phase.name, phase.source, list(phase.frozen)) == ("training", "new", [])
    assert (phase.recipe, phase.recipe.epochs) == (RECIPE.for_task(0), 9)


def test_later_tasks_leave_old_tokens_and_classifiers_alone_and_then_fine_tune_what_is_behind_the_encoder() -> None:
    learner, stage = begun(2, 3, 2)
    main, finetuning = learner.phases(stage)
    assert (main.name, main.source, main.recipe) == ("training", "new+memory", RECIPE)
    assert frozen_names(learner, main) == names_below(learner, "task_tokens.0", "task_tokens.1", "heads.0.", "heads.1.")
    assert (finetuning.name, finetuning.source, finetuning.recipe.epochs) == ("finetuning", "memory", 20)
    assert finetuning.recipe.peak_lr == pytest.approx(5e-5 * 128 / 64)
    assert finetuning.recipe.schedule == Schedule(name="constant")
    assert finetuning.recipe.sampling == Sampling()  # whole and shuffled, without repeated views
    assert finetuning.frozen_in_eval
    expected = names_below(learner, "patch_embedding.", "position", "encoder.", "divergence.")
    assert frozen_names(learner, finetuning) == expected


def test_the_switches_of_fine_tuning_reach_its_phase() -> None:
    switches = {"finetune_shuffle": False, "finetune_drop_last": True, "finetune_frozen_in_eval": False}
    settings = {
        "finetune_batch_size": 32,
        "finetune_lr": 1e-3,
        "finetune_epochs": [3, 4],
        "finetune_task_tokens": False,
    }
    learner, stage = begun(2, 3, **switches, **settings)
    finetuning = learner.phases(stage)[1]
    assert finetuning.recipe.sampling == Sampling(shuffle=False, drop_last=True)
    assert (finetuning.batch_size, finetuning.recipe.peak_lr, finetuning.recipe.epochs) == (32, 5e-4, 3)
    assert not finetuning.frozen_in_eval
    assert names_below(learner, "task_tokens.") <= frozen_names(learner, finetuning)


def test_asking_for_the_phases_changes_nothing_and_works_before_the_network_has_grown() -> None:
    learner, stage = begun(2, 2)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    assert learner.phases(stage)[1].recipe == learner.phases(stage)[1].recipe
    assert all(value.equal(before[name]) for name, value in learner.state_dict().items())
    for index in range(5):
        learner_of().phases(Stage(index, range(2 * index, 2 * index + 2), RECIPE, has_memory=True))


@pytest.mark.parametrize(("settings", "memory"), [({}, False), ({"finetune_epochs": 0}, True)])
def test_without_memory_or_epochs_there_is_no_fine_tuning(settings: dict[str, Any], memory: bool) -> None:
    learner, _ = begun(2, 2, **settings)
    assert [phase.name for phase in learner.phases(Stage(1, range(2, 4), RECIPE, memory))] == ["training"]


# Losses


def test_the_first_task_has_the_base_loss_alone() -> None:
    learner, _ = begun(2)
    batch = batch_of(2)
    losses = learner(batch)
    assert list(losses) == ["bce"]
    assert losses["bce"].equal(binary_cross_entropy(learner.network(batch.images).logits, batch.labels))


@pytest.mark.parametrize("base_reduction", ["mean", "batchmean"])
def test_later_tasks_balance_old_and_new_classes_by_their_numbers_and_tell_them_apart(base_reduction: Any) -> None:
    learner, _ = begun(3, 1, divergence=0.5, base_reduction=base_reduction)
    batch = batch_of(4)
    losses = learner(batch)
    student, teacher = learner.network(batch.images), learner.teacher(batch.images)  # type: ignore[misc]
    one_hot = F.one_hot(batch.labels, 4).float()
    bce = F.binary_cross_entropy_with_logits(student.logits, one_hot)
    kl = (teacher.logits.softmax(1) * (teacher.logits.log_softmax(1) - student.logits[:, :3].log_softmax(1))).sum()
    told = F.one_hot((batch.labels == 3).long(), 2).float()
    divergence = F.binary_cross_entropy_with_logits(learner.network.divergence(student.embedding), told)  # type: ignore[misc]
    factor = {"mean": (1, 1), "batchmean": (4, 2)}[base_reduction]
    assert list(losses) == ["bce", "dytox", "divergence"]
    torch.testing.assert_close(losses["bce"], factor[0] * 0.25 * bce)
    torch.testing.assert_close(losses["dytox"], 0.75 * kl / (6 * 3))
    torch.testing.assert_close(losses["divergence"], factor[1] * 0.5 * divergence)


def test_without_distillation_and_divergence_it_is_plain_cross_entropy() -> None:
    learner, stage = begun(3, 1, distils=False, divergence=0.0)
    batch = batch_of(4)
    losses = learner(batch)
    assert learner.teacher is None
    assert list(losses) == ["bce"]
    assert losses["bce"].equal(binary_cross_entropy(learner.network(batch.images).logits, batch.labels))
    assert names_below(learner, "divergence.") <= frozen_names(learner, learner.phases(stage)[0])


def test_the_divergence_head_needs_no_teacher() -> None:
    learner, _ = begun(3, 1, distils=False)
    assert list(learner(batch_of(4))) == ["bce", "divergence"]


def test_fine_tuning_has_the_base_loss_alone_and_does_not_ask_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, stage = begun(2, 2)
    learner.phase = learner.phases(stage)[1]
    monkeypatch.setattr(learner.teacher, "forward", lambda images: pytest.fail("asked"))
    batch = batch_of(4)
    losses = learner(batch)
    assert list(losses) == ["bce"]
    assert losses["bce"].equal(binary_cross_entropy(learner.network(batch.images).logits, batch.labels))


def test_divergence_teaches_the_newest_token_and_no_other() -> None:
    learner, _ = begun(2, 2, 2)
    learner(batch_of(6))["divergence"].backward()
    gradients = [token.grad for token in learner.network.task_tokens]
    assert [gradient is not None and bool(gradient.any()) for gradient in gradients] == [False, False, True]
    assert all(parameter.grad is None for parameter in learner.network.heads.parameters())


def test_an_equal_teacher_has_nothing_to_teach() -> None:
    learner = learner_of().eval()
    for index, labels in enumerate((range(3), range(3, 5))):
        learner.begin_stage(Stage(index, labels, RECIPE, has_memory=True))
    learner.eval()
    assert float(learner(batch_of(5))["dytox"].detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sizes", [(3, 1, 4), (1, 5), (4, 4, 1, 2)])
def test_uneven_tasks_are_learned(sizes: tuple[int, ...]) -> None:
    learner, _ = begun(*sizes)
    losses = learner.train()(batch_of(sum(sizes), size=12))
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert learner.network.divergence is not None
    assert learner.network.divergence.head.out_features == 1 + sizes[-1]


# Settings


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"finetune_epochs: found an empty list"):
        learner_of(finetune_epochs=[])
    other = models["resnet_cifar"]((1, 8, 8), depth=20, width=4)
    with pytest.raises(ValueError, match=r"learner=dytox needs .*, found ResNetCifar: use model=dytox"):
        DyTox(other, None)
    assert learners["dytox"] is DyTox


def test_the_file_names_every_parameter_with_its_default() -> None:
    listed = yaml.safe_load((config_folder() / "learner" / "dytox.yaml").read_text())["learner"]
    parameters = inspect.signature(DyTox).parameters.values()
    assert listed == {"name": "dytox"} | {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_the_published_recipe_composes() -> None:
    published = ["model=dytox", "optim=dkt", "optim.batch_size=256", "optim.lr_reference_batch=512"]
    config = check(compose(["learner=dytox", *published]))
    assert (config.optim.peak_lr, config.optim.epochs, config.optim.weight_decay) == (2.5e-4, 500, 1e-6)
    assert (config.kd["dytox"]["temperature"], config.kd["dytox"]["reduction"]) == (1.0, "mean")
    assert config.model.parameters["num_heads"] == 12


# Runs


def test_old_tokens_and_classifiers_keep_their_bits_in_the_main_phase(run_tiny: RunTiny) -> None:
    settings = (*SMALL, "learner.finetune_epochs=0", "scenario.classes=4", "optim.epochs=1")
    weights = weights_of(run_tiny(*settings, learner="dytox", report=False))
    for name in ("task_tokens.0", "heads.0.norm.weight", "heads.0.head.weight", "heads.0.head.bias"):
        assert weights[f"stage_001/{name}"].equal(weights[f"stage_000/{name}"])
    moved = "encoder.0.mlp.fc1.weight"
    assert not weights[f"stage_001/{moved}"].equal(weights[f"stage_000/{moved}"])


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(runs_dir: str, code: int = 0) -> Path:
        settings = (*SMALL, "scenario.classes=4")
        return run_tiny_in(tmp_path / runs_dir, *settings, learner="dytox", code=code, report=False)

    for _ in range(3 + 5):  # saves: two epochs of each phase, and the end of the task
        with monkeypatch.context() as patch:
            interrupt(patch, checkpoint, "save_state", 1, after=True, what=KeyboardInterrupt)
            run("stopped", INTERRUPTED)
    assert_as_if_nothing_happened(run("stopped"), run("whole"))


@pytest.mark.parametrize("learner", ["replay", "finetune", "joint"])
def test_other_learners_train_the_network_too(run_tiny: RunTiny, learner: str) -> None:
    model = [word for word in SMALL if word.startswith("model")]
    run = run_tiny(*model, "scenario.classes=4", "optim.epochs=1", learner=learner, report=False)
    assert metrics_of(run)["finished"]


def test_it_forgets_less_than_training_on_each_task_alone(tmp_path: Path) -> None:
    settings = ("model=dytox_tiny", "model.depth=1", "scenario.classes=4", "optim.epochs=20", "memory.size=80")
    finetuning = ("learner.finetune_lr=2e-3", "learner.finetune_batch_size=20")
    run = run_tiny_in(tmp_path / "dytox", *settings, *finetuning, learner="dytox", report=False)
    alone = run_tiny_in(tmp_path / "alone", *settings, learner="finetune", report=False)
    assert metrics_of(run)["last_accuracy"] > metrics_of(alone)["last_accuracy"] + 0.2
    losses = [list(event["losses"]) for event in facts_of(run) if event["event"] == "epoch"]
    assert losses == [["bce"]] * 20 + [["bce", "dytox", "divergence"]] * 20 + [["bce"]] * 20


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(tmp_path: Path) -> None:
    settings = (*EXACT, *SMALL, "optim.batch_size=61")
    alone = run_tiny_in(tmp_path / "one", *settings, learner="dytox", report=False)
    code, _, errors = ended(launch(2, tmp_path / "two", *settings, learner="dytox"))
    assert code == 0, errors
    assert_equal_runs(alone, tmp_path / "two" / "run")
