from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cil
from cil.checking import check
from cil.cli import compose
from cil.config import ConfigError
from cil.learners.der import DER
from cil.models.network import models
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
    in_stage,
    losses_of,
    network_of,
    step,
)
from tests.conftest import RunTiny, run_tiny_in
from tests.run_folders import assert_same_weights, facts_of, metrics_of, weights_of
from tests.test_distributed import EXACT, assert_equal_runs, ended, launch


def learner_of(stage: int, distillation: WeightedSum | None = None, **settings: object) -> DER:
    """At the start of a stage, after steps in those before."""
    learner = DER(network_of(), distillation, **settings)  # type: ignore[arg-type]
    in_stage(learner, stage)
    return learner


def test_the_auxiliary_head_tells_the_new_classes_from_each_other_and_from_all_old_ones() -> None:
    learner = learner_of(2, aux_weight=0.5).eval()
    batch = batch_of(STAGES[2])
    assert batch.labels.tolist() == [0, 1, 2, 3, 4, 5]
    outputs = learner.network(batch.images)
    newest = outputs.embedding[:, 16:]  # width 8 of each of three backbones
    head = learner.network.auxiliary
    assert head is not None
    assert head.out_features == 3
    losses = learner(batch)
    assert list(losses) == ["ce", "aux"]
    assert losses["ce"].equal(F.cross_entropy(outputs.logits, batch.labels))
    expected = F.cross_entropy(head(newest), torch.tensor([0, 0, 0, 0, 1, 2]))
    torch.testing.assert_close(losses["aux"], 0.5 * expected)


def test_the_first_task_is_plain_cross_entropy() -> None:
    learner = learner_of(0).eval()
    batch = batch_of(STAGES[0])
    losses = learner(batch)
    assert list(losses) == ["ce"]
    assert losses["ce"].equal(F.cross_entropy(learner.network(batch.images).logits, batch.labels))


def test_without_weight_there_is_no_auxiliary_head() -> None:
    learner = learner_of(1, aux_weight=0.0)
    assert learner.network.auxiliary is None
    assert list(learner(batch_of(STAGES[1]))) == ["ce"]


def test_a_step_leaves_old_backbones_alone_and_moves_all_else() -> None:
    learner = learner_of(2)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    step(learner, batch_of(STAGES[2]))
    after = learner.state_dict()
    still = {name for name in before if after[name].equal(before[name])}
    frozen = {name for name in before if ".each.0." in name or ".each.1." in name}
    assert still == frozen


@pytest.mark.parametrize("align", [True, False])
def test_the_rows_are_aligned_at_the_end_of_every_task_but_the_first(align: bool) -> None:
    learner = learner_of(1, align=align)
    with torch.no_grad():
        learner.network.head.weight[2:] *= 5
    before = learner.network.head.weight.detach().clone()
    learner.end_stage(STAGES[0])
    assert learner.network.head.weight.equal(before)
    learner.end_stage(STAGES[1])
    norms = learner.network.head.weight.detach().norm(dim=1)
    if align:
        torch.testing.assert_close(norms[2:].mean(), norms[:2].mean())
    assert learner.network.head.weight.equal(before) != align


def test_the_old_network_is_kept_for_distillation_alone() -> None:
    assert learner_of(1).teacher is None
    learner = learner_of(1, distillation_of("kd"))
    assert learner.teacher is not None
    assert list(learner(batch_of(STAGES[1]))) == ["ce", "aux", "kd"]
    learner.end_stage(STAGES[1])
    assert learner.teacher is None


def test_what_the_old_network_says_is_a_part_of_what_is_said_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(1, distillation_of("kd"))
    batch = batch_of(STAGES[1])
    step(learner, batch)
    assert learner.teacher is not None
    teacher = learner.teacher(batch.images)
    monkeypatch.setattr(learner.teacher, "forward", lambda images: pytest.fail("asked"))
    student = learner.network(batch.images)
    assert learner(batch)["kd"].equal(KD()(student.first(2), teacher, batch))


