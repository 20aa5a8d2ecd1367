import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd import Batch, Outputs, distillers
from kd.distributed import all_reduce_sum, rank, world_size
from kd.feature.crd import CRD
from kd.feature.crd_sampling import ClassBlocks
from tests.kd.processes import in_processes

IDS = torch.tensor([40, 7, 901, 3, 12, 55, 8, 100, 2, 61])
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 0])
WIDTHS = 5, 7  # of student and teacher


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(embedding: Tensor) -> Outputs:
    return Outputs(embedding.new_zeros(len(embedding), 2), embedding)


def batch_of(ids: Tensor) -> Batch:
    return Batch(torch.zeros(len(ids), 1, 1, 1), torch.zeros(len(ids), dtype=torch.int64), ids)


def made(**settings: Any) -> CRD:
    """Connected and told its samples; equal arguments make equal ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crd = CRD(**{"embedding_width": 4, "num_negatives": 3} | settings)
        crd.connect(outputs(draw(0, 2, 5).float()), outputs(draw(0, 2, 7).float()))
        crd.remember(IDS, LABELS)
    return crd.double()


def features(step: int, rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled features of student and teacher, and whose they are."""
    ids = IDS[torch.randperm(len(IDS), generator=torch.Generator().manual_seed(step))[:rows]]
    return draw(2 * step, rows, 5).requires_grad_(), draw(2 * step + 1, rows, 7).requires_grad_(), ids


def loss(crd: CRD, step: int) -> Tensor:
    student, teacher, ids = features(step)
    value: Tensor = crd(outputs(student), outputs(teacher), batch_of(ids))
    return value


def as_written(crd: CRD, v: Tensor, bank: Tensor) -> Tensor:
    """Half of the loss as in the docstring, the first batch; `bank` [batch, candidates, width]."""
    n, k = len(crd.memory), bank.shape[1] - 1
    scores = torch.exp((bank * v[:, None]).sum(2) / crd.temperature)
    x = scores / (scores.detach().mean() * n)
    told = torch.log(x[:, 0] / (x[:, 0] + k / n + crd.eps)).sum()
    told = told + torch.log((k / n) / (x[:, 1:] + k / n + crd.eps)).sum()
    return -told / len(v)


# The draws


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=6), part=st.floats(0, 1), seed=st.integers(0, 99))
def test_negatives_are_of_other_classes_and_distinct(sizes, part, seed):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    count = max(1, round(part * (len(labels) - max(sizes))))
    rows = torch.arange(len(labels))
    found = ClassBlocks.of(labels).negatives(rows, count, torch.Generator().manual_seed(seed))
    assert found.shape == (len(labels), count)
    assert (labels[found] != labels[:, None]).all()
    assert all(len(set(row)) == count for row in found.tolist())


def test_as_many_negatives_as_there_are_is_all_of_them():
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([4, 4, 4]))
    found = ClassBlocks.of(labels).negatives(torch.tensor([0, 5]), 8, torch.Generator().manual_seed(0))
    assert found.sort(1).values.tolist() == [[4, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 8, 9, 10, 11]]


def test_negatives_repeat_only_for_classes_that_have_too_few():
    labels = torch.repeat_interleave(torch.arange(2), torch.tensor([6, 3]))
    found = ClassBlocks.of(labels).negatives(torch.tensor([0, 7]), 5, torch.Generator().manual_seed(0))
    assert set(found[0].tolist()) <= {6, 7, 8}
    assert len(set(found[1].tolist()) & set(range(6))) == 5
    everywhere = ClassBlocks.of(labels).negatives(torch.tensor([0, 7]), 200, torch.Generator().manual_seed(0))
    assert [set(row) for row in everywhere.tolist()] == [{6, 7, 8}, set(range(6))]


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 3, 7)])
def test_negatives_and_pairs_of_them_are_equally_likely(sizes):
    """Every negative is drawn with probability K/N, every two with K(K-1)/(N(N-1)), for each sample and each two."""
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    count, num_draws, num_rows = 3, 2000, len(labels)
    blocks, generator = ClassBlocks.of(labels), torch.Generator().manual_seed(0)
    rows = torch.tensor([0, num_rows - 1])
    drawn = torch.zeros(num_draws, 2, num_rows, dtype=torch.float64)
    for number in range(num_draws):
        drawn[number].scatter_(1, blocks.negatives(rows, count, generator), 1.0)
    for sample in range(2):
        others = labels != labels[rows[sample]]
        rest = int(others.sum())
        pairs = drawn[:, sample].T @ drawn[:, sample] / num_draws
        assert not pairs[~others].any()
        once, twice = count / rest, count * (count - 1) / (rest * (rest - 1))
        off_diagonal = pairs[others][:, others][~torch.eye(rest, dtype=torch.bool)]
        spread = [5 * math.sqrt(p * (1 - p) / num_draws) for p in (once, twice)]  # five standard errors
        torch.testing.assert_close(pairs.diagonal()[others], torch.full((rest,), once).double(), rtol=0, atol=spread[0])
        torch.testing.assert_close(off_diagonal, torch.full_like(off_diagonal, twice), rtol=0, atol=spread[1])
    both = (drawn[:, 0].T @ drawn[:, 1]) / num_draws  # one sample's negatives say nothing about the other's
    apart = drawn[:, 0].mean(0)[:, None] * drawn[:, 1].mean(0)
    torch.testing.assert_close(both, apart, rtol=0, atol=5 * math.sqrt(0.25 / num_draws))


