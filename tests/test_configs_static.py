"""Recipes, pairs and methods of static distillation: each combination composes, with the published numbers."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cil.checking import check
from cil.cli import compose, config_folder, groups
from cil.config import ConfigError, StaticConfig
from cil.optim import learning_rates
from kd import distillers

METHODS = [choice for choice in groups()["kd"] if choice != "none"]
#: What a choice needs beside itself.
COMPANIONS = {
    "imagenet": ["data.path=images"],
    "mld2": ["data=cifar100_kd_strong"],
    "resnet34_resnet18": ["data.path=images"],
    "resnet50_mobilenetv1": ["data.path=images"],
}
LIGHT = ("mobilenetv2", "shufflenetv1", "shufflenetv2")


def config_of(*overrides: str) -> StaticConfig:
    config = check(compose(list(overrides), "distill"))
    assert isinstance(config, StaticConfig)
    return config


def term_of(*overrides: str) -> dict[str, Any]:
    """The only distillation term of a run."""
    (term,) = config_of(*overrides).kd.values()
    return term


def published(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())["published"]
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", groups()["recipe"])
def test_every_recipe_goes_with_every_method(recipe: str, method: str) -> None:
    companions = COMPANIONS.get(recipe) or COMPANIONS.get(method, [])
    config = config_of(f"recipe={recipe}", f"kd={method}", "teacher=resnet56", *companions)
    assert list(config.kd) == [method]
    expected = published(config_folder() / "recipe" / f"{recipe}.yaml").get(method, {})
    for key, value in expected.items():
        found: Any = config.kd[method]
        for part in key.split("."):
            found = found[part]
        assert (tuple(found) if isinstance(found, list | tuple) else found) == (
            tuple(value) if isinstance(value, list) else value
        ), key


@pytest.mark.parametrize(
    "path", sorted(config_folder().glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_published_values_are_of_methods_that_there_are(path: Path) -> None:
    # a name that is no method would be left out without a word
    terms = (yaml.safe_load(path.read_text()) or {}).get("published", {})
    assert set(terms) <= set(METHODS)


@pytest.mark.parametrize(
    ("group", "choice"),
    [(group, choice) for group in ("data", "model", "optim") for choice in groups()[group] if choice != "timm"],
)
def test_every_data_set_network_and_optimiser_goes_with_a_static_run(group: str, choice: str) -> None:
    needs_path = choice == "npz" or choice.startswith("image")
    config = config_of(
        f"{'student' if group == 'model' else group}={choice}", *["data.path=x"] * (needs_path and group == "data")
    )
    if group == "optim":
        rates = learning_rates(config.optim.schedule, config.optim.epochs, config.optim.peak_lr)
        assert len(rates) == config.optim.epochs


@pytest.mark.parametrize("recipe", groups()["recipe"])
@pytest.mark.parametrize("experiment", ["cifar100_kd", "tiny_static"])
def test_an_experiment_has_the_last_word_on_data_and_optimiser(experiment: str, recipe: str) -> None:
    plain, with_recipe = (
        config_of(f"experiment={experiment}"),
        config_of(f"experiment={experiment}", f"recipe={recipe}"),
    )
    assert (with_recipe.data, with_recipe.optim) == (plain.data, plain.optim)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("kd", {"weight": 0.9, "task_weight": 0.1, "temperature": 4}),
        ("fitnet", {"weight": 100, "hint": "stage1.post"}),
        ("at", {"weight": 1000, "p": 2, "variant": "code"}),
        ("sp", {"weight": 3000}),
        ("crd", {"weight": 0.8, "num_negatives": 16384, "temperature": 0.07, "momentum": 0.5, "embedding_width": 128}),
        ("reviewkd", {"warmup_epochs": 20, "student_side": "post", "teacher_side": "pre"}),
        ("dkd", {"weight": 1, "alpha": 1, "temperature": 4, "warmup_epochs": 20}),
        ("mld", {"weight": 0.9, "task_weight": 0.1, "views": "weak"}),
        ("mld2", {"weight": 0.9, "task_weight": 0.1, "views": "weak+strong", "temperatures": (4, 3, 5, 2, 6)}),
        ("ban", {"weight": 1}),
        ("cwtm", {"weight": 1, "task_weight": 0}),
        ("eskd", {"weight": 0.9, "task_weight": 0.1, "stop": {"rule": "epoch", "epoch": 180}}),
        ("takd", {"weight": 0.5, "task_weight": 0.5, "temperature": 5}),
    ],
)
def test_the_recipe_of_cifar_has_the_numbers_of_the_specification(method: str, values: dict[str, Any]) -> None:
    term = term_of("teacher=resnet56", f"kd={method}", *COMPANIONS.get(method, []))
    assert {key: term[key] for key in values} == values


def test_the_recipe_of_cifar_trains_as_the_literature_does() -> None:
    optim = config_of().optim
    assert (optim.optimizer, optim.lr, optim.momentum, optim.weight_decay) == ("sgd", 0.05, 0.9, 5e-4)
    assert (optim.batch_size, optim.epochs, optim.schedule.milestones) == (64, 240, [150, 180, 210])


def test_the_recipe_of_imagenet_trains_as_the_literature_does() -> None:
    config = config_of("pair=resnet34_resnet18", "kd=kd", "data.path=images")
    assert (config.data.name, config.data.parameters["interpolation"]) == ("image_folder", "bilinear")
    optim = config.optim
    assert (optim.peak_lr, optim.batch_size, optim.weight_decay) == (0.2, 512, 1e-4)
    assert (optim.epochs, optim.schedule.milestones) == (100, [30, 60, 90])
    assert {key: config.kd["kd"][key] for key in ("weight", "task_weight", "temperature")} == {
        "weight": 0.5,
        "task_weight": 0.5,
        "temperature": 1,
    }
    smaller = config_of("pair=resnet34_resnet18", "kd=crd", "data.path=images", "optim.batch_size=256")
    assert smaller.optim.peak_lr == 0.1


#: Pair: beta of DKD; weight, resolution and normalisation of CAT-KD; weight of ReviewKD.
PUBLISHED = {
    "resnet56_resnet20": (2, (0.7, 2, False), 0.6),
    "resnet110_resnet32": (2, (1.8, 2, False), 1),
    "resnet32x4_resnet8x4": (8, (15, 2, False), 5),
    "wrn_40_2_wrn_16_2": (6, (12, 2, False), 5),
    "wrn_40_2_wrn_40_1": (6, (1.5, 2, False), 5),
    "vgg13_vgg8": (6, (4.5, 2, False), 1),
    "resnet32x4_shufflenetv1": (8, (600, 4, True), 5),
    "resnet32x4_shufflenetv2": (8, (600, 4, True), 8),
    "wrn_40_2_shufflenetv1": (8, (80, 4, True), 1),
    "vgg13_mobilenetv2": (6, (15, 2, True), 1),
    "resnet50_mobilenetv2": (8, (40, 2, True), 30),
    "resnet34_resnet18": (0.5, (0.5, 4, False), 1),
    "resnet50_mobilenetv1": (2, (10, 2, True), 8),
}


@pytest.mark.parametrize("pair", groups()["pair"])
def test_a_pair_has_its_networks_and_published_weights(pair: str) -> None:
    beta, cat_kd, review = PUBLISHED[pair]
    config = config_of(f"pair={pair}", "kd=[dkd,cat_kd,reviewkd]", *COMPANIONS.get(pair, []))
    assert f"{config.teacher}_{config.student}".removeprefix("timm/").startswith(pair)
    assert config.kd["dkd"]["beta"] == beta
    assert tuple(config.kd["cat_kd"][key] for key in ("weight", "resolution", "normalize")) == cat_kd
    assert config.kd["reviewkd"]["weight"] == review
    if pair not in COMPANIONS:
        assert config.optim.lr == (0.01 if config.student in LIGHT else 0.05)


def test_a_pair_of_imagenet_brings_its_recipe() -> None:
    dkd = term_of("pair=resnet50_mobilenetv1", "kd=dkd", "data.path=images")
    assert (dkd["beta"], dkd["temperature"], dkd["warmup_epochs"]) == (2, 1, 1)


def test_what_is_written_beats_what_is_published() -> None:
    assert term_of("pair=resnet56_resnet20", "kd=dkd")["beta"] == 2
    assert term_of("pair=resnet56_resnet20", "kd=dkd", "kd.dkd.beta=3")["beta"] == 3
    assert term_of("kd.dkd.beta=3", "kd=dkd", "pair=resnet56_resnet20")["beta"] == 3
    assert config_of("pair=vgg13_mobilenetv2", "kd=kd", "optim.lr=0.02").optim.lr == 0.02
    assert config_of("pair=resnet56_resnet20", "kd=kd", "teacher=resnet110").teacher == "resnet110"


def test_a_published_value_that_no_method_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kd\.dkd\.betta: unknown key 'betta'; did you mean 'beta'"):
        config_of("kd=dkd", "teacher=resnet56", "published.dkd.betta=2")


def test_only_the_term_of_that_name_has_published_values() -> None:
    config = config_of("kd=[kd,kd2]", "teacher=resnet56", "+kd.second.method=kd", "kd.second.temperature=2")
    assert [term["temperature"] for term in config.kd.values()] == [4, 2, 2]
    assert [term["weight"] for term in config.kd.values()] == [0.9, 0.25, 1]


def test_the_second_view_is_asked_for_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match=r"kd\.mld2 reads a second view of every image: set data\.strong"):
        config_of("kd=mld2", "teacher=resnet56")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_with_the_tiny_run_and_dot(method: str) -> None:
    config = config_of("experiment=tiny_static", f"kd={method}", "generations=2", "optim=dot")
    assert (config.optim.optimizer, config.optim.epochs) == ("dot", 4)
    assert config.kd[method]["method"] in distillers


def test_dot_has_the_numbers_of_its_release_and_of_the_recipe() -> None:
    dot, sgd = config_of("optim=dot").optim, config_of().optim
    assert (dot.optimizer, dot.delta) == ("dot", 0.075)
    assert dot.model_dump(exclude={"optimizer", "delta"}) == sgd.model_dump(exclude={"optimizer", "delta"})
