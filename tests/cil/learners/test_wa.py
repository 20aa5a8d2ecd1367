import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cil.checking import check
from cil.cli import compose
from cil.config import ConfigError
from cil.learners.wa import WA, align
from cil.models.heads import GrowingLinear
from cil.models.network import models
from cil.optim import Recipe
from cil.stages import Stage
from kd import Batch, WeightedSum
from kd.logit.kd import KD
from tests.conftest import SMALL_RESNET, RunTiny
from tests.run_folders import facts_of, metrics_of, weights_of

BATCH = Batch(torch.rand(5, 1, 8, 8), torch.tensor([0, 4, 2, 3, 4]), torch.arange(5))
SECOND = Stage(1, range(3, 5), Recipe(), has_memory=True)


def learner_of(*, distils: bool = True, clip_positive: bool = False) -> WA:
    """In evaluation mode, in its second task, with a teacher of other weights."""
    torch.manual_seed(0)
    distillation = WeightedSum({"kd2": (0.25, KD(temperature=2.0))}) if distils else None
    network = models["resnet_cifar"]((1, 8, 8), depth=20, width=4)
    learner = WA(network, distillation, clip_positive=clip_positive)
    learner.begin_stage(Stage(0, range(3), Recipe(), has_memory=True))
    learner.begin_stage(SECOND)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return learner.eval()


def head_of(num_old: int, num_new: int, width: int = 7) -> GrowingLinear:
    head = GrowingLinear(width)
    for size in (num_old, num_new):
        head.grow(size)
    return head


@given(st.integers(1, 5), st.integers(1, 5), st.floats(0.01, 100))
@settings(max_examples=20)
def test_after_aligning_old_and_new_rows_are_equally_long(num_old: int, num_new: int, scale: float) -> None:
    head = head_of(num_old, num_new)
    with torch.no_grad():
        head.weight[num_old:] *= scale
    before = head.weight.detach().clone()
    bias = head.bias.detach().clone()
    gamma = align(head, num_old)
    norms = head.weight.detach().norm(dim=1)
    torch.testing.assert_close(norms[num_old:].mean(), norms[:num_old].mean())
    assert head.weight[:num_old].equal(before[:num_old])
    torch.testing.assert_close(head.weight.detach()[num_old:], gamma * before[num_old:])
    assert head.bias.equal(bias)
    assert align(head, num_old) == pytest.approx(1, abs=1e-5)
    assert head.weight.requires_grad


def test_rows_that_cannot_be_aligned_are_an_error() -> None:
    for num_old in (0, 5):
        with pytest.raises(ValueError, match=f"aligning needs old and new rows: found {num_old} old ones of 5"):
            align(head_of(3, 2), num_old)
    head = head_of(3, 2)
    with torch.no_grad():
        head.weight[3:] = 0
    with pytest.raises(ValueError, match=r"rows of zeros cannot be aligned: the mean norm is .* and 0\.0 of the new"):
        align(head, 3)


def test_terms_are_weighted_by_the_share_of_old_classes() -> None:
    learner = learner_of()
    losses = learner(BATCH)
    student, teacher = learner.network(BATCH.images), learner.teacher(BATCH.images)  # type: ignore[misc]
    assert list(losses) == ["ce", "kd2"]
    torch.testing.assert_close(losses["ce"], 2 / 5 * F.cross_entropy(student.logits, BATCH.labels))
    torch.testing.assert_close(losses["kd2"], 3 / 5 * 0.25 * KD(temperature=2.0)(student.first(3), teacher, BATCH))


def test_the_first_task_and_a_run_without_distillation_are_plain_cross_entropy() -> None:
    learner = learner_of(distils=False)
    losses = learner(BATCH)
    assert list(losses) == ["ce"]
    assert losses["ce"].equal(F.cross_entropy(learner.network(BATCH.images).logits, BATCH.labels))
    first = WA(models["resnet_cifar"]((1, 8, 8), depth=20, width=4), WeightedSum({"kd": (1.0, KD())}))
    first.begin_stage(Stage(0, range(5), Recipe(), has_memory=True))
    assert list(first(BATCH)) == ["ce"]


def test_the_rows_are_aligned_at_the_end_of_every_task_but_the_first() -> None:
    learner = learner_of()
    before = learner.network.head.weight.detach().clone()
    learner.end_stage(Stage(0, range(5), Recipe(), has_memory=True))
    assert learner.network.head.weight.equal(before)
    learner.end_stage(SECOND)
    norms = learner.network.head.weight.detach().norm(dim=1)
    torch.testing.assert_close(norms[3:].mean(), norms[:3].mean())
    assert learner.teacher is None


@pytest.mark.parametrize("clip_positive", [False, True])
def test_weights_of_the_head_are_clipped_after_a_step_if_asked_for(clip_positive: bool) -> None:
    learner = learner_of(clip_positive=clip_positive)
    optimizer = torch.optim.SGD(learner.network.parameters(), lr=0.1)
    learner.update(learner(BATCH), optimizer, torch.amp.GradScaler("cpu", enabled=False), None)
    weight = learner.network.head.weight
    assert bool((weight >= 0).all()) == clip_positive
    assert weight.gt(0).any()


def test_a_network_without_one_linear_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"learner=wa aligns the rows of one linear head, found DKTNetwork: use"):
        WA(models["dkt"]((1, 8, 8)), None)


def test_a_run_without_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"learner=wa replays exemplars and memory\.size is 0"):
        check(compose(["learner=wa", "model=resnet32", "memory.size=0"]))


def test_the_published_recipe_composes() -> None:
    published = ["model=resnet32", "optim=sgd", "optim.epochs=170", "optim.schedule.milestones=[60,100,140]"]
    config = check(compose(["learner=wa", *published]))
    assert (config.optim.initial_epochs, config.memory.size, list(config.kd)) == (200, 2000, ["kd2"])


def test_it_forgets_less_than_training_on_each_task_alone(whole_run: RunTiny) -> None:
    run = whole_run(*SMALL_RESNET, learner="wa")
    found, alone = metrics_of(run), metrics_of(whole_run(*SMALL_RESNET, learner="finetune"))
    assert found["last_accuracy"] > alone["last_accuracy"] + 0.2
    assert found["exemplars"] == [24, 24]
    norms = weights_of(run)["stage_001/head.weight"].norm(dim=1)
    torch.testing.assert_close(norms[2:].mean(), norms[:2].mean())
    losses = [list(event["losses"]) for event in facts_of(run) if event["event"] == "epoch"]
    assert losses == [["ce"]] * 10 + [["ce", "kd2"]] * 10
