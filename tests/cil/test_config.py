import inspect
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from cil.build import make_distillation
from cil.checking import check, schema
from cil.cli import compose
from cil.config import Config, ConfigError
from cil.data import augmentations, data_sets
from cil.learners.base import learners
from cil.models.network import models
from kd import distillers

TREE = compose(["experiment=tiny"])
CIFAR = compose(["experiment=cifar100_c50", "learner=dkt_official"])


def changed(tree: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A copy with some values set by their paths, with __ for a dot."""
    copy = yaml.safe_load(yaml.safe_dump(tree))
    for path, value in values.items():
        *parts, last = path.split("__")
        section = copy
        for part in parts:
            section = section[part]
        section[last] = value
    return copy


def problems_of(tree: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(tree)
    return caught.value.problems


class Part:
    def __init__(
        self,
        network: object,
        *,
        width: Annotated[int, Field(gt=0)],
        rate: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        mode: Literal["a", "b"] = "a",
        sizes: list[int] | int = 3,
    ) -> None:
        pass


def test_the_schema_is_the_keyword_only_half_of_a_signature() -> None:
    model = schema(Part)
    assert list(model.model_fields) == ["width", "rate", "mode", "sizes"]
    assert model(width=3, sizes=[1, 2]).model_dump() == {"width": 3, "rate": 0.1, "mode": "a", "sizes": [1, 2]}
    for wrong in ({}, {"width": 0}, {"width": 3, "rate": 1}, {"width": 3, "mode": "c"}, {"width": 3, "network": 1}):
        with pytest.raises(ValidationError):
            model.model_validate(wrong)


@pytest.mark.parametrize("registry", [augmentations, data_sets, distillers, learners, models], ids=lambda r: r.kind)
def test_every_hyper_parameter_is_typed_and_has_a_default(registry: Any) -> None:
    for name, entry in registry.items():
        for parameter in inspect.signature(entry).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "download":
                assert parameter.annotation is not parameter.empty, (name, parameter.name)
                if parameter.name != "path":  # there is no folder or file that everyone has
                    assert parameter.default is not parameter.empty, (name, parameter.name)
        if registry is not data_sets:
            assert schema(entry)(), "the defaults are within their ranges"


def test_values_come_out_in_the_types_of_the_constructors() -> None:
    tree = changed(TREE, kd__dkt__temperature=7, learner__finetune_lr="1e-4", learner__finetune_epochs=3.0)
    config = check(tree)
    assert (config.kd["dkt"]["temperature"], type(config.kd["dkt"]["temperature"])) == (7.0, float)
    assert config.learner.parameters["finetune_lr"] == 1e-4
    assert type(config.learner.parameters["finetune_epochs"]) is int
    magnitude = check(CIFAR).data.augment["randaugment"]
    assert magnitude is not None
    assert type(magnitude["magnitude"]) is float


def test_a_part_comes_out_whole_with_the_defaults_of_its_constructor() -> None:
    given = changed(TREE, data__augment={"flip": None, "crop": {}}, learner={"name": "dkt", "separation": 0.5})
    config = check(given)
    keywords = [p for p in inspect.signature(learners["dkt"]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert config.learner.parameters == {p.name: p.default for p in keywords} | {"separation": 0.5}
    assert config.data.augment["flip"] is None
    assert config.data.augment["crop"] == {"padding": 4}
    assert check(config.model_dump(mode="json")) == config


def test_what_belongs_to_every_data_set_is_kept() -> None:
    data = check(changed(CIFAR, data__download=True, data__root="somewhere", data__validation=0.1)).data
    assert (data.download, str(data.root), data.validation) == (True, "somewhere", 0.1)
    assert data.parameters == {}


def test_all_problems_are_found_at_once_each_on_a_line() -> None:
    tree = changed(TREE, seed=-1, optim__epochs="many", model__width=0, memory__selection="best", data__name="digit")
    tree["optim"]["sampling"] = {"wiews": 2}
    problems = problems_of(tree)
    assert len(problems) == 6
    assert sorted(problem.split(":")[0].split("=")[0] for problem in problems) == [
        "data.name",
        "memory.selection",
        "model.width",
        "optim.epochs",
        "optim.sampling.wiews",
        "seed",
    ]


def test_a_wrong_member_of_a_list_is_named_by_its_place() -> None:
    (problem,) = problems_of(changed(TREE, scenario__task_sizes=[3, 0, 2]))
    assert problem.startswith("scenario.task_sizes.1: input should be greater than 0")


@pytest.mark.parametrize("section", ["data", "learner", "model", "scenario", "optim", "memory"])
def test_a_missing_or_wrong_section_is_named(section: str) -> None:
    tree = changed(TREE)
    del tree[section]
    assert f"{section}: missing; it has no default" in problems_of(tree)
    assert any(problem.startswith(f"{section}: ") for problem in problems_of(changed(TREE, **{section: 5})))


@pytest.mark.parametrize("section", ["data", "learner", "model"])
def test_a_part_without_a_name_is_named(section: str) -> None:
    tree = changed(TREE)
    del tree[section]["name"]
    assert f"{section}.name: missing; it has no default" in problems_of(tree)


@pytest.mark.parametrize("name", ["a/b", "../a", ".hidden", "", "a b", "-a", "a\nb", "ü"])
def test_a_name_that_is_no_plain_folder_name_is_refused(name: str) -> None:
    (problem,) = problems_of(changed(TREE, name=name))
    assert problem.startswith("name: string should match pattern")


@pytest.mark.parametrize("name", ["demo", "cifar100-dkt-dkt+kd-seed0", "lr=0.1", "Run_2.b"])
def test_a_plain_name_is_taken(name: str) -> None:
    assert check(changed(TREE, name=name)).folder.name == name


def test_a_checked_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        check(TREE).seed = 3


rates = st.floats(min_value=0, max_value=1e30, exclude_min=True, allow_subnormal=False)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@given(
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._+=-]{0,20}\Z"),
    seed=st.integers(0, 2**63 - 1),
    lr=rates,
    betas=st.none() | st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    root=texts,
    order=st.permutations(range(10)) | texts,
    sizes=st.none() | st.lists(st.integers(1, 9), min_size=1, max_size=4),
    finetune_epochs=st.integers(0, 99) | st.lists(st.integers(0, 99), min_size=1, max_size=4),
    temperature=rates,
    validation=st.floats(0, 0.99),
)
def test_a_config_survives_its_file(
    name: str,
    seed: int,
    lr: float,
    betas: tuple[float, float] | None,
    root: str,
    order: list[int] | str,
    sizes: list[int] | None,
    finetune_epochs: int | list[int],
    temperature: float,
    validation: float,
) -> None:
    tree = changed(
        TREE,
        name=name,
        seed=seed,
        optim__lr=lr,
        optim__betas=list(betas) if betas else None,
        data__root=root,
        data__validation=validation,
        scenario__class_order=order,
        scenario__task_sizes=sizes,
        learner__finetune_epochs=finetune_epochs,
        kd__dkt__temperature=temperature,
    )
    config = check(tree)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    again = check(yaml.safe_load(text))
    assert again == config
    assert again.model_dump(mode="json") == config.model_dump(mode="json")
    assert isinstance(again, Config)


@pytest.mark.parametrize("tree", [TREE, CIFAR], ids=["tiny", "cifar100_c50"])
def test_a_shipped_experiment_survives_its_file(tree: dict[str, Any]) -> None:
    config = check(tree)
    assert check(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_a_term_says_when_it_counts_and_the_whole_of_it_is_stored() -> None:
    whole = check(
        changed(TREE, kd__dkt__warmup_epochs=2, kd__dkt__stop={"rule": "last_drop", "milestones": [1, 2]})
    ).kd["dkt"]
    stop = {"rule": "last_drop", "milestones": [1, 2], "num_drops": None}
    assert {key: whole[key] for key in ("warmup_epochs", "epoch_base", "stop")} == {
        "warmup_epochs": 2,
        "epoch_base": 1,
        "stop": stop,
    }
    distillation = make_distillation(check(changed(TREE, kd__dkt=whole)))
    assert distillation is not None
    weights = []
    for epoch in range(3):
        distillation.begin_epoch(epoch)
        weights.append(distillation.weight("dkt") / whole["weight"])
    assert weights == [0.5, 1.0, 0.0]


def test_a_term_without_a_schedule_keeps_the_tree_it_always_had() -> None:
    assert not {"warmup_epochs", "epoch_base", "stop"} & check(TREE).kd["dkt"].keys()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"warmup_epochs": -1}, "kd.dkt: warmup_epochs must not be negative, found -1"),
        ({"warmup_epochs": "soon"}, "kd.dkt.warmup_epochs: input should be a valid integer"),
        ({"epoch_base": 0}, "kd.dkt: epoch_base=0 has no effect without warmup_epochs"),
        ({"stop": 5}, "kd.dkt.stop: input should be a valid dictionary"),
        ({"stop": {}}, "kd.dkt.stop.rule: must be one of epoch, last_drop, plateau, found None"),
        ({"stop": {"rule": "epocch"}}, "kd.dkt.stop.rule=epocch: unknown stop rule 'epocch'; did you mean 'epoch'?"),
        ({"stop": {"rule": "epoch"}}, "kd.dkt.stop.epoch: missing"),
        ({"stop": {"rule": "epoch", "epoc": 3}}, "kd.dkt.stop.epoc: unknown key 'epoc'; did you mean 'epoch'?"),
        ({"stop": {"rule": "epoch", "epoch": 0}}, "kd.dkt: stop.epoch must be at least 1"),
        ({"stop": {"rule": "epoch", "epoch": 4000}}, "kd.dkt.stop at epoch 4000 has no effect with optim.epochs="),
        ({"stop": {"rule": "plateau", "patience": 3}}, "kd.dkt.stop.rule=plateau reads a validation loss"),
    ],
)
def test_a_schedule_that_is_none_is_a_problem_of_its_term(values: dict[str, Any], problem: str) -> None:
    tree = changed(TREE, **{f"kd__dkt__{name}": value for name, value in values.items()})
    assert any(found.startswith(problem) for found in problems_of(tree))
