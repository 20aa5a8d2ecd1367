import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cil import checkpoint
from cil.checking import check
from cil.cli import compose
from cil.learners.ewc import EWC, PerParameter
from cil.models.heads import GrowingLinear
from cil.models.network import models
from cil.optim import Recipe
from cil.seeding import SampleNoise, sample_noise
from cil.stages import Stage
from kd import Batch
from tests.conftest import SMALL_RESNET, RunTiny, run_tiny_in
from tests.run_folders import assert_same_weights, facts_of, metrics_of, weights_of
from tests.test_distributed import EXACT, assert_equal_runs, ended, launch
from tests.test_resume import INTERRUPTED, assert_as_if_nothing_happened, interrupt

RESNET = ("model=resnet32", "model.depth=20", "model.width=4")
FIRST = Stage(0, range(3), Recipe(), has_memory=False)
SECOND = Stage(1, range(3, 5), Recipe(), has_memory=False)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def batch_of(seed: int, labels: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(len(labels), 1, 8, 8, generator=generator)
    return Batch(images, torch.tensor(labels), torch.arange(len(labels)) + 10 * seed)


OLD = [batch_of(0, [0, 1, 2, 0]), batch_of(1, [2, 1])]
NEW = [batch_of(2, [3, 4, 3, 3]), batch_of(3, [4, 3])]


def learner_of(**settings: object) -> EWC:
    torch.manual_seed(0)
    return EWC(models["resnet_cifar"]((1, 8, 8), depth=20, width=4), **settings)  # type: ignore[arg-type]


def measure(learner: EWC, stage: Stage, batches: list[Batch]) -> None:
    """The Fisher phase of a stage."""
    learner.phase = learner.phases(stage)[1]
    learner.train()
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    for batch in batches:
        learner.update(learner(batch), optimizer, NO_SCALER, 1e-9)
    learner.phase = None


def in_second_task(**settings: object) -> EWC:
    learner = learner_of(**settings)
    learner.begin_stage(FIRST)
    measure(learner, FIRST, OLD)
    learner.end_stage(FIRST)
    learner.begin_stage(SECOND)
    return learner


def disturb(learner: EWC) -> None:
    with torch.no_grad():
        for parameter in learner.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def values_of(kept: PerParameter, learner: EWC) -> dict[str, Tensor]:
    return {name: kept[name].clone() for name, _ in learner.network.named_parameters()}


def squared_gradients(learner: EWC, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    names, parameters = zip(*learner.network.named_parameters(), strict=True)
    return {n: g.square() for n, g in zip(names, torch.autograd.grad(loss(), parameters), strict=True)}


def mean_of(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in found]).mean(dim=0) for name in found[0]}


def test_it_trains_on_the_new_data_and_then_looks_at_each_of_them_once() -> None:
    recipe = Recipe(epochs=5, batch_size=8, sampling={"views": 3})  # type: ignore[arg-type]
    training, fisher = learner_of().phases(Stage(1, range(3, 5), recipe, has_memory=True))
    assert (training.name, training.source, training.recipe) == ("training", "new", recipe)
    assert (fisher.name, fisher.source, fisher.recipe.epochs, fisher.batch_size) == ("fisher", "new", 1, 8)
    assert (fisher.recipe.sampling.views, list(fisher.frozen)) == (1, [])
    assert learner_of(fisher="sample").phases(SECOND)[1].batch_size == 1


def test_the_penalty_is_zero_at_the_start_of_a_task() -> None:
    learner = in_second_task()
    losses = learner(NEW[0])
    assert list(losses) == ["ce", "ewc"]
    assert losses["ewc"] == 0
    assert sum(float(values.sum()) for values in values_of(learner.importance, learner).values()) > 0


def test_the_gradient_of_the_penalty_is_the_weighted_distance() -> None:
    learner = in_second_task(weight=7.0)
    disturb(learner)
    named = dict(learner.network.named_parameters())
    gradients = torch.autograd.grad(learner(NEW[0])["ewc"], list(named.values()))
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        expected = 7 * learner.importance[name] * (parameter.detach() - learner.anchor[name])
        torch.testing.assert_close(gradient, expected)
    assert not dict(zip(named, gradients, strict=True))["head.weight"][3:].any()


