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
from cil.build import make_distillation, make_learner, make_network
from cil.cam import tapped
from cil.checking import check
from cil.cli import compose
from cil.config import ConfigError
from cil.learners.podnet import PODNet, nca, pod_spatial, pooled
from cil.loading import load
from cil.models.network import BackboneNetwork, models
from cil.optim import Recipe, make_optimizer
from cil.stages import Stage
from kd import Batch, WeightedSum
from kd.feature.at import AT
from kd.logit.kd import KD
from tests.conftest import RunTiny, run_tiny_in
from tests.run_folders import assert_same_weights, facts_of, metrics_of, weights_of
from tests.test_distributed import EXACT, assert_equal_runs, ended, launch
from tests.test_resume import INTERRUPTED, assert_as_if_nothing_happened, interrupt

TINY_RESNET = ("model=resnet32", "model.depth=8", "model.width=4", "scenario.classes=4", "optim.epochs=1")
#: What learns digits in a few steps: 2 tasks of 2.
LEARNING = ("model=resnet32", "model.depth=20", "model.width=8", "scenario.classes=4", "optim=sgd")
LEARNING += ("optim.epochs=10", "optim.initial_epochs=10", "optim.batch_size=32", "optim.schedule.milestones=[7]")
QUICK = ("learner.finetune_part=head", "learner.finetune_lr=0.1")
SGD = Recipe(optimizer="sgd", lr=0.1, lr_reference_batch=None, momentum=0.9, weight_decay=0.1, epochs=4, batch_size=8)
FIRST = Stage(0, range(3), SGD, has_memory=True)
SECOND = Stage(1, range(3, 5), SGD, has_memory=True)
BATCH = Batch(torch.rand(6, 1, 8, 8), torch.tensor([0, 4, 2, 3, 4, 1]), torch.arange(6))
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
ONE = torch.tensor(1.0)


def learner_of(distillation: WeightedSum | None = None, **switches: object) -> PODNet:
    torch.manual_seed(0)
    network = models["resnet_cifar"]((1, 8, 8), depth=8, width=4)
    return PODNet(network, distillation, **switches)  # type: ignore[arg-type]


def in_second_task(distillation: WeightedSum | None = None, **switches: object) -> PODNet:
    """With a teacher of other weights."""
    learner = learner_of(distillation, **switches)
    learner.begin_stage(FIRST)
    learner.begin_stage(SECOND)
    with torch.no_grad():
        for parameter in learner.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return learner


def train(learner: PODNet, name: str, batches: list[Batch]) -> None:
    """A phase of the second task as the engine trains it."""
    (phase,) = (phase for phase in learner.phases(SECOND) if phase.name == name)
    learner.phase = phase
    learner.network.requires_grad_(True)
    learner.train()
    for item in phase.frozen:
        item.requires_grad_(False)
        if isinstance(item, nn.Module):
            item.eval()
    optimizer = make_optimizer(learner, phase.recipe)
    for batch in batches:
        learner.update(learner(batch), optimizer, NO_SCALER, None)


def moved(learner: PODNet, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in learner.network.state_dict().items() if not value.equal(before[name])}


# Losses


def test_the_margin_is_taken_from_the_true_class_which_is_no_part_of_the_sum() -> None:
    scores, labels = torch.tensor([[2.0, 1.0, 0.5], [3.0, 0.0, 9.0]]), torch.tensor([0, 2])
    first = -(2.0 - 4 * 0.6) + math.log(math.exp(1.0) + math.exp(0.5))
    # the second sample is right by far, and the loss is cut at 0
    assert float(nca(scores, labels, torch.tensor(4.0))) == pytest.approx((first + 0) / 2)
    assert float(nca(scores[:1], labels[:1], torch.tensor(1.0), margin=0.6)) == pytest.approx(first - 3 * 0.6, abs=1e-6)


def test_two_classes_are_a_hinge_on_their_difference() -> None:
    """With one other class the logarithm of the sum is its score."""
    scores, labels = torch.randn(20, 2), torch.randint(2, (20,))
    true, other = scores.gather(1, labels[:, None])[:, 0], scores.gather(1, 1 - labels[:, None])[:, 0]
    torch.testing.assert_close(nca(scores, labels, ONE), (other - true + 0.6).clamp(min=0).mean())


def test_one_class_has_nothing_near_to_it() -> None:
    scores = torch.randn(4, 1, requires_grad=True)
    for variant in ("paper", "released"):
        loss = nca(scores, torch.zeros(4).long(), ONE, variant=variant)
        assert loss == 0
        assert not torch.autograd.grad(loss, scores)[0].any()


