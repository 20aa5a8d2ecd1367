from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cil
from cil.checking import check
from cil.cli import compose
from cil.learners.memo import MEMO
from cil.models.network import models
from kd import WeightedSum
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
from tests.run_folders import facts_of, metrics_of
from tests.test_distributed import EXACT, assert_equal_runs, ended, launch


def learner_of(stage: int, distillation: WeightedSum | None = None, **settings: object) -> MEMO:
    """At the start of a stage, after steps in those before."""
    learner = MEMO(network_of(), distillation, **settings)  # type: ignore[arg-type]
    in_stage(learner, stage)
    return learner


@pytest.mark.parametrize("train_base", [True, False])
def test_the_losses_are_those_of_the_features_on_shared_maps(train_base: bool) -> None:
    learner = learner_of(2, train_base=train_base).eval()
    network, batch = learner.network, batch_of(STAGES[2])
    backbone = network.backbone
    maps = F.relu(backbone.bn(backbone.conv(batch.images)))
    for stage in backbone.stages[:-1]:
        maps = stage(maps)
    each = [copy(maps).mean((2, 3)) for copy in network.copies.each]
    assert len(each) == 3
    losses = learner(batch)
    assert list(losses) == ["ce", "aux"]
    torch.testing.assert_close(losses["ce"], F.cross_entropy(network.head(torch.cat(each, dim=1)), batch.labels))
    assert network.auxiliary is not None
    expected = F.cross_entropy(network.auxiliary(each[-1]), torch.tensor([0, 0, 0, 0, 1, 2]))
    torch.testing.assert_close(losses["aux"], expected)


@pytest.mark.parametrize("train_base", [True, False])
def test_a_step_moves_the_newest_copy_and_the_shared_stages_if_they_learn(train_base: bool) -> None:
    learner = learner_of(2, train_base=train_base)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    step(learner, batch_of(STAGES[2]))
    after = learner.state_dict()
    still = {name for name in before if after[name].equal(before[name])}
    frozen = {name for name in before if ".each.0." in name or ".each.1." in name}
    if not train_base:
        frozen |= {name for name in before if name.startswith("network.backbone.") and ".each." not in name}
    assert still == frozen


def test_the_shared_stages_learn_in_the_first_task_in_any_case() -> None:
    learner = learner_of(0, train_base=False)
    before = learner.network.backbone.conv.weight.detach().clone()  # type: ignore[union-attr]
    step(learner, batch_of(STAGES[0]))
    assert not learner.network.backbone.conv.weight.equal(before)  # type: ignore[union-attr]


def test_gradients_reach_the_shared_stages_through_old_copies_too() -> None:
    learner = learner_of(1, aux_weight=0.0)
    with torch.no_grad():
        learner.network.head.weight[:, 8:] = 0  # of the newest copy
    losses = learner(batch_of(STAGES[1]))
    (gradient,) = torch.autograd.grad(losses["ce"], learner.network.backbone.conv.weight)  # type: ignore[union-attr]
    assert gradient.any()


@pytest.mark.parametrize("train_base", [True, False])
def test_the_old_network_is_asked_only_if_it_may_say_something_else(
    monkeypatch: pytest.MonkeyPatch, train_base: bool
) -> None:
    learner = learner_of(1, distillation_of("kd"), train_base=train_base)
    batch = batch_of(STAGES[1])
    step(learner, batch)
    assert learner.teacher is not None
    expected = learner.teacher(batch.images)
    asked = []
    original = learner.teacher.forward
    monkeypatch.setattr(learner.teacher, "forward", lambda images: asked.append(1) or original(images))
    student = learner.network(batch.images)
    assert learner.distillation is not None
    term = learner.distillation.terms(student.first(2), expected, batch)["kd"]
    assert learner(batch)["kd"].equal(term)
    assert len(asked) == train_base


@pytest.mark.parametrize("method", METHODS)
def test_every_distillation_method_teaches_it(method: str) -> None:
    assert_method_teaches(lambda terms: MEMO(network_of(), terms), method)


@pytest.mark.parametrize("train_base", [True, False])
def test_a_rebuilt_learner_goes_on_to_the_bit(train_base: bool) -> None:
    learner = learner_of(2, distillation_of("cat_kd"), train_base=train_base)
    step(learner, batch_of(STAGES[2]))
    fresh = MEMO(network_of(), distillation_of("cat_kd"), train_base=train_base)
    assert_goes_on_as_rebuilt(learner, fresh, STAGES[2], learner.phases(STAGES[2]))


@pytest.mark.parametrize(
    ("network", "found"),
    [("wrn", "WideResNetBackbone: use model=resnet32, .* or learner=der"), ("dkt", "DKTNetwork: use model=resnet32")],
)
def test_a_network_without_a_last_stage_is_refused(network: str, found: str) -> None:
    with pytest.raises(ValueError, match=rf"learner=memo copies the .*, found {found}"):
        MEMO(models[network]((1, 8, 8)))


def test_a_term_that_differentiates_through_stages_that_rest_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kd=at_gradient differentiates .* learner\.train_base=false holds .*: set"):
        MEMO(network_of(), distillation_of("at_gradient"), train_base=False)


def test_the_published_recipe_composes() -> None:
    published = ["model=resnet32", "optim=sgd", "optim.epochs=170", "optim.schedule.milestones=[80,120,150]"]
    config = check(compose(["learner=memo", *published]))
    assert config.learner.parameters == {"aux_weight": 1.0, "align": True, "train_base": True}


def test_the_network_grows_by_a_last_stage_and_what_a_run_has_learned_is_loaded(whole_run: RunTiny) -> None:
    run = whole_run(*SMALL, learner="memo")
    sizes = [event["num_parameters"] for event in facts_of(run) if event["event"] == "stage_started"]
    model = cil.load(run)
    last = sum(parameter.numel() for parameter in model.network.get_submodule("backbone.stages.2.each.0").parameters())
    assert last < sizes[2] - sizes[1] < 1.1 * last
    assert model.logits(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 6)


def test_it_forgets_less_than_training_on_each_task_alone(whole_run: RunTiny) -> None:
    run = whole_run(*DIGITS, learner="memo")
    found, alone = metrics_of(run), metrics_of(whole_run(*DIGITS, learner="finetune"))
    assert found["last_accuracy"] > alone["last_accuracy"] + 0.3
    assert losses_of(run) == [["ce"]] * 6 + [["ce", "aux"]] * 12


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (*SMALL, "kd=kd", "learner.train_base=false")
    # every task saves after two epochs and at its end; interrupted from the second task on
    assert_interruptions_leave_no_trace(monkeypatch, tmp_path, *settings, learner="memo", first=3 + 1, num_more=2 + 3)


@pytest.mark.slow
@pytest.mark.parametrize("train_base", ["true", "false"])
def test_two_processes_train_what_one_trains(tmp_path: Path, train_base: str) -> None:
    settings = (*EXACT, *SMALL, "kd=kd", f"learner.train_base={train_base}", "optim.batch_size=61")
    alone = run_tiny_in(tmp_path / "one", *settings, learner="memo", report=False)
    code, _, errors = ended(launch(2, tmp_path / "two", *settings, learner="memo"))
    assert code == 0, errors
    assert_equal_runs(alone, tmp_path / "two" / "run")
