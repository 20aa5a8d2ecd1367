import pytest
import torch
import torch.nn.functional as F

from cil.learners.dkt_losses import binary_cross_entropy, dkt_losses
from cil.learners.dytox_losses import divergence_loss, dytox_losses
from kd import Batch, Outputs, WeightedSum
from kd.feature.cluster_separation import ClusterSeparation
from kd.logit.kd import KD

LABELS = torch.tensor([0, 4, 2, 4, 1])
BATCH = Batch(torch.zeros(5, 1, 1, 1), LABELS, torch.arange(5))
NUM_OLD, NUM_CLASSES = 3, 5


def outputs(seed: int, num_classes: int, dtype: torch.dtype = torch.float64) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    logits, embedding = (
        torch.randn(5, width, generator=generator, dtype=torch.float64).to(dtype) for width in (num_classes, 8)
    )
    return Outputs(logits.requires_grad_(), embedding.requires_grad_())


def losses(base_weight: float = 1.0, **changed: object) -> dict[str, torch.Tensor]:
    arguments = {"distillation": WeightedSum({"kd": (2.0, KD())}), "separation": ClusterSeparation()} | changed
    student, teacher = outputs(0, NUM_CLASSES), outputs(1, NUM_OLD)
    return dkt_losses(student, teacher, BATCH, base_weight=base_weight, **arguments)  # type: ignore[arg-type]


def test_the_base_loss_is_the_mean_over_samples_and_classes():
    logits = outputs(0, NUM_CLASSES).logits
    chosen = torch.zeros(5, NUM_CLASSES).bool()
    chosen[torch.arange(5), LABELS] = True
    expected = -torch.where(chosen, F.logsigmoid(logits), F.logsigmoid(-logits)).mean()
    torch.testing.assert_close(binary_cross_entropy(logits, LABELS), expected)


def test_without_a_teacher_there_is_only_the_whole_base_loss():
    student = outputs(0, NUM_CLASSES)
    found = dkt_losses(
        student,
        None,
        BATCH,
        distillation=WeightedSum({"kd": (2.0, KD())}),
        separation=ClusterSeparation(),
        base_weight=2.0,
    )
    assert list(found) == ["bce"]
    torch.testing.assert_close(found["bce"], binary_cross_entropy(student.logits, LABELS))


def test_terms_are_weighted_by_the_share_of_old_classes():
    found = losses(base_weight=2.0)
    student, teacher = outputs(0, NUM_CLASSES), outputs(1, NUM_OLD)
    share = NUM_OLD / NUM_CLASSES
    torch.testing.assert_close(found["bce"], 2 * (1 - share) * binary_cross_entropy(student.logits, LABELS))
    torch.testing.assert_close(found["kd"], share * 2.0 * KD()(student.first(NUM_OLD), teacher, BATCH))
    torch.testing.assert_close(found["separation"], ClusterSeparation()(student, teacher, BATCH))
    assert list(found) == ["bce", "kd", "separation"]


def test_terms_can_be_left_out():
    assert list(losses(distillation=None)) == ["bce", "separation"]
    assert list(losses(separation=None)) == ["bce", "kd"]


def test_no_gradient_reaches_the_teacher():
    student, teacher = outputs(0, NUM_CLASSES), outputs(1, NUM_OLD)
    found = dkt_losses(
        student,
        teacher,
        BATCH,
        distillation=WeightedSum({"kd": (1.0, KD())}),
        separation=ClusterSeparation(),
        base_weight=1.0,
    )
    sum(found.values(), torch.zeros(())).backward()
    assert teacher.logits.grad is None
    assert teacher.embedding is not None
    assert teacher.embedding.grad is None
    assert student.logits.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_outputs_give_losses_in_float32(dtype):
    found = dkt_losses(
        outputs(0, NUM_CLASSES, dtype),
        outputs(1, NUM_OLD, dtype),
        BATCH,
        distillation=WeightedSum({"kd": (1.0, KD())}),
        separation=ClusterSeparation(),
        base_weight=1.0,
    )
    assert {loss.dtype for loss in found.values()} == {torch.float32}


def test_the_divergence_head_learns_old_as_its_first_class():
    scores = outputs(2, 1 + NUM_CLASSES - NUM_OLD).logits
    expected = binary_cross_entropy(scores, torch.tensor([0, 2, 0, 2, 0]))
    torch.testing.assert_close(divergence_loss(scores, LABELS, NUM_OLD), expected)


def test_dytox_adds_divergence_to_base_and_distillation():
    student, teacher = outputs(0, NUM_CLASSES), outputs(1, NUM_OLD)
    scores = outputs(2, 1 + NUM_CLASSES - NUM_OLD).logits
    distillation = WeightedSum({"kd": (2.0, KD())})

    def found(teacher: Outputs | None, divergence: torch.Tensor | None, **changed: object) -> dict[str, torch.Tensor]:
        return dytox_losses(
            student,
            teacher,
            BATCH,
            distillation=distillation,
            divergence=divergence,
            divergence_weight=0.1,
            **changed,  # type: ignore[arg-type]
        )

    terms = found(teacher, scores)
    assert list(terms) == ["bce", "kd", "divergence"]
    torch.testing.assert_close(terms["divergence"], 0.1 * divergence_loss(scores, LABELS, NUM_OLD))
    assert list(found(None, scores)) == ["bce", "divergence"]
    assert list(found(None, None)) == ["bce"]
    summed = found(teacher, scores, base_reduction="batchmean")
    torch.testing.assert_close(summed["bce"], NUM_CLASSES * terms["bce"])
    torch.testing.assert_close(summed["divergence"], (1 + NUM_CLASSES - NUM_OLD) * terms["divergence"])
    assert summed["kd"].equal(terms["kd"])