def test_the_release_is_cross_entropy_where_the_prediction_is_right() -> None:
    """The largest score is then that of the true class, whose exponential is 1 with its own or with e^0."""
    scores = torch.randn(30, 5)
    labels = scores.argmax(dim=1)
    torch.testing.assert_close(nca(scores, labels, ONE, variant="released"), F.cross_entropy(scores, labels))


def test_the_release_where_the_prediction_is_wrong() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.5]])
    expected = 1.0 + math.log(1 + 1 + math.exp(0.5 - 2.0))  # the true class would have been e^(1 - 2) in the sum
    assert float(nca(scores, torch.tensor([1]), ONE, variant="released")) == pytest.approx(expected)


@given(st.floats(-5, 5), st.floats(0, 1))
@settings(max_examples=10)
def test_only_differences_of_scores_count_and_in_the_release_no_margin(shift: float, margin: float) -> None:
    torch.manual_seed(1)
    scores, labels = torch.randn(6, 4), torch.randint(4, (6,))
    for variant in ("paper", "released"):
        found = nca(scores + shift, labels, ONE, margin=margin, variant=variant)
        torch.testing.assert_close(found, nca(scores, labels, ONE, margin=margin, variant=variant))
    released = nca(scores, labels, ONE, margin=margin, variant="released")
    assert released.equal(nca(scores, labels, ONE, margin=0.0, variant="released"))


def test_the_scale_learns_from_the_margin_only_if_asked_for() -> None:
    """With two classes and the margin not reached, the gradient pushes the scale towards 0 until nothing is learned."""
    cosines, labels = torch.tensor([[0.3, 0.1], [0.0, 0.2]]), torch.tensor([0, 1])
    found = {}
    for sees in (False, True):
        scale = torch.tensor(2.0, requires_grad=True)
        loss = nca(scale * cosines, labels, scale, scale_sees_margin=sees)
        found[sees] = float(loss.detach()), float(torch.autograd.grad(loss, scale)[0])
    assert found[False] == pytest.approx((2 * (-0.2 + 0.6), -0.2))
    assert found[True] == pytest.approx((2 * (-0.2 + 0.6), -0.2 + 0.6))


def test_maps_are_pooled_along_both_axes() -> None:
    maps = torch.tensor([[[[1.0, -2.0, 0.0], [0.0, 0.0, 2.0]]]])
    rows_and_columns = torch.tensor([[5.0, 4.0, 1.0, 4.0, 4.0]])
    torch.testing.assert_close(pooled(maps), rows_and_columns / rows_and_columns.norm())


def test_the_distance_of_maps_is_the_mean_over_batch_and_stages() -> None:
    ours = [torch.randn(3, 2, 4, 5), torch.randn(3, 6, 2, 3)]
    theirs = [torch.randn(3, 2, 4, 5), torch.randn(3, 6, 2, 3)]
    each = [(pooled(a) - pooled(b)).norm(dim=1).mean() for a, b in zip(ours, theirs, strict=True)]
    torch.testing.assert_close(pod_spatial(ours, theirs), (each[0] + each[1]) / 2)


@given(st.floats(0.1, 10))
@settings(max_examples=10)
def test_equal_maps_of_any_length_have_no_distance_and_no_gradient(factor: float) -> None:
    maps = torch.randn(2, 3, 4, 4, requires_grad=True)
    torch.testing.assert_close(pod_spatial([maps * factor], [maps]), torch.tensor(0.0), atol=1e-6, rtol=0)
    loss = pod_spatial([maps], [maps.detach().clone()])
    assert loss == 0
    assert torch.autograd.grad(loss, maps)[0].isfinite().all()


def test_terms_are_weighted_as_published() -> None:
    learner = in_second_task(pod_flat=2.0).eval()
    assert learner.teacher is not None
    losses = learner(BATCH)
    student, teacher = learner.network(BATCH.images), learner.teacher(BATCH.images)
    assert list(losses) == ["nca", "pod_spatial", "pod_flat"]
    torch.testing.assert_close(losses["nca"], nca(student.logits, BATCH.labels, learner.head.eta))
    stages = ["stage0.post", "stage1.post", "stage2.post"]
    assert list(student.taps) == list(teacher.taps) == stages
    expected = pod_spatial(*([outputs.taps[name] for name in stages] for outputs in (student, teacher)))
    torch.testing.assert_close(losses["pod_spatial"], math.sqrt(5 / 2) * 5 * expected)
    flat = 1 - F.cosine_similarity(student.embedding, teacher.embedding).mean()
    torch.testing.assert_close(losses["pod_flat"], math.sqrt(5 / 2) * 2 * flat)


def test_the_first_task_has_the_classification_alone() -> None:
    batch = Batch(BATCH.images[:3], torch.tensor([0, 1, 2]), BATCH.ids[:3])
    for classification in ("nca", "ce"):
        learner = learner_of(classification=classification)
        learner.begin_stage(FIRST)
        assert list(learner.eval()(batch)) == [classification]
        assert learner.network.exposed == ()
    torch.testing.assert_close(
        learner(batch)["ce"], F.cross_entropy(learner.network(batch.images).logits, batch.labels)
    )


