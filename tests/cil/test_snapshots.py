import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cil import snapshots
from cil.build import Run
from cil.checking import check
from cil.cli import compose
from cil.models.network import Network, models
from cil.models.patches import PatchNetwork
from cil.report.snapshots import FORMAT, read_snapshots
from cil.snapshots import (
    LARGEST_EXEMPLAR,
    MOST_EXAMPLES,
    MOST_EXEMPLARS,
    best_exemplars,
    evidence,
    examples,
    principal,
    spread,
    thumbnails,
)
from tests.conftest import run_tiny_in, tiny_command
from tests.run_folders import assert_same_weights, facts_of, metrics_of, results_of, weights_of

SMALL: dict[str, dict[str, Any]] = {
    "dkt": {"width": 16, "num_heads": 2, "depth": 2, "mlp_ratio": 1, "stem_width": 8, "pool_stride": 1},
    "dytox": {"width": 16, "num_heads": 2, "depth": 2, "mlp_ratio": 1, "patch_size": 2},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of DKT; not to be changed."""
    return run_tiny_in(tmp_path_factory.mktemp("with"), report=False)


def patch_network(name: str) -> PatchNetwork:
    torch.manual_seed(0)
    network: PatchNetwork = models[name]((1, 8, 8), **SMALL[name])
    for _ in range(3):
        network.grow(2)
    return network.double().eval()


def test_a_run_without_snapshots_has_the_bits_of_one_with_them(run: Path, tmp_path: Path) -> None:
    without = run_tiny_in(tmp_path, "snapshots=false", report=False)
    assert not list(without.glob("stage_*/report"))
    assert results_of(without) == results_of(run)
    assert facts_of(without) == facts_of(run)
    assert_same_weights(weights_of(without), weights_of(run))


def test_every_stage_keeps_what_the_report_shows(run: Path) -> None:
    kept = read_snapshots(run)
    assert [snapshot.stage for snapshot in kept] == [0, 1, 2]
    for snapshot in kept:
        num_classes = 2 * (snapshot.stage + 1)
        assert snapshot.class_names == [str(digit) for digit in range(num_classes)]
        assert snapshot.facts["maps"] == "attention"
        assert len(snapshot.facts["examples"]) == MOST_EXAMPLES
        shapes = {name: snapshot.array(name) for name in ("examples", "maps", "embedding", "exemplars")}
        assert all(array is not None for array in shapes.values())
        assert (snapshot.array("token_distances") is not None) == (snapshot.stage > 0)


def test_the_confusion_matrix_holds_the_accuracies_that_the_run_tells(run: Path) -> None:
    metrics = metrics_of(run)
    for snapshot in read_snapshots(run):
        confusion = snapshot.confusion
        row = [
            confusion[i : i + 2, :].diagonal(i).sum() / confusion[i : i + 2].sum() for i in range(0, len(confusion), 2)
        ]
        assert row == pytest.approx(metrics["accuracy_matrix"][snapshot.stage][: snapshot.stage + 1])


def test_examples_carry_what_the_network_said_of_them(run: Path) -> None:
    last = read_snapshots(run)[-1]
    right = [said["label"] == said["answer"] for said in last.facts["examples"]]
    assert right == sorted(right, reverse=True)
    assert all(0 < said["score"] <= 1 for said in last.facts["examples"])


def test_a_snapshot_is_small(run: Path) -> None:
    for snapshot in read_snapshots(run):
        assert sum(path.stat().st_size for path in snapshot.folder.iterdir()) < 40_000


def test_writer_and_reader_speak_of_one_format() -> None:
    assert snapshots.FORMAT == FORMAT


@pytest.mark.parametrize(
    ("learner", "model", "kind"),
    [
        ("finetune", "resnet20", "class_activation"),
        ("icarl", "resnet20", "class_activation"),
        ("podnet", "resnet20", None),
    ],
)
def test_convolutional_learners_show_class_maps_where_they_have_them(
    tmp_path: Path, learner: str, model: str, kind: str | None
) -> None:
    words = tiny_command(tmp_path, f"model={model}", "model.width=4", learner=learner)
    parts = Run.build(check(compose(words)))
    parts.learner.network.grow(2)
    stage = parts.stage(0)
    means = None
    if parts.learner.read_by == "nearest_mean":
        means = torch.nn.functional.normalize(torch.ones(2, parts.learner.network.embedding_width))
    counts = parts.reader.count(parts.learner, parts.samples.eval_images, parts.samples.eval_labels, (2,), means)
    before = {name: value.clone() for name, value in parts.learner.state_dict().items()}
    facts, arrays = snapshots.snapshot(parts, stage, counts, means)
    assert facts["maps"] == kind
    assert facts["read_by"] == parts.learner.read_by
    assert ("maps" in arrays) == (kind is not None)
    assert parts.learner.network.exposed == ()
    assert all(value.equal(before[name]) for name, value in parts.learner.state_dict().items())
    json.dumps(facts, allow_nan=False)


@pytest.mark.parametrize("name", SMALL)
def test_attention_is_that_of_the_decoder(name: str) -> None:
    """The decoder's answer is its values weighted by what is shown: with all values 1 it is the attention's sum."""
    network = patch_network(name)
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        looks = network.attention(images)
    assert looks.shape == (3, 4, 4)
    assert bool((looks > 0).all())
    assert bool((looks.sum(dim=(1, 2)) < 1).all())  # the rest goes to tokens


def test_the_looks_of_the_skab_are_the_weights_of_its_answer() -> None:
    network: Any = patch_network("dkt")
    attention = network.skab.attention
    queries, context = torch.rand(2, 1, 16, dtype=torch.float64), torch.rand(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        weights = attention.weights(queries, context)
        values = attention.v(context).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        answers = attention.proj((weights @ values).transpose(1, 2).flatten(2))
        assert torch.allclose(answers, attention(queries, context))
    assert torch.allclose(weights.sum(dim=-1), torch.ones(2, 2, 1, dtype=torch.float64))


def test_the_looks_of_class_attention_are_the_weights_of_its_answer() -> None:
    """With values that are 1 for patches and 0 for tokens, an answer is what the token looks at patches."""
    network: Any = patch_network("dytox")
    attention = network.decoder[-1].attention
    tasks, patches = torch.rand(1, 3, 16, dtype=torch.float64), torch.rand(2, 9, 16, dtype=torch.float64)
    patches[..., 0], tasks[..., 0] = 1, 0
    attention.v.weight.data.zero_()
    attention.v.weight.data[:, 0] = 1
    attention.proj.weight.data.copy_(torch.eye(16))
    attention.proj.bias.data.zero_()
    with torch.no_grad():
        per_head = attention(tasks, patches).unflatten(2, (2, 8)).mean(dim=(2, 3))
        assert torch.allclose(per_head, attention.looks(tasks, patches).sum(dim=2))


@pytest.mark.parametrize("name", SMALL)
def test_task_tokens_come_in_the_order_of_tasks(name: str) -> None:
    network = patch_network(name)
    tokens = network.tokens_of_tasks()
    newest: dict[str, Any] = {"dkt": lambda n: n.token_pool.task_tokens[-1], "dytox": lambda n: n.task_tokens[-1]}
    assert tokens.shape == (3, 16)
    assert tokens[-1].equal(newest[name](network).flatten())


def test_networks_without_class_maps_show_none() -> None:
    assert evidence(Network((3, 8, 8), 4)) is None


def test_images_are_spread_over_classes() -> None:
    labels = torch.tensor([0, 1, -1, 0, 1, 2, 0, 2, 3])
    assert spread(labels, 3, 6).tolist() == [0, 3, 1, 4, 5, 7]
    assert spread(labels, 3, 400).tolist() == [0, 3, 6, 1, 4, 5, 7]
    assert spread(labels, 4, 2).tolist() == [0, 8]


@pytest.mark.parametrize(("num_right", "num_wrong"), [(0, 30), (30, 0), (3, 30), (30, 3), (30, 30), (2, 3), (1, 0)])
def test_examples_are_half_right_as_far_as_there_are_so_many(num_right: int, num_wrong: int) -> None:
    right = torch.arange(num_right + num_wrong) < num_right
    chosen = examples(right)
    assert len(chosen) == len(set(chosen.tolist())) == min(MOST_EXAMPLES, num_right + num_wrong)
    share = min(num_right, max(MOST_EXAMPLES // 2, MOST_EXAMPLES - num_wrong))
    assert int(right[chosen].sum()) == share


@pytest.mark.parametrize("num_classes", [2, 10, 100, 1000])
def test_exemplars_are_the_best_of_each_class_and_bounded(num_classes: int) -> None:
    labels = torch.arange(num_classes).repeat_interleave(20)
    places = best_exemplars(labels, num_classes)
    assert 0 < len(places) <= MOST_EXEMPLARS
    assert bool((places % 20 < 8).all())
    assert bool((places % 20 == 0).sum() == labels[places].unique().numel())


def test_without_memory_there_are_no_exemplars() -> None:
    assert len(best_exemplars(torch.empty(0, dtype=torch.int64), 5)) == 0


def test_principal_axes_keep_distances_and_have_one_sign() -> None:
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) * 100
    scores, shares = principal(features)
    mirrored, _ = principal(-features)
    found = np.linalg.norm(scores[0].astype(float) - scores[1].astype(float))
    other = np.linalg.norm(scores[2].astype(float) - scores[3].astype(float))
    expected = (features[0] - features[1]).norm() / (features[2] - features[3]).norm()
    assert found / other == pytest.approx(float(expected), rel=0.01)
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert scores.dtype == np.float16
    largest = np.abs(mirrored.astype(float)).argmax(axis=0)
    assert (mirrored[largest, np.arange(mirrored.shape[1])] > 0).all()


def test_features_that_are_all_alike_are_a_point() -> None:
    scores, shares = principal(torch.ones(4, 3))
    assert np.isfinite(scores).all()
    assert shares[0] == 0


@pytest.mark.parametrize(
    ("shape", "expected"), [((3, 224, 112), (3, 32, 16)), ((1, 8, 8), (1, 8, 8)), ((3, 900, 2), (3, 32, 1))]
)
def test_thumbnails_are_bounded_and_never_larger(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    images: Tensor = torch.full((2, *shape), 77, dtype=torch.uint8)
    small = thumbnails(images, LARGEST_EXEMPLAR)
    assert small.shape == (2, *expected)
    assert (small == 77).all()
