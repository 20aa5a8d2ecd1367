from itertools import product
from random import Random

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from cil.checking import check
from cil.cli import compose
from cil.config import Part
from cil.models.network import models
from cil.search import (
    S1_CHOICES,
    Blocks,
    Search,
    SearchResult,
    StudentScore,
    code_of,
    draw,
    find_student,
    mutate,
    search,
    student_part,
)
from kd.search.diswot import Score
from kd.search.evolution import num_parameters

DIGITS = (1, 8, 8)
TEACHER = Part(name="resnet_cifar", depth=8, shortcut="conv")
#: A search of a second.
QUICK = Search(num_evaluations=6, population=4, tournament=2, num_seeds=3, batch_size=4)


def images(settings: Search = QUICK, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    count = settings.num_seeds * settings.batch_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *DIGITS, generator=generator), torch.arange(count) % num_classes


def find(settings: Search = QUICK, seed: int = 0, teacher: Part = TEACHER) -> SearchResult:
    return find_student(settings, DIGITS, 5, *images(settings), seed, teacher)


def by_depth(blocks: Blocks) -> Score:
    """Deeper is better, above all at the end."""
    value = 100.0 * blocks[2] + 10 * blocks[1] + blocks[0]
    return Score(value, value, 0.0, 0.0)


def size(blocks: Blocks) -> int:
    return sum(blocks)


def test_the_same_seed_finds_the_same_to_the_bit_and_leaves_the_random_numbers_alone():
    state = torch.get_rng_state()
    first = find()
    assert torch.equal(torch.get_rng_state(), state)
    assert find() == first
    assert find(seed=1).candidates != first.candidates


def test_a_result_goes_through_json_and_back():
    for settings in (QUICK, QUICK.model_copy(update={"terms": "semantic"})):
        result = find(settings)
        assert SearchResult.model_validate_json(result.model_dump_json()) == result
    assert all(candidate.relation is None and candidate.score is not None for candidate in result.candidates)


def test_the_winner_has_the_highest_score_of_all_that_were_looked_at():
    result = find()
    assert len(result.candidates) == QUICK.num_evaluations
    assert result.winner in result.candidates
    assert result.winner.score == max(candidate.score for candidate in result.candidates)


def test_the_winner_is_an_ordinary_network_part_with_all_its_values():
    result = find()
    part = Part(**result.student)
    assert code_of(tuple(part.parameters["blocks"])) == result.winner.code
    network = models[part.name](DIGITS, **part.parameters)
    network.grow(5)
    assert num_parameters(network) == result.winner.num_parameters
    tree = compose(["data=digits", "student=resnet8"], "distill") | {"model": result.student}
    assert check(tree).model == part


def test_a_search_keeps_to_its_budget():
    free = search(Search(), by_depth, size, 0)
    assert free.winner.code == "777"
    bound = search(Search(max_parameters=9), by_depth, size, 0)
    assert all(candidate.num_parameters <= 9 for candidate in bound.candidates)
    assert bound.winner.code == "117"


def test_candidates_that_come_again_are_not_scored_again():
    scored: list[Blocks] = []

    def score(blocks: Blocks) -> Score:
        scored.append(blocks)
        return by_depth(blocks)

    result = search(Search(), score, size, 0)
    assert len(scored) == len(set(scored)) == len({candidate.code for candidate in result.candidates})


def test_candidates_without_a_score_and_ties_are_reported():
    def score(blocks: Blocks) -> Score:
        value = float("nan") if blocks[0] == 5 else float(blocks[1])
        return Score(value, value, 0.0, 0.0)

    result = search(Search(), score, size, 0)
    failed = [candidate for candidate in result.candidates if candidate.score is None]
    assert failed
    assert all(candidate.code[0] == "5" for candidate in failed)
    assert result.winner.code[1] == "7"
    assert all(code[1] == "7" for code in result.ties[0])
    assert SearchResult.model_validate_json(result.model_dump_json()) == result


def test_a_mutation_changes_one_stage_and_stays_in_the_space():
    random = Random(0)
    for _ in range(50):
        before = draw(random)
        after = mutate(before, random)
        assert sum(one != other for one, other in zip(before, after, strict=True)) == 1
        assert set(after) <= set(S1_CHOICES)


def test_networks_of_the_space_have_the_parameters_of_their_blocks():
    per_block = [16 * 16 * 9 * 2 + 4 * 16, 32 * 32 * 9 * 2 + 4 * 32, 64 * 64 * 9 * 2 + 4 * 64]
    smallest = 83_892  # ResNet-8 with 100 classes
    score = StudentScore(QUICK, (3, 32, 32), 100, *colour(), 0, TEACHER)
    for blocks in list(product(S1_CHOICES, repeat=3))[::9]:
        more = sum((count - 1) * size for count, size in zip(blocks, per_block, strict=True))
        assert score.num_parameters(blocks) == smallest + more


def colour() -> tuple[Tensor, Tensor]:
    count = QUICK.num_seeds * QUICK.batch_size
    return torch.zeros(count, 3, 32, 32), torch.arange(count)


@pytest.mark.parametrize("blocks", ["[5,5]", "[5,0,7]", "[1,1,1,1]"])
def test_blocks_that_are_no_three_positive_numbers_are_refused(blocks):
    with pytest.raises(ValueError, match=r"model\.blocks"):
        check(compose(["data=digits", "student=resnet_s1", f"model.blocks={blocks}"], "distill"))


def test_the_images_of_a_search_are_training_images_and_depend_on_the_seed():
    labels = torch.tensor([-1, 0, 1] * 10)
    ids = QUICK.sample(labels, 0)
    assert len(set(ids.tolist())) == 12
    assert (labels[ids] >= 0).all()
    assert torch.equal(QUICK.sample(labels, 0), ids)
    assert not torch.equal(QUICK.sample(labels, 1), ids)
    with pytest.raises(ValueError, match=r"need 12 training images, found 8"):
        QUICK.sample(labels[:12], 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"population": 4, "tournament": 8}, "search.tournament=8 must be at most search.population=4"),
        ({"num_seeds": 2}, "num_seeds"),
        ({"space": "s2"}, "space"),
        ({"generations": 3}, "generations"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        Search(**values)


def test_a_budget_below_the_smallest_network_is_refused():
    with pytest.raises(ValueError, match="max_parameters=2 leaves no network: the smallest of s1 has 3"):
        search(Search(max_parameters=2), by_depth, size, 0)


def test_a_teacher_of_another_width_is_compared_by_relation_or_by_an_explicit_match_only():
    wide = Part(name="resnet_cifar", depth=8, width=32, shortcut="conv")
    with pytest.raises(ValueError, match=r"embedding of width 64, teacher resnet_cifar one of 128"):
        find(teacher=wide)
    for changed in ({"terms": "relation"}, {"match": "pool"}):
        assert find(QUICK.model_copy(update=changed), teacher=wide).winner.score is not None


def test_a_teacher_without_maps_is_refused():
    tokens = Part(name="dkt", width=64, num_heads=4, depth=1, mlp_ratio=1, pool_stride=1)
    with pytest.raises(ValueError, match="teacher dkt has no map that is pooled"):
        find(teacher=tokens)


def test_the_wrong_number_of_images_is_refused():
    pictures, labels = images()
    with pytest.raises(ValueError, match="needs 3 batches of 4 images, found 11"):
        find_student(QUICK, DIGITS, 5, pictures[:11], labels[:11], 0, TEACHER)


def test_a_student_of_the_space_is_named_by_its_code():
    assert code_of((5, 5, 7)) == "557"
    assert student_part((5, 5, 7)).parameters["shortcut"] == "conv"
