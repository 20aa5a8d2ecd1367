import pytest
import torch
from torch import Tensor

from kd import Batch, Outputs, distillers
from kd.feature.cluster_separation import ClusterSeparation

LABELS = torch.tensor([0, 1, 3, 3, 4])
NUM_OLD = 2


def outputs(seed: int, num_classes: int, width: int = 8, dtype: torch.dtype = torch.float64) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(len(LABELS), width, generator=generator, dtype=torch.float64).to(dtype)
    return Outputs(torch.zeros(len(LABELS), num_classes, dtype=dtype), embedding)


def batch() -> Batch:
    return Batch(torch.zeros(len(LABELS), 1, 1, 1), LABELS, torch.arange(len(LABELS)))


def by_loops(z: Tensor, u: Tensor) -> float:
    total = 0.0
    for i, a in enumerate(LABELS.tolist()):
        for j, b in enumerate(LABELS.tolist()):
            weight = 4 if a == b else -4 if (a < NUM_OLD) != (b < NUM_OLD) else -1
            cosine = (z[i] @ u[j] / (z[i].norm() * u[j].norm())).item()
            total += weight * (1 - cosine)
    return 0.003 * total / len(LABELS) ** 2


def test_is_found_by_its_name():
    assert distillers["cluster_separation"] is ClusterSeparation


def test_is_the_weighted_mean_over_pairs():
    student, teacher = outputs(0, 5), outputs(1, NUM_OLD)
    assert student.embedding is not None
    assert teacher.embedding is not None
    expected = by_loops(student.embedding, teacher.embedding)
    assert abs(ClusterSeparation()(student, teacher, batch()).item() - expected) < 1e-15


def test_weights_tell_one_class_from_old_against_new_from_the_rest():
    weights = ClusterSeparation(same=2.0, across=-3.0, otherwise=-0.5).weights(LABELS, NUM_OLD)
    assert weights[2, 3] == weights[0, 0] == 2.0
    assert weights[0, 2] == weights[4, 1] == -3.0
    assert weights[0, 1] == weights[2, 4] == -0.5


def test_the_scale_multiplies():
    arguments = outputs(0, 5), outputs(1, NUM_OLD), batch()
    torch.testing.assert_close(ClusterSeparation(scale=0.6)(*arguments), 200 * ClusterSeparation()(*arguments))


def test_the_length_of_embeddings_does_not_matter():
    student, teacher = outputs(0, 5), outputs(1, NUM_OLD)
    assert student.embedding is not None
    longer = Outputs(student.logits, 7 * student.embedding)
    loss = ClusterSeparation()
    torch.testing.assert_close(loss(longer, teacher, batch()), loss(student, teacher, batch()))


def test_embeddings_that_agree_on_one_class_have_no_loss():
    one_class = Batch(torch.zeros(5, 1, 1, 1), torch.zeros(5, dtype=torch.int64), torch.arange(5))
    same = Outputs(torch.zeros(5, 1), torch.ones(5, 8))
    assert ClusterSeparation()(same, same, one_class).abs() < 1e-8


def test_no_gradient_reaches_the_teacher_and_a_zero_embedding_is_harmless():
    student, teacher = outputs(0, 5), outputs(1, NUM_OLD)
    assert student.embedding is not None
    assert teacher.embedding is not None
    student.embedding[0] = 0
    student.embedding.requires_grad_()
    teacher.embedding.requires_grad_()
    ClusterSeparation()(student, teacher, batch()).backward()
    assert teacher.embedding.grad is None
    assert student.embedding.grad is not None
    assert student.embedding.grad.isfinite().all()


def test_is_computed_in_float32_under_autocast():
    student, teacher = outputs(0, 5, dtype=torch.float32), outputs(1, NUM_OLD, dtype=torch.float32)
    plain = ClusterSeparation()(student, teacher, batch())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ClusterSeparation()(student, teacher, batch()), plain)
    narrow = ClusterSeparation()(outputs(0, 5, dtype=torch.bfloat16), teacher, batch())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (Outputs(torch.zeros(5, 5)), outputs(1, NUM_OLD), "gives none"),
        (outputs(0, 5), outputs(1, NUM_OLD, width=6), r"\(5, 8\).*\(5, 6\)"),
    ],
)
def test_embeddings_that_cannot_be_compared_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        ClusterSeparation()(student, teacher, batch())


def test_a_negative_scale_is_refused():
    with pytest.raises(ValueError, match="scale must not be negative, found -1"):
        ClusterSeparation(scale=-1.0)