def test_relaxed_positives_are_any_of_the_class():
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([2, 5, 3]))
    found = ClassBlocks.of(labels).positives(torch.full((2000,), 4), torch.Generator().manual_seed(0))
    counts = torch.bincount(found, minlength=10)
    assert counts[2:7].sum() == 2000
    assert counts[2:7].min() > 400 - 5 * math.sqrt(2000 * 0.2 * 0.8)


# The loss


def test_is_found_by_its_name():
    assert distillers["crd"] is CRD


@pytest.mark.parametrize("num_candidates", [4, 1])
def test_is_the_formula_with_its_gradients(num_candidates):
    """With one candidate rows are gathered, with four the whole bank is multiplied."""
    crd = made(embedding_width=4 if num_candidates > 1 else 2)
    student, teacher, ids = features(0)
    candidates = torch.cat([ids[:, None], IDS[torch.arange(12).view(4, 3) % 10]], dim=1)[:, :num_candidates]
    if num_candidates == 1:
        candidates = torch.cat([candidates, IDS[:4, None]], dim=1)
    banks = crd.memory.recall(candidates.flatten())
    v = [
        torch.nn.functional.normalize(crd.embeds[side](x), dim=1)
        for side, x in (("student", student), ("teacher", teacher.detach()))
    ]
    shape = (*candidates.shape, crd.embedding_width)
    halves = [as_written(crd, v[0], banks["teacher"].view(shape)), as_written(crd, v[1], banks["student"].view(shape))]
    found = crd.step(student, teacher, ids, candidates)
    torch.testing.assert_close([found.student_loss, found.teacher_loss], halves)
    leaves = [student, *crd.auxiliary_parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found.student_loss + found.teacher_loss, leaves), torch.autograd.grad(sum(halves), leaves)
    )


def test_the_student_half_reaches_the_student_the_other_only_its_layer():
    crd = made()
    student, teacher, ids = features(0)
    contrast = crd.step(student, teacher, ids, IDS[torch.arange(16).view(4, 4) % 10])
    leaves = [student, crd.embeds["student"].weight, crd.embeds["teacher"].weight, teacher]
    reached = [
        [gradient is not None for gradient in torch.autograd.grad(half, leaves, allow_unused=True, retain_graph=True)]
        for half in (contrast.student_loss, contrast.teacher_loss)
    ]
    assert reached == [[True, True, False, False], [False, False, True, False]]


@settings(max_examples=15)
@given(scale=st.floats(1e-3, 1e3), step=st.integers(0, 20))
def test_the_length_of_embeddings_does_not_matter(scale, step):
    plain, scaled = made(), made()
    with torch.no_grad():
        for layer in scaled.embeds.values():
            layer.weight *= scale
            layer.bias *= scale
    torch.testing.assert_close(loss(plain, step), loss(scaled, step))


def test_the_loss_is_a_number_without_dimension():
    value = loss(made(), 0)
    assert value.shape == ()
    assert value > 0


def test_without_gradients_the_loss_is_the_same():
    with torch.no_grad():
        value = loss(made(), 0)
    assert not value.requires_grad
    torch.testing.assert_close(value, loss(made(), 0).detach())


def test_relaxed_positives_change_the_loss():
    assert loss(made(positives="relax"), 0) != loss(made(), 0)


