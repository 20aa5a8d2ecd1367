from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd import Batch, Distiller, Outputs, distillers, frozen
from kd.feature.at import AT, ATGradient, attention_map, attention_maps
from kd.taps import Tapped
from tests.kd.tapped import images, mobilenet, resnet
from tests.parity.case import read_cases
from tests.parity.runner import check

GOLDENS = Path(__file__).parents[1] / "goldens" / "kd.npz"
VARIANTS = ["code", "paper"]


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def said(*stages: Tensor) -> Outputs:
    return Outputs(stages[0].new_zeros(len(stages[0]), 1), taps={f"stage{i}.post": f for i, f in enumerate(stages)})


def batch_of(count: int, num_classes: int = 1) -> Batch:
    return Batch(torch.zeros(count, 1, 1, 1), torch.arange(count) % num_classes, torch.arange(count))


def loss(at: Distiller, student: Outputs, teacher: Outputs) -> Tensor:
    return at(student, teacher, batch_of(len(student.logits)))


def test_are_found_by_their_names():
    assert distillers["at"] is AT
    assert distillers["at_gradient"] is ATGradient


def test_the_golden_cases_pass():
    cases = [case for case in read_cases(GOLDENS) if case.name.startswith("at/")]
    assert len(cases) == 4
    for case in cases:
        assert check(case).misses == []