def test_the_cross_entropy_is_over_the_new_classes() -> None:
    learner = in_second_task().eval()
    logits = learner.network(NEW[0].images).logits
    assert learner(NEW[0])["ce"].equal(F.cross_entropy(logits[:, 3:], NEW[0].labels - 3))
    fresh = learner_of()
    fresh.begin_stage(FIRST)
    assert list(fresh(OLD[0])) == ["ce"]


def test_batches_are_squared_after_averaging_in_training_mode() -> None:
    learner = in_second_task()
    disturb(learner)
    twin = copy.deepcopy(learner)
    measure(learner, SECOND, NEW)
    twin.train()
    gradients = [
        squared_gradients(twin, lambda b=batch: F.cross_entropy(twin.network(b.images).logits, b.labels))  # type: ignore[misc]
        for batch in NEW
    ]
    for name, expected in mean_of(gradients).items():
        torch.testing.assert_close(learner.measured[name], expected)


def test_samples_are_squared_one_by_one_in_evaluation_mode() -> None:
    learner = in_second_task(fisher="sample")
    disturb(learner)
    twin = copy.deepcopy(learner).eval()
    ones = [Batch(b.images[i, None], b.labels[i, None], b.ids[i, None]) for b in NEW for i in range(len(b.labels))]
    measure(learner, SECOND, ones)
    gradients = [
        squared_gradients(twin, lambda b=one: F.cross_entropy(twin.network(b.images).logits, b.labels))  # type: ignore[misc]
        for one in ones
    ]
    for name, expected in mean_of(gradients).items():
        torch.testing.assert_close(learner.measured[name], expected)


@pytest.mark.parametrize("fisher", ["batch", "sample"])
def test_measuring_changes_neither_weights_nor_statistics(fisher: str) -> None:
    learner = in_second_task(fisher=fisher)
    before = copy.deepcopy(learner.network.state_dict())
    measure(learner, SECOND, NEW)
    assert_same_weights(learner.network.state_dict(), before)


def test_what_is_measured_does_not_depend_on_the_number_format() -> None:
    learner = in_second_task()
    learner.phase = learner.phases(SECOND)[1]
    expected = learner(NEW[0])["ce"]
    with torch.autocast("cpu", torch.bfloat16):
        assert learner(NEW[0])["ce"].equal(expected)


def test_old_and_new_are_merged_by_the_share_of_classes_on_the_rows_that_existed() -> None:
    learner = in_second_task(clamp=1e-3)
    disturb(learner)
    old = values_of(learner.importance, learner)
    measure(learner, SECOND, NEW)
    new = {name: values.clamp(max=1e-3) for name, values in values_of(learner.measured, learner).items()}
    learner.end_stage(SECOND)
    for name, parameter in learner.network.named_parameters():
        expected = 3 / 5 * old[name] + 2 / 5 * new[name]
        if name.startswith("head."):
            expected[3:] = new[name][3:]
        torch.testing.assert_close(learner.importance[name], expected)
        assert learner.anchor[name].equal(parameter)


def test_values_are_cut_to_the_clamp_or_left_alone() -> None:
    cut, whole = in_second_task(clamp=1e-6), in_second_task(clamp=None)
    assert max(float(v.max()) for v in values_of(cut.importance, cut).values()) == pytest.approx(1e-6)
    assert max(float(v.max()) for v in values_of(whole.importance, whole).values()) > 1e-4


def test_labels_are_the_true_ones_the_likeliest_or_drawn() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.25, 0.25]])).repeat(3000, 1)
    batch = Batch(torch.zeros(6000, 1, 1, 1), torch.zeros(6000).long(), torch.arange(6000))
    assert learner_of().labels(logits, batch).equal(batch.labels)
    assert learner_of(fisher_labels="max_pred").labels(logits, batch).equal(torch.tensor([1, 0]).repeat(3000))
    learner = learner_of(fisher_labels="sampled")
    with sample_noise(SampleNoise(5, batch.ids, torch.zeros_like(batch.ids))):
        drawn = learner.labels(logits, batch)
        part = learner.labels(logits[100:200], Batch(batch.images[:100], batch.labels[:100], batch.ids[100:200]))
    assert part.equal(drawn[100:200])
    for labels in (drawn, learner.labels(logits, batch)):
        shares = [labels[row::2].bincount(minlength=3) / 3000 for row in range(2)]
        torch.testing.assert_close(torch.stack(shares), logits[:2].exp(), atol=0.03, rtol=0)


