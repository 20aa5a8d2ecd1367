import pytest
import torch

from cil.models.heads import GrowingLinear, PlasticityClassifier, StabilityClassifier

WIDTH = 12


def test_a_head_without_classes_scores_nothing():
    assert GrowingLinear(WIDTH)(torch.zeros(2, WIDTH)).shape == (2, 0)


def test_old_rows_stay_when_a_head_grows():
    head = GrowingLinear(WIDTH)
    head.grow(3)
    before = head(torch.ones(1, WIDTH))
    head.grow(5)
    after = head(torch.ones(1, WIDTH))
    assert after.shape == (1, 8)
    assert head.out_features == 8
    assert torch.equal(after[:, :3], before)


def test_old_biases_are_drawn_anew_only_if_asked_for():
    head = GrowingLinear(WIDTH, keep_bias=False)
    head.grow(3)
    weight, bias = head.weight.clone(), head.bias.clone()
    head.grow(2)
    assert torch.equal(head.weight[:3], weight)
    assert not torch.equal(head.bias[:3], bias)
    assert (head.bias.abs() <= WIDTH**-0.5).all()


def test_new_rows_have_the_format_of_the_old_and_learn():
    head = GrowingLinear(WIDTH).double().requires_grad_(False)
    head.grow(2)
    assert head.weight.dtype == head.bias.dtype == torch.float64
    assert head.weight.requires_grad


def classifiers() -> tuple[StabilityClassifier, PlasticityClassifier]:
    """Two classifiers with 5 and 3 classes, in which no parameter is trivial."""
    torch.manual_seed(0)
    pair = StabilityClassifier(WIDTH).double(), PlasticityClassifier(WIDTH).double()
    for classifier, num_classes in zip(pair, (5, 3), strict=True):
        classifier.head.grow(num_classes)
        for parameter in classifier.parameters():
            torch.nn.init.normal_(parameter)
    return pair


EMBEDDINGS = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_a_merge_preserves_every_score():
    stability, plasticity = classifiers()
    before = torch.cat([stability(EMBEDDINGS), plasticity(EMBEDDINGS)], dim=1)
    stability.absorb(plasticity)
    torch.testing.assert_close(stability(EMBEDDINGS), before, rtol=0, atol=1e-12)
    assert torch.equal(stability.norm.weight, torch.ones(WIDTH, dtype=torch.float64))


def test_merging_again_preserves_every_score_again():
    stability, plasticity = classifiers()
    stability.absorb(plasticity)
    before = torch.cat([stability(EMBEDDINGS), plasticity(EMBEDDINGS)], dim=1)
    stability.absorb(plasticity)
    torch.testing.assert_close(stability(EMBEDDINGS), before, rtol=0, atol=1e-12)


def test_the_merge_of_the_release_keeps_one_norm_and_no_bias():
    stability, plasticity = classifiers()
    weights, norm = torch.cat([stability.head.weight, plasticity.head.weight]), stability.norm.weight.clone()
    biases = torch.cat([stability.head.bias, plasticity.head.bias])
    stability.absorb(plasticity, merge_norm=False, merge_bias=False)
    assert torch.equal(stability.head.weight, weights)
    assert torch.equal(stability.norm.weight, norm)
    assert (stability.head.bias.abs() <= WIDTH**-0.5).all()
    assert not (stability.head.bias == biases).any()


def test_drawing_only_the_biases_anew_moves_each_score_by_a_constant():
    stability, plasticity = classifiers()
    before = torch.cat([stability(EMBEDDINGS), plasticity(EMBEDDINGS)], dim=1)
    stability.absorb(plasticity, merge_bias=False)
    moved = stability(EMBEDDINGS) - before
    assert moved.abs().max() > 1e-3
    torch.testing.assert_close(moved, moved[:1].expand_as(moved), rtol=0, atol=1e-12)


def test_losing_only_the_norm_of_the_absorbed_classifier_leaves_the_old_scores_alone():
    stability, plasticity = classifiers()
    old, new = stability(EMBEDDINGS), plasticity(EMBEDDINGS)
    biases = torch.cat([stability.head.bias, plasticity.head.bias])
    stability.absorb(plasticity, merge_norm=False)
    after = stability(EMBEDDINGS)
    torch.testing.assert_close(after[:, :5], old)
    assert torch.equal(stability.head.bias, biases)
    assert (after[:, 5:] - new).abs().max() > 1e-3


def test_the_absorbed_classifier_is_not_changed():
    stability, plasticity = classifiers()
    before = plasticity(EMBEDDINGS)
    stability.absorb(plasticity)
    assert torch.equal(plasticity(EMBEDDINGS), before)


@pytest.mark.parametrize("merge_norm", [True, False])
def test_merged_parameters_learn(merge_norm):
    stability, plasticity = classifiers()
    stability.requires_grad_(False)
    stability.absorb(plasticity, merge_norm=merge_norm)
    assert stability.head.weight.requires_grad
    assert stability.head.weight.is_leaf