def test_terms_of_weight_zero_are_left_out() -> None:
    learner = in_second_task(pod_spatial=0.0)
    assert learner.network.exposed == ()
    assert list(learner(BATCH)) == ["nca", "pod_flat"]
    assert list(in_second_task(pod_flat=0.0)(BATCH)) == ["nca", "pod_spatial"]
    alone = in_second_task(pod_spatial=0.0, pod_flat=0.0)
    assert alone.teacher is None
    assert list(alone(BATCH)) == ["nca"]


def test_a_distillation_takes_the_place_of_both_terms_with_their_weight() -> None:
    learner = in_second_task(WeightedSum({"kd": (0.5, KD()), "at": (1.0, AT())})).eval()
    assert learner.teacher is not None
    losses = learner(BATCH)
    student, teacher = learner.network(BATCH.images), learner.teacher(BATCH.images)
    assert list(losses) == ["nca", "kd", "at"]
    torch.testing.assert_close(losses["kd"], math.sqrt(5 / 2) * 0.5 * KD()(student.first(3), teacher, BATCH))
    torch.testing.assert_close(losses["at"], math.sqrt(5 / 2) * AT()(student.first(3), teacher, BATCH))


def test_nothing_is_exposed_between_the_tasks() -> None:
    learner = in_second_task()
    assert learner.network.exposed == ("stage0.post", "stage1.post", "stage2.post")
    learner.end_stage(SECOND)
    assert learner.network.exposed == ()
    assert learner.teacher is None


# Phases


def test_phases_of_the_first_task_and_of_later_ones() -> None:
    learner = in_second_task()
    assert [phase.name for phase in learner.phases(FIRST)] == ["training"]
    training, finetuning = learner.phases(SECOND)
    assert (training.source, training.recipe, finetuning.source) == ("new+memory", SGD, "memory")
    assert list(training.frozen) == list(finetuning.frozen) == [learner.head.weights[0]]
    recipe = finetuning.recipe
    assert (recipe.epochs, recipe.peak_lr, recipe.schedule.name, recipe.schedule.min_lr) == (20, 0.005, "cosine", 0)
    head = in_second_task(finetune_part="head")
    assert list(head.phases(SECOND)[1].frozen) == [head.network.backbone, head.head.eta]
    assert [phase.name for phase in in_second_task(finetune_epochs=0).phases(SECOND)] == ["training"]


@pytest.mark.parametrize("name", ["training", "finetuning"])
@pytest.mark.parametrize("frozen_old", [True, False])
def test_no_bit_of_old_proxies_moves_with_weight_decay_and_momentum(name: str, frozen_old: bool) -> None:
    learner = in_second_task(frozen_old=frozen_old)
    before = copy.deepcopy(learner.network.state_dict())
    train(learner, name, [BATCH] * 3)
    found = moved(learner, before)
    assert ("head.weights.0" in found) == (not frozen_old)
    assert {"head.weights.1", "head.eta", "backbone.conv.weight"} <= found


def test_fine_tuning_of_the_head_moves_all_proxies_and_nothing_else() -> None:
    learner = in_second_task(finetune_part="head")
    before = copy.deepcopy(learner.network.state_dict())
    train(learner, "finetuning", [BATCH] * 2)
    assert list(learner(BATCH)) == ["nca"]
    assert moved(learner, before) == {"head.weights.0", "head.weights.1"}


def test_a_fresh_learner_is_rebuilt() -> None:
    learner = in_second_task()
    other = learner_of()
    other.rebuild(learner.structure())
    other.load_state_dict(learner.state_dict())
    for one in (learner, other):
        train(one, "training", [BATCH, BATCH])
    assert_same_weights(other.state_dict(), learner.state_dict())
    assert list(other(BATCH)) == ["nca", "pod_spatial", "pod_flat"]


# Configs


def plain_network() -> BackboneNetwork:
    """A backbone without maps."""
    return BackboneNetwork((1, 8, 8), nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), 6)


def test_networks_without_maps_or_without_one_embedding_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"learner=podnet compares the feature maps.*BackboneNetwork has none.*resnet32"
    ):
        PODNet(plain_network())
    with pytest.raises(ValueError, match=r"learner=podnet puts a cosine head .* found DKTNetwork: use model=resnet32"):
        PODNet(models["dkt"]((1, 8, 8)))


def test_a_network_without_maps_will_do_where_none_are_read() -> None:
    flat, distilled = (
        PODNet(plain_network(), pod_spatial=0.0),
        PODNet(plain_network(), WeightedSum({"kd": (1.0, KD())})),
    )
    for learner, term in ((flat, "pod_flat"), (distilled, "kd")):
        for stage in (FIRST, SECOND):
            learner.begin_stage(stage)
        assert list(learner(BATCH)) == ["nca", term]