@pytest.mark.parametrize("method", METHODS)
def test_every_distillation_method_teaches_it(method: str) -> None:
    assert_method_teaches(lambda terms: DER(network_of(), terms), method)


@pytest.mark.parametrize("method", [None, "fitnet", "crd"])
def test_a_rebuilt_learner_goes_on_to_the_bit(method: str | None) -> None:
    def fresh() -> DER:
        return DER(network_of(), None if method is None else distillation_of(method))

    learner = fresh()
    in_stage(learner, 2)
    step(learner, batch_of(STAGES[2]))
    assert_goes_on_as_rebuilt(learner, fresh(), STAGES[2], learner.phases(STAGES[2]))


def test_a_network_without_a_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"learner=der copies the backbone .*, found DKTNetwork: use model=resnet32"):
        DER(models["dkt"]((1, 8, 8)))


def test_a_run_without_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"learner=der replays exemplars and memory\.size is 0"):
        check(compose(["learner=der", "model=resnet32", "memory.size=0"]))


def test_the_published_recipe_composes() -> None:
    published = ["model=resnet32", "optim=sgd", "optim.epochs=170", "optim.schedule.milestones=[80,120,150]"]
    config = check(compose(["learner=der", *published]))
    assert (config.optim.initial_epochs, config.optim.weight_decay, config.kd) == (200, 2e-4, {})
    assert config.learner.parameters == {"aux_weight": 1.0, "align": True}


def test_the_first_task_is_that_of_replay_to_the_bit_and_its_backbone_stays(whole_run: RunTiny) -> None:
    run = whole_run(*SMALL, learner="der")
    found, expected = weights_of(run), weights_of(whole_run(*SMALL, learner="replay"))
    first = {name.replace("each.0.", ""): value for name, value in found.items() if name.startswith("stage_000")}
    assert_same_weights(first, {name: value for name, value in expected.items() if name.startswith("stage_000")})
    for task in range(3):
        backbone = f"backbone.each.{task}."
        then, now = (
            {name.split("/")[1]: value for name, value in found.items() if name.startswith(f"stage_00{s}/{backbone}")}
            for s in (task, 2)
        )
        assert then
        assert_same_weights(now, then)
    sizes = [event["num_parameters"] for event in facts_of(run) if event["event"] == "stage_started"]
    assert sizes[2] - sizes[1] > 0.9 * sizes[0]


def test_what_a_run_has_learned_is_loaded(whole_run: RunTiny) -> None:
    model = cil.load(whole_run(*SMALL, learner="der"))
    assert model.logits(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 6)
    assert model.network.structure() == {"task_sizes": [2, 2, 2], "num_copies": 3}


def test_it_forgets_less_than_training_on_each_task_alone(whole_run: RunTiny) -> None:
    run = whole_run(*DIGITS, learner="der")
    found, alone = metrics_of(run), metrics_of(whole_run(*DIGITS, learner="finetune"))
    assert found["last_accuracy"] > alone["last_accuracy"] + 0.3
    assert losses_of(run) == [["ce"]] * 6 + [["ce", "aux"]] * 12


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (*SMALL, "kd=fitnet", "kd.fitnet.weight=1")
    # every task saves after two epochs and at its end; interrupted from the second task on
    assert_interruptions_leave_no_trace(monkeypatch, tmp_path, *settings, learner="der", first=3 + 1, num_more=2 + 3)


@pytest.mark.slow
@pytest.mark.parametrize("kd", ["none", "kd", "at"])
def test_two_processes_train_what_one_trains(tmp_path: Path, kd: str) -> None:
    settings = (*EXACT, *SMALL, f"kd={kd}", "optim.batch_size=61")
    alone = run_tiny_in(tmp_path / "one", *settings, learner="der", report=False)
    code, _, errors = ended(launch(2, tmp_path / "two", *settings, learner="der"))
    assert code == 0, errors
    assert_equal_runs(alone, tmp_path / "two" / "run")