@pytest.mark.parametrize("temperature", [0.07, 0.004])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_computed_in_float32_and_finite_under_autocast(dtype, temperature):
    crd = made(temperature=temperature).float()
    student = torch.tensor([[120.0, -120.0, 0, 0, 300], [0, 0, 0, 0, 1e-6]], dtype=dtype, requires_grad=True)
    teacher = torch.full((2, 7), -120.0, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        value = crd(outputs(student), outputs(teacher), batch_of(IDS[:2]))
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    wide = made(temperature=temperature)(outputs(student.double()), outputs(teacher.double()), batch_of(IDS[:2]))
    torch.testing.assert_close(value.double(), wide, rtol=1e-4, atol=0)


# What is kept


def test_rows_move_towards_what_was_seen():
    crd = made(momentum=0.25)
    student, teacher, ids = features(0)
    before = crd.memory.recall(IDS)
    crd(outputs(student), outputs(teacher), batch_of(ids))
    seen = torch.isin(IDS, ids)
    for side, x in (("student", student), ("teacher", teacher)):
        v = torch.nn.functional.normalize(crd.embeds[side](x), dim=1)
        moved = torch.nn.functional.normalize(0.25 * made().memory.recall(ids)[side] + 0.75 * v, dim=1)
        torch.testing.assert_close(crd.memory.recall(ids)[side], moved)
        torch.testing.assert_close(crd.memory.recall(IDS)[side][~seen], before[side][~seen], rtol=0, atol=0)


def test_of_a_sample_that_is_twice_in_a_batch_the_last_place_counts():
    twice, last = made(), made()
    student = features(0)[0]
    twice.memory.update("student", twice.memory.rows(IDS[[3, 1, 3, 3]]), student[:, :4].detach(), 0.5)
    last.memory.update("student", last.memory.rows(IDS[[1, 3]]), student[[1, 3], :4].detach(), 0.5)
    torch.testing.assert_close(twice.memory.recall(IDS), last.memory.recall(IDS), rtol=0, atol=0)


def test_z_is_that_of_the_first_batch_until_samples_arrive():
    crd = made()
    assert crd.memory.normalizers().isnan().all()
    loss(crd, 0)
    first = crd.memory.normalizers()
    assert (first > 0).all()
    loss(crd, 1)
    torch.testing.assert_close(crd.memory.normalizers(), first, rtol=0, atol=0)
    crd.remember(IDS, LABELS)
    torch.testing.assert_close(crd.memory.normalizers(), first, rtol=0, atol=0)
    crd.remember(torch.tensor([5]), torch.tensor([1]))
    assert crd.memory.normalizers().isnan().all()


def test_samples_that_arrive_leave_the_rows_of_the_others():
    crd = made()
    loss(crd, 0)
    before = crd.memory.recall(IDS)
    crd.remember(torch.tensor([5, 40, 1000, 6]), torch.tensor([1, 0, 7, 0]))
    assert len(crd.memory) == len(IDS) + 3
    torch.testing.assert_close(crd.memory.recall(IDS), before, rtol=0, atol=0)
    fresh = crd.memory.recall(torch.tensor([5, 1000, 6]))
    for rows in fresh.values():
        assert (rows.abs() <= math.sqrt(3 / 4)).all()
        assert len(rows.unique()) == 12
    assert loss(crd, 1).isfinite()


def test_fresh_rows_are_uniform():
    crd = CRD(embedding_width=12)
    crd.remember(torch.arange(2000), torch.arange(2000) % 2)
    for rows in crd.memory.recall(torch.arange(2000)).values():
        assert rows.abs().max() <= 0.5
        assert rows.mean().abs() < 0.01
        assert rows.std() == pytest.approx(0.5 / math.sqrt(3), rel=0.02)


def test_goes_on_from_its_state_dict_as_if_it_had_not_stopped():
    whole = made()
    losses = [loss(whole, step).item() for step in range(4)]
    part = made()
    assert [loss(part, step).item() for step in range(2)] == losses[:2]
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    resumed = CRD(embedding_width=4, num_negatives=3).double()
    resumed.connect(outputs(draw(5, 2, 5)), outputs(draw(5, 2, 7)))
    resumed.double().load_state_dict(torch.load(file, weights_only=True))
    assert [loss(resumed, step).item() for step in (2, 3)] == losses[2:]
    torch.testing.assert_close(resumed.memory.recall(IDS), whole.memory.recall(IDS), rtol=0, atol=0)
    torch.testing.assert_close(part.memory.recall(IDS)["student"], copy.deepcopy(part).memory.recall(IDS)["student"])


def test_draws_are_new_in_every_step_but_the_same_in_a_repetition():
    crd = made(momentum=0.0)
    student, teacher, ids = features(0)
    again = [crd(outputs(student), outputs(teacher), batch_of(ids)).item() for _ in range(3)]
    assert len(set(again)) == 3
    assert loss(made(), 0).item() == loss(made(), 0).item()


def test_evaluation_changes_nothing():
    crd = made().eval()
    before = copy.deepcopy(crd.state_dict())
    value = loss(crd, 0)
    torch.testing.assert_close(crd.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(value, loss(made(), 0))


def test_banks_follow_the_module_but_are_not_sent_by_distributed_training():
    crd = made()
    assert crd.memory.bank("student").dtype == torch.float64
    assert crd.float().memory.bank("student").dtype == torch.float32
    assert not list(crd.buffers())
    assert len(crd.auxiliary_parameters()) == 4


def train_a_share(num_steps: int) -> tuple[list[float], list[Tensor], dict[str, Tensor]]:
    """Losses, averaged gradients of the layers and banks; with two processes one sees 3 rows of 4, the other 1."""
    torch.manual_seed(rank())  # the processes need not agree on anything but the samples
    crd = made()
    if world_size() > 1:
        crd = CRD(embedding_width=4, num_negatives=3)
        crd.connect(outputs(draw(0, 2, 5)), outputs(draw(0, 2, 7)))
        crd.remember(IDS, LABELS)
        crd.double().load_state_dict(made().state_dict())
    mine = slice(0, 4) if world_size() == 1 else (slice(0, 3), slice(3, 4))[rank()]
    values, gradients = [], []
    for step in range(num_steps):
        student, teacher, ids = features(step)
        value = crd(outputs(student[mine]), outputs(teacher[mine]), batch_of(ids[mine]))
        values.append(value.item())
        for gradient in torch.autograd.grad(value, [student, *crd.parameters()]):
            gradients.append(all_reduce_sum(gradient) / world_size())
    return values, gradients, crd.memory.recall(IDS)


def keys_of_processes() -> tuple[Any, Tensor]:
    torch.manual_seed(rank())
    crd = CRD()
    crd.remember(IDS, LABELS)
    return crd.memory.get_extra_state()["key"], crd.memory.recall(IDS)["student"]


def test_two_processes_compute_what_one_does_and_keep_equal_banks():
    alone = train_a_share(3)
    for found in in_processes(train_a_share, 3):
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-13)


def test_processes_agree_on_draws_even_if_their_seeds_differ():
    (key, rows), (other_key, other_rows) = in_processes(keys_of_processes)
    assert key == other_key
    torch.testing.assert_close(rows, other_rows, rtol=0, atol=0)


# Errors


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"embedding_width": 0}, "crd.embedding_width must be at least 1"),
        ({"num_negatives": 0}, "crd.num_negatives must be at least 1"),
        ({"temperature": 0.0}, "crd.temperature must be above 0"),
        ({"temperature": math.nan}, "crd.temperature must be above 0"),
        ({"momentum": 1.0}, "crd.momentum"),
        ({"eps": -1e-9}, "crd.eps"),
        ({"positives": "other"}, "positives"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises((ValueError, TypeError), match=words):
        CRD(**settings)


def test_what_is_missing_is_said():
    crd = CRD(embedding_width=4, num_negatives=3)
    with pytest.raises(ValueError, match="call remember"):
        loss(crd, 0)
    crd.remember(IDS, LABELS)
    with pytest.raises(ValueError, match="call connect"):
        loss(crd, 0)
    with pytest.raises(ValueError, match="the teacher gives no embedding"):
        crd.connect(outputs(draw(0, 2, 5)), Outputs(draw(0, 2, 3)))


def test_samples_it_was_not_told_of_are_named():
    student, teacher, ids = features(0)
    with pytest.raises(ValueError, match=r"remembers 10 samples.*\[999\]"):
        made()(outputs(student), outputs(teacher), batch_of(torch.cat([ids[:3], torch.tensor([999])])))


def test_a_sample_with_two_labels_is_refused():
    with pytest.raises(ValueError, match=r"two for the samples with ids \[40\]"):
        made().remember(torch.tensor([40]), torch.tensor([1]))


def test_one_class_alone_has_no_negatives():
    crd = CRD(embedding_width=4, num_negatives=3)
    crd.connect(outputs(draw(0, 2, 5)), outputs(draw(0, 2, 7)))
    crd.remember(IDS, torch.zeros_like(LABELS))
    with pytest.raises(ValueError, match="one class only"):
        loss(crd, 0)