def test_attention_by_hand():
    features = torch.tensor([[[[3.0, 0.0]], [[-4.0, 5.0]]]])  # 9 + 16 = 25 and 0 + 25
    torch.testing.assert_close(attention_map(features, 2.0), torch.full((1, 2), 0.5**0.5))
    torch.testing.assert_close(attention_map(features, 1.0), F.normalize(torch.tensor([[7.0, 5.0]])))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    scale=st.floats(1e-3, 1e3),
    order=st.permutations(range(5)),
    p=st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0]),
    variant=st.sampled_from(VARIANTS),
)
def test_order_and_common_scale_of_the_channels_change_nothing(seed, scale, order, p, variant):
    at, student, teacher = AT(p=p, variant=variant), maps(3, 5, 4, 6, seed=seed), maps(3, 2, 4, 6, seed=seed + 1)
    changed = scale * student[:, order]
    plain = loss(at, said(student), said(teacher))
    torch.testing.assert_close(loss(at, said(changed), said(teacher)), plain, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss(at, said(teacher), said(changed)), plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_attention_has_no_loss_and_no_gradient(variant):
    student = maps(3, 5, 4, 4).requires_grad_()
    value = loss(AT(variant=variant), said(student), said(student.detach().clone()))
    value.backward()
    assert value.shape == ()
    assert value == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_stages_are_summed():
    student, teacher = [maps(3, 4, 8, 8), maps(3, 5, 4, 4)], [maps(3, 2, 8, 8, seed=1), maps(3, 3, 4, 4, seed=2)]
    single = [loss(AT(), said(ours), said(theirs)) for ours, theirs in zip(student, teacher, strict=True)]
    torch.testing.assert_close(loss(AT(), said(*student), said(*teacher)), single[0] + single[1])
    torch.testing.assert_close(loss(AT(stages=["stage1.post"]), said(*student), said(*teacher)), single[1])


def test_only_stages_in_common_are_compared():
    student, teacher = [maps(3, 4, 8, 8), maps(3, 5, 4, 4)], [maps(3, 2, 8, 8, seed=1)]
    torch.testing.assert_close(loss(AT(), said(*student), said(*teacher)), loss(AT(), said(student[0]), said(*teacher)))


@given(sizes=st.tuples(*[st.integers(1, 9)] * 4))
@settings(max_examples=20)
def test_the_larger_map_is_pooled_on_each_axis(sizes):
    student, teacher = attention_maps(maps(2, 3, *sizes[:2]), maps(2, 4, *sizes[2:]))
    assert student.shape == teacher.shape == (2, min(sizes[0], sizes[2]) * min(sizes[1], sizes[3]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_reaches_the_teacher(variant):
    student, teacher = maps(3, 5, 4, 4).requires_grad_(), maps(3, 2, 4, 4, seed=1).requires_grad_()
    loss(AT(variant=variant), said(student), said(teacher)).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("p", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("size", [0.0, 120.0, 60000.0])
def test_any_features_give_a_finite_loss_in_any_format(dtype, variant, p, size):
    student, teacher = (size * maps(2, 4, 4, 4).clamp(-1, 1)).to(dtype).requires_grad_(), maps(2, 3, 4, 4).to(dtype)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        value = loss(AT(variant=variant, p=p), said(student), said(teacher))
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_small_features_and_gradients_have_a_direction(p):
    features = maps(2, 4, 4, 4)
    torch.testing.assert_close(attention_map(1e-9 * features, p), attention_map(features, p))
    assert not attention_map(1e-15 * features, p).any()


def test_networks_of_two_families_are_compared():
    batch = batch_of(2)
    assert AT()(mobilenet()(images()), frozen(resnet("resnet10t"))(images()), batch).isfinite()


def test_what_cannot_be_compared_is_refused():
    student = said(maps(2, 3, 4, 4))
    with pytest.raises(
        ValueError, match=r"no tap 'stageN.post' in common, found stage0.post of the student and no taps"
    ):
        loss(AT(), student, Outputs(student.logits))
    with pytest.raises(ValueError, match=r"at, teacher: needs the tap 'stage0.post', found no taps"):
        loss(AT(stages=["stage0.post"]), student, Outputs(student.logits))
    for method in (AT, ATGradient):
        with pytest.raises(ValueError, match=r"stages must name at least one tap"):
            method(stages=[])
        with pytest.raises(ValueError, match=r"p must be 1 or more, found 0.5"):
            method(p=0.5)
    with pytest.raises((ValueError, TypeError), match="variant"):
        AT(variant="mean")  # type: ignore[arg-type]


# Gradient-based attention


def small(seed: int, in_place: bool = True) -> Tapped:
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(in_place), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten()]
    return Tapped(nn.Sequential(*body, nn.LazyLinear(3)), {"stage0.post": "2", "stage1.post": "4"}, {"images": ""})


def gradient_loss(student: Outputs, teacher: Outputs, **settings: object) -> Tensor:
    return ATGradient(**settings)(student, teacher, batch_of(len(student.logits), num_classes=3))


PICTURES = images(4, 9, 9)


def test_gradients_by_hand():
    """With a linear head on maps f, the gradient of the cross-entropy is (softmax - one hot) times the weight."""
    features, weight = (
        [maps(4, 2, 3, 3, seed=i).requires_grad_() for i in (0, 1)],
        [maps(18, 3, seed=i) for i in (2, 3)],
    )
    student, teacher = (
        Outputs(f.flatten(1) @ w, taps={"stage0.post": f}) for f, w in zip(features, weight, strict=True)
    )
    attention = []
    for said_, w in ((student, weight[0]), (teacher, weight[1])):
        gradient = (said_.logits.softmax(1) - F.one_hot(torch.arange(4) % 3)) @ w.T
        attention.append(attention_map(gradient.unflatten(1, (2, 3, 3)).detach(), 1.0))
    torch.testing.assert_close(gradient_loss(student, teacher), (attention[0] - attention[1]).square().sum(1).mean())


def test_a_student_like_the_teacher_has_no_loss():
    network = small(0).eval()
    network(PICTURES)
    value = gradient_loss(network(PICTURES), frozen(network, keep_graph=True)(PICTURES))
    assert value.shape == ()
    assert value < 1e-12


def test_the_loss_is_differentiated_through_the_gradients_of_the_student():
    student, teacher = small(0, in_place=False).eval(), small(1)
    teacher(PICTURES), student(PICTURES)
    student.double(), teacher.double()
    pictures = PICTURES.double()
    target = frozen(teacher, keep_graph=True)(pictures)
    weight = student.network[3].weight

    def of(value: Tensor) -> Tensor:
        said_ = torch.func.functional_call(student, {"network.3.weight": value}, (pictures,))
        return gradient_loss(said_, target, stages=["stage0.post"], p=2.0)

    (gradient,) = torch.autograd.grad(of(weight), [weight])
    direction = maps(*weight.shape, seed=5)
    slope = (of(weight + 1e-6 * direction) - of(weight - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-9)


def test_the_student_learns_and_the_teacher_does_not():
    student, teacher = small(0), small(1)
    teacher(PICTURES)
    target = frozen(teacher, keep_graph=True)(PICTURES)
    gradient_loss(student(PICTURES), target).backward()
    assert student.network[0].weight.grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_gradients_at_the_images_can_be_compared():
    student, teacher = small(0), small(1)
    teacher(PICTURES)
    value = gradient_loss(
        student(PICTURES.clone().requires_grad_()), frozen(teacher, keep_graph=True)(PICTURES), stages=["images"]
    )
    value.backward()
    assert value > 0
    assert student.network[0].weight.grad.abs().sum() > 0


def test_classes_that_the_teacher_does_not_know_are_left_out():
    student, teacher = small(0).eval(), small(1)
    teacher(PICTURES), student(PICTURES)
    target = frozen(teacher, keep_graph=True)(PICTURES)
    ours, known = student(PICTURES), torch.tensor([0, 2, 3, 5])
    labels = torch.tensor([0, 3, 2, 7])
    value = ATGradient()(ours, target, Batch(PICTURES, labels, known))
    rows = [0, 2]
    ours, target = student(PICTURES[rows]), frozen(teacher, keep_graph=True)(PICTURES[rows])
    torch.testing.assert_close(value, ATGradient()(ours, target, Batch(PICTURES[rows], labels[rows], known[rows])) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_certain_networks_give_a_finite_gradient_loss(dtype):
    features = [(120 * maps(4, 2, 3, 3, seed=i)).to(dtype).requires_grad_() for i in (0, 1)]
    student, teacher = (Outputs(f.flatten(1)[:, :3] * 1.0, taps={"stage0.post": f}) for f in features)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        value = gradient_loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert features[0].grad.isfinite().all()
    assert features[1].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_that_is_sure_of_itself_teaches_in_any_format(dtype):
    """Only the scale of its gradients depends on how sure it is of a class, if the order of the others stays."""
    student, teacher = small(0).eval(), small(1)
    teacher(PICTURES), student(PICTURES)
    labels, values = torch.zeros(4, dtype=torch.int64), []
    batch = Batch(PICTURES, labels, torch.arange(4))
    for margin in (10.0, 40.0):
        with torch.no_grad():
            teacher.network[-1].bias.copy_(torch.tensor([margin, 0.0, 0.0]))
        with torch.autocast("cpu", dtype):
            values.append(ATGradient()(student(PICTURES), frozen(teacher, keep_graph=True)(PICTURES), batch))
    torch.testing.assert_close(values[0], values[1], rtol=0.02, atol=0.02)


def test_a_missing_graph_is_refused_with_the_way_out():
    student, teacher = small(0), small(1)
    teacher(PICTURES)
    with pytest.raises(ValueError, match=r"the teacher has no graph .* frozen\(network, keep_graph=True\)"):
        gradient_loss(student(PICTURES), frozen(teacher)(PICTURES))
    target = frozen(teacher, keep_graph=True)(PICTURES)
    with torch.no_grad():
        without = student(PICTURES)
    with pytest.raises(ValueError, match=r"the student has no graph .* must run with gradients"):
        gradient_loss(without, target)
    beside = student(PICTURES)
    beside.taps["stage0.post"] = beside.taps["stage0.post"].clone()
    with pytest.raises(ValueError, match=r"logits of the student are not computed from its tap 'stage0.post'"):
        gradient_loss(beside, target)