def test_a_fresh_learner_is_rebuilt() -> None:
    learner = in_second_task()
    disturb(learner)
    measure(learner, SECOND, NEW[:1])
    other = learner_of()
    other.rebuild(learner.structure())
    other.load_state_dict(learner.state_dict())
    for one in (learner, other):
        measure(one, SECOND, NEW[1:])
        one.end_stage(SECOND)
    assert_same_weights(other.state_dict(), learner.state_dict())


def test_what_is_kept_grows_with_the_network() -> None:
    head = GrowingLinear(4)
    head.grow(2)
    before = PerParameter(head)
    before["weight"].fill_(3)
    head.grow(1)
    after = PerParameter(head, before)
    assert after["weight"].equal(torch.tensor([3.0, 3.0, 0.0])[:, None].expand(3, 4))
    assert list(after.state_dict()) == ["weight", "bias"]
    assert not list(after.parameters())


def test_a_network_without_one_linear_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"learner=ewc needs .* one linear head, found DKTNetwork: use model=resnet32"):
        EWC(models["dkt"]((1, 8, 8)))


def test_the_published_recipe_composes() -> None:
    published = ["model=resnet32", "optim=sgd", "optim.epochs=180", "optim.schedule.milestones=[70,120,150]"]
    config = check(compose(["learner=ewc", *published]))
    assert config.learner.parameters == {"weight": 1000, "fisher": "batch", "fisher_labels": "true", "clamp": 1e-4}


@pytest.mark.parametrize("labels", ["true", "max_pred", "sampled"])
def test_labels_are_chosen_by_one_word(labels: str) -> None:
    config = check(compose(["learner=ewc", "model=resnet32", f"learner.fisher_labels={labels}"]))
    assert config.learner.parameters["fisher_labels"] == labels
    assert check(config.model_dump(mode="json")) == config


def test_the_first_task_is_that_of_finetuning_to_the_bit(whole_run: RunTiny) -> None:
    settings = (*RESNET, "scenario.classes=4")
    run = whole_run(*settings, learner="ewc")
    found, expected = weights_of(run), weights_of(whole_run(*settings, learner="finetune"))
    first = [{n: v for n, v in weights.items() if n.startswith("stage_000")} for weights in (found, expected)]
    assert_same_weights(*first)
    phases = [(e["phase"], e["num_images"]) for e in facts_of(run) if e["event"] == "epoch"]
    sizes = [event["num_new_samples"] for event in facts_of(run) if event["event"] == "stage_started"]
    assert phases == [(name, size) for size in sizes for name in ("training", "training", "fisher")]


def test_a_strong_spring_keeps_the_old_task(whole_run: RunTiny) -> None:
    found = metrics_of(whole_run(*SMALL_RESNET, "learner.weight=1e6", learner="ewc"))
    alone = metrics_of(whole_run(*SMALL_RESNET, learner="finetune"))
    assert found["forgetting"] < alone["forgetting"] - 0.1
    assert found["last_accuracy"] > alone["last_accuracy"]


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, whole_run: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*RESNET, "scenario.classes=4", "learner.fisher_labels=sampled")
    whole = whole_run(*settings, learner="ewc")
    for _ in range(2 * 4):  # two epochs of training, one of measuring, and the end of the task
        with monkeypatch.context() as patch:
            interrupt(patch, checkpoint, "save_state", 1, after=True, what=KeyboardInterrupt)
            run_tiny_in(tmp_path, *settings, learner="ewc", code=INTERRUPTED, report=False)
    assert_as_if_nothing_happened(run_tiny_in(tmp_path, *settings, learner="ewc", report=False), whole)


@pytest.mark.slow
@pytest.mark.parametrize("fisher", ["batch", "sample"])
def test_two_processes_measure_what_one_measures(tmp_path: Path, fisher: str) -> None:
    labels = "true" if fisher == "batch" else "sampled"
    settings = (*EXACT, *RESNET, f"learner.fisher={fisher}", f"learner.fisher_labels={labels}", "learner.clamp=null")
    alone = run_tiny_in(tmp_path / "one", *settings, learner="ewc", report=False)
    code, _, errors = ended(launch(2, tmp_path / "two", *settings, learner="ewc"))
    assert code == 0, errors
    assert_equal_runs(alone, tmp_path / "two" / "run")
    one, two = (
        torch.load(run / "stage_002" / "state.pt", weights_only=True)["learner"]
        for run in (alone, tmp_path / "two" / "run")
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-9, rtol=1e-6)