def test_switches_without_anything_to_act_on_are_refused() -> None:
    with pytest.raises(ValueError, match=r"learner\.variant=released is about classification=nca and has no effect"):
        learner_of(classification="ce", variant="released")
    for switch in ({"classification": "ce"}, {"variant": "released"}):
        with pytest.raises(ValueError, match=r"learner\.scale_sees_margin is about the margin, and has no effect"):
            learner_of(scale_sees_margin=True, **switch)


def test_a_term_that_reads_class_maps_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"kd\.cat_kd does not go with learner=podnet: .*no one vector.*Use learner="):
        check(compose(["learner=podnet", "model=resnet32", "kd=cat_kd"]))


def test_terms_that_read_other_maps_are_connected() -> None:
    config = check(compose(["learner=podnet", "model=resnet32", "model.depth=8", "kd=reviewkd"]))
    learner = make_learner(config, make_network(config.model, 0, (1, 8, 8)))
    assert make_distillation(config) is not None
    learner.rehearse(config.optim)


def test_a_run_without_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"learner=podnet replays exemplars and memory\.size is 0"):
        check(compose(["learner=podnet", "model=resnet32", "memory.size=0"]))


def test_the_published_recipe_composes_and_its_file_lists_every_default() -> None:
    published = ["model=resnet32", "optim=sgd", "optim.epochs=160", "optim.initial_epochs=160"]
    published += [
        "optim.schedule.name=cosine",
        "optim.schedule.min_lr=0",
        "optim.weight_decay=5e-4",
        "memory=per_class",
    ]
    tree = compose(["learner=podnet", *published])
    config = check(tree)
    assert config.learner.parameters == {name: value for name, value in tree["learner"].items() if name != "name"}
    assert (config.kd, config.memory.size, config.optim.schedule.name) == ({}, 20, "cosine")
    learner = make_learner(config, make_network(config.model, 0, (3, 32, 32)))
    defaults = PODNet(models["resnet_cifar"]((3, 32, 32)))
    for name in config.learner.parameters:
        assert getattr(learner, name, None) == getattr(defaults, name, None)


# Runs


def test_it_forgets_less_than_training_on_each_task_alone(whole_run: RunTiny) -> None:
    run = whole_run(*LEARNING, *QUICK, learner="podnet")
    found, alone = metrics_of(run), metrics_of(whole_run(*LEARNING, learner="finetune"))
    assert found["last_accuracy"] > alone["last_accuracy"] + 0.2
    epochs = [(event["phase"], list(event["losses"])) for event in facts_of(run) if event["event"] == "epoch"]
    terms = ["nca", "pod_spatial", "pod_flat"]
    assert epochs == [("training", ["nca"])] * 10 + [("training", terms)] * 10 + [("finetuning", ["nca"])] * 20


def test_what_a_run_has_learned_is_loaded_with_its_head_and_has_no_class_maps(whole_run: RunTiny) -> None:
    model = load(whole_run(*LEARNING, *QUICK, learner="podnet"))
    assert model.logits(torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)).shape == (3, 4)
    with pytest.raises(ValueError, match=r"ResNetCifar has none, as is so of .*several vectors for a class \(podnet\)"):
        tapped(model)


@pytest.mark.parametrize("kd", ["none", "at"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, whole_run: RunTiny, monkeypatch: pytest.MonkeyPatch, kd: str
) -> None:
    switches = (*TINY_RESNET, "learner.finetune_epochs=1", f"kd={kd}", "optim.optimizer=sgd", "optim.momentum=0.9")
    whole = whole_run(*switches, learner="podnet")
    weights = weights_of(whole)
    assert weights["stage_001/head.weights.0"].equal(weights["stage_000/head.weights.0"])
    # training and the end of the first task; training, fine-tuning and the end of the second
    for _ in range(2 + 3):
        with monkeypatch.context() as patch:
            interrupt(patch, checkpoint, "save_state", 1, after=True, what=KeyboardInterrupt)
            run_tiny_in(tmp_path, *switches, learner="podnet", code=INTERRUPTED, report=False)
    assert_as_if_nothing_happened(run_tiny_in(tmp_path, *switches, learner="podnet", report=False), whole)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    switches = (*EXACT, *TINY_RESNET, "learner.finetune_epochs=1", "optim.batch_size=61")
    alone = run_tiny_in(tmp_path / "one", *switches, learner="podnet", report=False)
    code, _, errors = ended(launch(2, tmp_path / "two", *switches, learner="podnet"))
    assert code == 0, errors
    assert_equal_runs(alone, tmp_path / "two" / "run")
