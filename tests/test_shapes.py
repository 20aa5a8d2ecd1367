"""The tests check every shape that a signature promises: this one fails if they do not."""

import pytest
import torch
from jaxtyping import TypeCheckError

from cil.learners.dkt_losses import binary_cross_entropy
from cil.models.heads import GrowingLinear
from kd import Outputs
from kd.feature.cluster_separation import ClusterSeparation


def test_a_wrong_shape_is_an_error() -> None:
    scores, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    binary_cross_entropy(scores, labels)
    with pytest.raises(TypeCheckError, match=r"f32\[4,3,1\]"):
        binary_cross_entropy(scores[..., None], labels)
    with pytest.raises(TypeCheckError, match="batch"):
        binary_cross_entropy(scores, labels[:3])
    with pytest.raises(TypeCheckError, match="Int"):
        binary_cross_entropy(scores, labels.float())


def test_a_wrong_shape_inside_a_module_is_an_error() -> None:
    head = GrowingLinear(5)
    head.grow(2)
    with pytest.raises(TypeCheckError, match=r"f32\[1,4,5\]"):
        head(torch.randn(1, 4, 5))


def test_a_wrong_shape_in_kd_and_in_a_data_class_is_an_error() -> None:
    with pytest.raises(TypeCheckError, match="width"):
        ClusterSeparation().cosine(torch.randn(4, 3), torch.randn(4, 5))
    with pytest.raises(TypeCheckError, match="logits"):
        Outputs(torch.randn(4))
