import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd import Batch, Outputs, distillers
from kd.distributed import rank, world_size
from kd.logit.kd import KD
from kd.optim import DOT
from tests.kd.processes import in_processes

#: Distillers that are content with what a classifier says.
ON_LOGITS = sorted(name for name in distillers if distillers[name].needs <= {"logits", "labels", "strong"})


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int = 0) -> nn.Sequential:
    """Two layers and a parameter that nothing uses."""
    layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for number, parameter in enumerate(layers.parameters()):
        parameter.data = draw(100 * seed + number, *parameter.shape)
    layers.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    return layers


def losses(student: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = student(images)
    teacher = Outputs(network(5)(images).detach())
    batch = Batch(torch.zeros(len(images), 1, 1, 1), labels, torch.arange(len(images)))
    return F.cross_entropy(logits, labels), 0.9 * KD()(Outputs(logits), teacher, batch)


def data(step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    return draw(1000 + step, rows, 4), torch.arange(rows) % 3


def train(student: nn.Module, dot: DOT, num_steps: int, *, first: int = 0, max_norm: float | None = None) -> None:
    for step in range(first, first + num_steps):
        dot.zero_grad()
        dot.backward(*losses(student, *data(step)))
        dot.step(max_norm=max_norm)


def values(student: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in student.parameters()]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def one_parameter(value: float = 1.0, **settings: float) -> tuple[nn.Parameter, DOT]:
    parameter = nn.Parameter(torch.tensor([value], dtype=torch.float64))
    return parameter, DOT([parameter], **{"lr": 0.1, "momentum": 0.9, "delta": 0.05} | settings)


def gradient(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


# The rule


def test_two_steps_by_hand():
    parameter, dot = one_parameter(weight_decay=0.5)
    dot.step([gradient(2.0)], [gradient(3.0)])
    assert parameter.item() == pytest.approx(1 - 0.1 * (2.5 + 3.0))
    task, kd = 0.85 * 2.5 + (1.0 + 0.5 * 0.45), 0.95 * 3.0 - 1.0
    dot.step([gradient(1.0)], [gradient(-1.0)])
    assert parameter.item() == pytest.approx(0.45 - 0.1 * (task + kd))


def test_a_parameter_of_one_loss_has_the_plain_momentum():
    task, dot_task = one_parameter()
    kd, dot_kd = one_parameter()
    plain = nn.Parameter(gradient(1.0))
    sgd = torch.optim.SGD([plain], lr=0.1, momentum=0.9)
    for step in range(3):
        dot_task.step([gradient(step + 1)], [None])
        dot_kd.step(None, {kd: gradient(step + 1)})
        plain.grad = gradient(step + 1)
        sgd.step()
    assert_same([task.detach(), kd.detach()], [plain.detach()] * 2, 1e-15)


def test_weight_decay_reaches_a_distilled_parameter_from_its_second_step_on():
    parameter, dot = one_parameter(weight_decay=0.5)
    dot.step(kd_gradients=[gradient(2.0)])
    assert parameter.item() == pytest.approx(0.8)
    dot.step(kd_gradients=[gradient(2.0)])
    assert parameter.item() == pytest.approx(0.8 - 0.1 * (0.9 * 2 + 2 + 0.5 * 0.8))


@settings(max_examples=10)
@given(lr=st.floats(1e-3, 0.5), momentum=st.floats(0, 0.95), seed=st.integers(0, 50))
def test_without_delta_and_decay_it_is_sgd_on_the_summed_loss(lr, momentum, seed):
    ours, plain = network(seed), network(seed)
    train(ours, DOT(ours.parameters(), lr=lr, momentum=momentum, delta=0.0), 4)
    sgd = torch.optim.SGD(plain.parameters(), lr=lr, momentum=momentum)
    for step in range(4):
        sgd.zero_grad()
        sum(losses(plain, *data(step))).backward()
        sgd.step()
    assert_same(values(ours), values(plain), 1e-11)


def test_with_delta_the_distillation_counts_for_longer():
    parameter, dot = one_parameter(0.0)
    dot.step([gradient(1.0)], [gradient(-1.0)])
    assert parameter.item() == 0
    dot.step([gradient(0.0)], [gradient(0.0)])
    assert parameter.item() > 0


def test_a_parameter_without_gradient_stays():
    student = network()
    train(student, DOT(student.parameters(), lr=0.1, weight_decay=0.1), 2)
    assert student.get_parameter("unused").tolist() == [1, 1]


@pytest.mark.parametrize("name", ON_LOGITS)
def test_trains_beside_a_teacher_with_every_distiller_on_logits(name):
    student, distiller = network(), distillers[name]()
    dot = DOT(student.parameters(), lr=1e-3)
    images, labels = data(0)
    with torch.no_grad():
        logits = network(5)(images)
    teacher = Outputs(logits, views={"strong": Outputs(logits)})
    batch = Batch(torch.zeros(8, 1, 1, 1), labels, torch.arange(8))
    before = values(student)
    for _ in range(2):
        logits = student(images)
        dot.zero_grad()
        outputs = Outputs(logits, views={"strong": Outputs(logits)})
        dot.backward(F.cross_entropy(logits, labels), distiller(outputs, teacher, batch))
        dot.step()
    assert all(parameter.isfinite().all() for parameter in student.parameters())
    assert not torch.equal(student[0].weight, before[0])
    assert set(dot.state[student[0].weight]) == {"momentum_buffer", "momentum_kd_buffer"}


def test_a_loss_that_no_parameter_takes_part_in_is_no_loss():
    ours, plain = network(), network()
    for student, kd_loss in ((ours, torch.zeros(())), (plain, None)):
        dot = DOT(student.parameters(), lr=0.1)
        dot.backward(losses(student, *data(0))[0], kd_loss)
        dot.step()
        assert set(dot.state[student[0].weight]) == {"momentum_buffer"}
    assert_same(values(ours), values(plain))


# An optimiser like others


def test_goes_on_from_its_state_dict_as_if_it_had_not_stopped():
    whole, part = network(), network()
    train(whole, DOT(whole.parameters(), lr=0.1, weight_decay=0.01), 5)
    before = DOT(part.parameters(), lr=0.1, weight_decay=0.01)
    train(part, before, 3)
    after = DOT(part.parameters(), lr=0.7)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(part, after, 2, first=3)
    assert_same(values(part), values(whole))


def test_a_copy_has_the_momenta_but_not_the_gradients():
    parameter, dot = one_parameter()
    dot.step([gradient(1.0)], [gradient(1.0)])
    dot.backward(parameter.square().sum())
    twin = copy.deepcopy(dot)
    (state,) = twin.state.values()
    assert set(state) == {"momentum_buffer", "momentum_kd_buffer"}
    with pytest.raises(ValueError, match="no gradients"):
        twin.step()


def test_groups_have_settings_of_their_own_and_schedulers_move_them():
    first, second = nn.Parameter(gradient(1.0)), nn.Parameter(gradient(1.0))
    dot = DOT([{"params": [first], "lr": 0.5}], lr=0.1, delta=0.05)
    dot.add_param_group({"params": [second], "delta": 0.0})
    schedule = torch.optim.lr_scheduler.StepLR(dot, step_size=1, gamma=0.1)
    dot.step([gradient(1.0)] * 2, [None] * 2)
    schedule.step()
    assert (first.item(), second.item()) == pytest.approx((0.5, 0.9))
    assert [group["lr"] for group in dot.param_groups] == pytest.approx([0.05, 0.01])
    assert [group["delta"] for group in dot.param_groups] == [0.05, 0.0]


def test_a_grown_classifier_keeps_the_momenta_of_its_rows():
    old, grown = nn.Parameter(draw(0, 2, 3)), nn.Parameter(draw(1, 4, 3))
    before, after = DOT([old], lr=0.1), DOT([grown], lr=0.1)
    before.step([draw(2, 2, 3)], [draw(3, 2, 3)])
    after.take_over(before, [(grown, old)])
    for name, seed in (("momentum_buffer", 2), ("momentum_kd_buffer", 3)):
        torch.testing.assert_close(after.state[grown][name][:2], draw(seed, 2, 3))
        assert not after.state[grown][name][2:].any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": -1.0}, "dot.lr"),
        ({"lr": math.nan}, "dot.lr"),
        ({"weight_decay": -1.0}, "dot.weight_decay"),
        ({"delta": -0.1}, "dot.delta"),
        ({"delta": 0.1}, "below 1"),
        ({"momentum": 0.02}, "must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        one_parameter(**settings)


def test_gradients_that_do_not_fit_are_refused():
    parameter, dot = one_parameter()
    with pytest.raises(ValueError, match="no gradients"):
        dot.step()
    with pytest.raises(ValueError, match="1 parameters, found 2 gradients"):
        dot.step([gradient(1.0)] * 2)
    with pytest.raises(ValueError, match=r"gradient \(2,\) of a parameter \(1,\)"):
        dot.step([torch.zeros(2)])
    with pytest.raises(ValueError, match="no such parameter"):
        dot.step({parameter.detach().clone(): gradient(1.0)})


# Hazards: (a) to (e)


def test_gradients_are_its_own_whatever_happens_to_those_of_the_parameters():
    ours, plain = network(), network()
    dots = [DOT(student.parameters(), lr=0.1) for student in (ours, plain)]
    for student, dot in zip((ours, plain), dots, strict=True):
        dot.backward(*losses(student, *data(0)))
    for parameter in ours.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    ours.zero_grad(set_to_none=False)
    for dot in dots:
        dot.step()
    assert_same(values(ours), values(plain))


def test_one_tensor_handed_out_for_two_parameters_is_kept_apart():
    a, b = nn.Parameter(gradient(1.0)), nn.Parameter(gradient(2.0))
    dot = DOT([a, b], lr=0.1)
    for _ in range(2):
        dot.backward((a + b).sum(), (a + b).sum())
    dot.step()
    assert (a.item(), b.item()) == pytest.approx((1 - 0.4, 2 - 0.4))


def test_zero_grad_forgets_both():
    student = network()
    dot = DOT(student.parameters(), lr=0.1)
    dot.backward(*losses(student, *data(0)))
    dot.zero_grad()
    assert all(parameter.grad is None for parameter in student.parameters())
    with pytest.raises(ValueError, match="no gradients"):
        dot.step()


def scaled_training(student: nn.Module, scaler: torch.amp.GradScaler, max_norm: float | None = None) -> DOT:
    dot = DOT(student.parameters(), lr=0.1, weight_decay=0.01)
    for step in range(3):
        dot.zero_grad()
        task, kd = losses(student, *data(step))
        dot.backward(scaler.scale(task), scaler.scale(kd))
        scaler.step(dot, max_norm=max_norm)
        scaler.update()
    return dot


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_gradient_scaler_changes_nothing(enabled, max_norm):
    ours, plain = network(), network()
    scaled_training(ours, torch.amp.GradScaler("cpu", enabled=enabled), max_norm)
    train(plain, DOT(plain.parameters(), lr=0.1, weight_decay=0.01), 3, max_norm=max_norm)
    assert_same(values(ours), values(plain), 1e-12)


@pytest.mark.parametrize("infinite", ["task", "kd"])
def test_a_step_with_either_gradient_infinite_is_skipped_and_the_scale_falls(infinite):
    student, scaler = network(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    dot = scaled_training(student, scaler)
    before, momenta = values(student), copy.deepcopy(dot.state_dict()["state"])
    dot.zero_grad()
    task, kd = losses(student, *data(0))
    weight = student[0].weight[0, 0]
    spoiled = (weight - weight.detach()) * math.inf
    dot.backward(*(scaler.scale(loss + spoiled * (name == infinite)) for name, loss in (("task", task), ("kd", kd))))
    scaler.step(dot)
    scaler.update()
    assert_same(values(student), before)
    torch.testing.assert_close(dot.state_dict()["state"], momenta, rtol=0, atol=0)
    assert scaler.get_scale() == 512


def test_unscaling_from_outside_is_refused_with_the_way_out():
    student, scaler = network(), torch.amp.GradScaler("cpu")
    dot = DOT(student.parameters(), lr=0.1)
    dot.backward(*(scaler.scale(loss) for loss in losses(student, *data(0))))
    scaler.unscale_(dot)
    with pytest.raises(ValueError, match="max_norm"):
        scaler.step(dot)


def test_micro_batches_add_up_to_the_batch():
    ours, plain = network(), network()
    images, labels = data(0)
    dot = DOT(ours.parameters(), lr=0.1)
    for half in (slice(0, 4), slice(4, 8)):
        dot.backward(*(loss / 2 for loss in losses(ours, images[half], labels[half])), last=half.stop == 8)
    dot.step()
    train(plain, DOT(plain.parameters(), lr=0.1), 1)
    assert_same(values(ours), values(plain), 1e-14)


def test_both_gradients_are_clipped_by_the_norm_of_their_sum():
    parameter, dot = one_parameter()
    dot.step([gradient(3.0)], [gradient(-1.0)], max_norm=1.0)
    state = dot.state[parameter]
    assert state["momentum_buffer"].item() == pytest.approx(1.5, rel=1e-6)
    assert state["momentum_kd_buffer"].item() == pytest.approx(-0.5, rel=1e-6)
    other, small = one_parameter()
    small.step([gradient(3.0)], [gradient(-2.5)], max_norm=1.0)
    assert small.state[other]["momentum_buffer"].item() == 3


def test_the_sum_of_both_gradients_stands_where_others_look():
    student, plain = network(), network()
    DOT(student.parameters(), lr=0.1).backward(*losses(student, *data(0)))
    sum(losses(plain, *data(0))).backward()
    for found, expected in zip(student.parameters(), plain.parameters(), strict=True):
        if expected.grad is None:
            assert found.grad is None
        else:
            torch.testing.assert_close(found.grad, expected.grad)


def train_a_share(num_steps: int) -> list[Tensor]:
    """Parameters after training; with several processes each sees its rows, in two micro-batches.

    The last parameter takes part in the first process only.
    """
    student = network()
    wrapped = nn.parallel.DistributedDataParallel(student) if world_size() > 1 else student
    dot = DOT(student.parameters(), lr=0.1, weight_decay=0.01)
    rows = 8 // world_size()
    mine = slice(rank() * rows, (rank() + 1) * rows)
    for step in range(num_steps):
        dot.zero_grad()
        images, labels = (part[mine] for part in data(step))
        for half in (slice(0, rows // 2), slice(rows // 2, rows)):
            with nullcontext() if wrapped is student else wrapped.no_sync():
                task, kd = losses(wrapped, images[half], labels[half])
            if rank() == 0:
                task = task + world_size() * student.get_parameter("unused").square().sum()
            dot.backward(task / 2, kd / 2, last=half.stop == rows)
        dot.step(max_norm=2.0)
    return values(student)


def test_two_processes_stay_equal_and_equal_to_one():
    first, second = in_processes(train_a_share, 3)
    assert_same(first, second)
    assert_same(first, train_a_share(3), 1e-12)
