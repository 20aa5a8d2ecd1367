import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.case import Array, Case, read_cases
from tests.parity.runner import check, main

GOLDENS = Path(__file__).parent / "goldens" / "dkt.npz"
DISTILLATION = Path(__file__).parent / "goldens" / "kd.npz"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The arrays are small: threads would wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {case.name: case for case in read_cases(GOLDENS)}


def changed(case: Case, **arrays: Array) -> Case:
    return Case(case.name, case.arrays | arrays)


def test_every_golden_case_passes(capsys):
    assert main([str(GOLDENS)]) == 0
    *lines, count = capsys.readouterr().out.splitlines()
    assert {line.split("/")[0] for line in lines} == {"dkt", "dytox", "herding", "merge", "metrics", "schedule"}
    assert all(re.fullmatch(r"\S+ PASS [-+.e\d]+ [-+.e\d]+", line) for line in lines)
    assert count == f"{len(lines)} cases: {len(lines)} passed, 0 failed"


@pytest.fixture(scope="module")
def distillation() -> dict[str, Case]:
    return {case.name: case for case in read_cases(DISTILLATION)}


DISTILLATION_CASES = [case.name for case in read_cases(DISTILLATION)]


def test_there_are_all_cases_of_the_distillation_systems():
    assert len(DISTILLATION_CASES) == 37


@pytest.mark.parametrize("name", DISTILLATION_CASES)
def test_every_golden_case_of_distillation_passes(name, distillation):
    comparison = check(distillation[name])
    assert not comparison.misses
    assert comparison.num_compared


@pytest.mark.parametrize("name", DISTILLATION_CASES)
def test_every_wrong_array_of_distillation_is_a_miss(name, distillation):
    case = distillation[name]
    groups = ("out/", "grad/", "grad_", "after/")
    wrong = {key: spoilt(array) for key, array in case.arrays.items() if key.startswith(groups) and array.dtype != bool}
    wrong |= {key: ~array for key, array in case.arrays.items() if key.startswith(groups) and array.dtype == bool}
    missed = {miss.split(": ")[0] for miss in check(changed(case, **wrong)).misses}
    assert wrong.keys() == missed


def test_every_array_of_the_goldens_is_read(cases):
    for case in cases.values():
        check(case)
        assert case.read == case.arrays.keys()


COMPARED = {
    "dkt": ("eval/", "train/", "teacher_out/", "lambda", "loss/", "grad/", "grad_frozen/", "ft/loss", "ft/grad/"),
    "dytox": ("out/", "teacher_out/", "loss/", "grad/"),
    "herding": ("order", "picked", "iterations"),
    "merge": ("before/logits", "after/", "fixed/", "official/logits"),
    "metrics": ("acc", "avg", "last", "forgetting", "bwt", "exact/"),
    "schedule": ("lr", "curve"),
}


def spoilt(array: Array) -> Array:
    """Wrong by little, but everywhere, and not by one factor or one summand."""
    if array.dtype.kind != "f":
        return array + 1
    wrong: Array = array + 1e-5 * (1 + np.abs(array)) * (1 + np.arange(array.size).reshape(array.shape) % 3)
    return wrong


@pytest.mark.parametrize("component", COMPARED)
def test_every_array_that_is_wrong_is_a_miss(component, cases):
    for case in cases.values():
        keys = [key for key in case.arrays if case.name.startswith(component) and key.startswith(COMPARED[component])]
        drawn = case.arrays.get("random_names", np.array([])).tolist()
        ignored = {f"after/{name}" for name in drawn} | {key for key in keys if "patch_embed.proj." in key}
        ignored |= {key for key in keys if not np.isfinite(case.arrays[key]).any()}  # empty, or undefined
        wrong = {key: spoilt(case.arrays[key]) for key in keys if key not in ignored}
        if wrong:
            missed = {miss.split(": ")[0] for miss in check(changed(case, **wrong)).misses}
            assert wrong.keys() <= missed


@pytest.mark.parametrize(
    "name",
    [
        "dkt/t1/input/targets",
        "dkt/t1/input/images",
        "dkt/t1/state/sabs.2.mlp.dwconv.weight",
        "dkt/t1/teacher/general_token",
        "dkt/t1/classes",
        "dytox/t2/state/sabs.1.attn.gating_param",
        "herding/n50_d16_m20/m",
        "merge/m0/tokens",
        "merge/m0/before/head.1.head.bias",
        "merge/uneven/before/head.0.norm.weight",
        "metrics/uneven4/n_images",
        "schedule/short/hp",
    ],
)
def test_another_problem_has_another_answer(name, cases):
    component, tag, key = name.split("/", 2)
    case = cases[f"{component}/{tag}"]
    assert check(changed(case, **{key: spoilt(case.arrays[key])})).misses


@pytest.mark.parametrize("key", ["names/trainable", "names/frozen", "names/dead", "names/zero_grad", "ft/trainable"])
def test_a_wrong_name_fails_its_case(key, cases):
    case = cases["dkt/t2"]
    names = case.arrays[key].copy()
    names[0] = "tabs.mlp.bn1.weight" if names[0] != "tabs.mlp.bn1.weight" else "patch_embed.proj4.bias"
    assert check(changed(case, **{key: names})).misses


def test_a_number_is_no_nan_and_a_nan_no_number(cases):
    case = cases["metrics/single"]
    assert check(changed(case, forgetting=np.array(0.0))).misses
    assert check(changed(cases["metrics/even3"], bwt=np.array(np.nan))).misses


def test_equal_rows_may_be_picked_for_each_other(cases):
    """Rounding in a product may order equal rows differently; with a single entry per row nothing is rounded."""
    for name, may in (("herding/dup_n18_d5_m6", True), ("herding/onehot_n10_d4_m6", False)):
        case = cases[name]
        features, order = case.arrays["features"], case.arrays["order"].copy()
        first = order[0]
        twins = [row for row in range(len(features)) if row != first and (features[row] == features[first]).all()]
        assert twins or may
        if twins:
            order[0] = twins[0]
            assert bool(check(changed(case, order=order)).misses) != may


def save(path: Path, **arrays: object) -> str:
    np.savez(path, **{name.replace("__", "/"): np.asarray(array) for name, array in arrays.items()})
    return str(path)


def kd_case(tag: str = "a", **changed: object) -> dict[str, object]:
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 4, 3))
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(1, keepdims=True) for x in (teacher, student))
    arrays = {
        "hp__op": "kd.loss",
        "hp__expect": "equal",
        "hp__temperature": 2.0,
        "in__student": student,
        "in__teacher": teacher,
        "out__loss": 4 * (p * np.log(p / q)).sum() / 4,
        "grad__student": 2 * (q - p) / 4,
    } | changed
    return {f"kd__{tag}__{name}": array for name, array in arrays.items()}


def test_a_distillation_loss_is_checked_by_its_operation(tmp_path, capsys):
    assert main([save(tmp_path / "a.npz", **kd_case())]) == 0
    assert capsys.readouterr().out.startswith("kd/a PASS")


def test_a_mixed_loss_is_checked_by_its_operation(tmp_path):
    arrays = kd_case(hp__op="kd.mix", hp__alpha=0.0, in__target=np.zeros(4, dtype=np.int64))
    assert main([save(tmp_path / "a.npz", **arrays)]) == 0
    arrays |= kd_case(hp__op="kd.mix", hp__alpha=0.5)
    assert main([save(tmp_path / "b.npz", **arrays)]) == 1


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"out__loss": 1.0}, 1),
        ({"out__loss": 1.0, "hp__expect": "differ"}, 0),
        ({"hp__expect": "differ"}, 1),
        ({"hp__expect": "finite"}, 0),
        ({"hp__expect": "finite", "in__student": np.full((4, 3), np.nan)}, 1),
        ({"hp__expect": "perhaps"}, 1),
        ({"hp__op": "kd.unheard"}, 1),
        ({"hp__op": "kd.unheard", "hp__expect": "optional"}, 0),
        ({"out__surprise": 1.0}, 1),
    ],
)
def test_what_a_case_expects_decides_the_exit_code(change, code, tmp_path):
    assert main([save(tmp_path / "a.npz", **kd_case(**change))]) == code


def test_an_unknown_component_fails_but_the_other_cases_are_still_checked(tmp_path, capsys):
    path = save(tmp_path / "a.npz", surprise__a__x=1.0, **kd_case())
    assert main([path]) == 1
    printed = capsys.readouterr()
    unknown, known, count = printed.out.splitlines()
    assert unknown == "surprise/a FAIL 0 0"
    assert known.startswith("kd/a PASS")
    assert count == "2 cases: 1 passed, 1 failed"
    assert "'surprise' is unknown" in printed.err


@pytest.mark.parametrize("name", ["x", "dkt", "dkt__empty", "merge__a__tokens"])
def test_a_case_without_its_arrays_fails(name, tmp_path):
    assert main([save(tmp_path / "a.npz", **{name: 1.0})]) == 1


def test_a_file_that_cannot_be_read_ends_with_code_2_and_one_message(tmp_path, capsys):
    text, broken, pickled = tmp_path / "text.npz", tmp_path / "broken.npz", tmp_path / "pickled.npz"
    text.write_text("no archive")
    content = bytearray(Path(save(tmp_path / "good.npz", **kd_case())).read_bytes())
    content[200:260] = b"x" * 60
    broken.write_bytes(content)
    np.savez(pickled, a=np.array([{}], dtype=object))
    np.savez(tmp_path / "none.npz")
    for path in (tmp_path / "missing.npz", text, broken, pickled, tmp_path / "none.npz", tmp_path):
        assert main([str(path)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1
        assert str(path) in printed.err
