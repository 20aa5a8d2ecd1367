"""Every file under configs/ says what it is, composes, passes the check, and builds what it describes.

What is for static distillation alone is in `tests.test_configs_static`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from cil.build import make_distillation, make_learner, make_network, make_transform, open_data
from cil.checking import check
from cil.cli import compose, config_folder, groups
from cil.config import Config, RunConfig
from cil.data import MissingData
from cil.learners.base import learners
from cil.memory import selection_rules
from cil.models.network import Network
from cil.optim import learning_rates, make_optimizer
from cil.tasks import task_sequence
from kd import distillers

CONFIGS = sorted(config_folder().rglob("*.yaml"))
STATIC_GROUPS = {"pair", "recipe", "search"}
#: Runs of static distillation; they name a student.
STATIC_EXPERIMENTS = {"cifar100_kd", "tiny_static"}
#: Published protocols, each with the learner and the network that it is published for.
PRESETS = {
    "cifar100_b0_inc20": (100, 5),
    "cifar100_b0_inc10": (100, 10),
    "cifar100_b0_inc5": (100, 20),
    "cifar100_b0_inc2": (100, 50),
    "cifar100_b50_inc10": (100, 6),
    "imagenet100_seed1993_b0_inc10": (100, 10),
    "imagenet100_first100_b0_inc10": (100, 10),
    "imagenet1000_b0_inc100": (1000, 10),
    "tiny_imagenet_b0_inc20": (200, 10),
}
EXPERIMENTS = [choice for choice in groups()["experiment"] if choice not in STATIC_EXPERIMENTS | set(PRESETS)]
#: Without those that are a preset's: the release with another of its tables of fine-tuning epochs.
LEARNERS = [choice for choice in groups()["learner"] if not choice.startswith("dkt_official_")]
CHOICES = [
    (group, choice)
    for group, choices in groups().items()
    for choice in choices
    if group not in STATIC_GROUPS and choice not in {"experiment": STATIC_EXPERIMENTS}.get(group, ())
]
#: What a choice needs beside itself.
COMPANIONS = {
    ("data", "npz"): ["data.path=images.npz"],
    ("data", "image_folder"): ["data.path=images"],
    ("data", "imagenet100_first100"): ["data.path=images"],
    ("data", "imagenet100_seed1993"): ["data.path=images"],
    ("data", "imagenet1000"): ["data.path=images"],
    ("data", "imagenet_kd"): ["data.path=images"],
    ("model", "resnet32"): ["learner=replay"],
    ("model", "timm"): ["learner=replay"],
    ("kd", "mld2"): ["data.strong={flip: {}}"],
    ("learner", "dytox"): ["model=dytox_tiny"],
    ("learner", "bic"): ["model=resnet32", "memory.size=200"],
    **{("learner", name): ["model=resnet32"] for name in ("der", "ewc", "foster", "lucir", "memo", "podnet", "wa")},
}
#: Learners whose file names a distillation term of their own.
WITH_A_TERM = {"bic", "dkt", "dkt_digits", "dkt_fast", "dytox", "foster", "icarl", "lwf", "wa"}
WITH_A_TERM |= {choice for choice in groups()["learner"] if choice.startswith("dkt_official")}
INPUT_SHAPES = {"dkt_tiny": (1, 8, 8), "dkt_imagenet": (3, 224, 224)}  # the others are for 3 x 32 x 32


def config_of(*overrides: str) -> RunConfig:
    return check(compose(list(overrides)))


def read(config: RunConfig, path: str) -> Any:
    value: Any = config.model_dump()
    for part in path.split("."):
        value = value[part]
    return value


def test_there_are_the_groups_that_people_are_told_of() -> None:
    assert list(groups()) == [
        "data",
        "experiment",
        "fast",
        "kd",
        "learner",
        "memory",
        "model",
        "optim",
        "pair",
        "recipe",
        "scenario",
        "search",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(config_folder())))
def test_every_file_opens_with_what_it_is_its_source_and_its_cost(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    opening = []
    for line in lines:
        if not line.startswith("#"):
            break
        opening.append(line.removeprefix("#").strip())
    text = " ".join(opening)
    assert 10 < len(text.split("Source:")[0]) < 500
    assert len(text.split("Source:")[1].split("Cost:")[0].strip()) > 0
    assert len(text.split("Cost:")[1].strip(" .")) > 3


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_passes_the_check(group: str, choice: str) -> None:
    config = config_of(f"{group}={choice}", *COMPANIONS.get((group, choice), []))
    if group in ("data", "learner", "model") and choice in learners:
        assert getattr(config, group).name == choice


def network_of(config: RunConfig, input_shape: tuple[int, int, int]) -> Network:
    return make_network(config.model, config.seed, input_shape)


@pytest.mark.parametrize("choice", groups()["model"])
def test_every_model_is_built_and_grown(choice: str) -> None:
    shape = INPUT_SHAPES.get(choice, (3, 32, 32))
    network = network_of(config_of(f"model={choice}", *COMPANIONS.get(("model", choice), [])), shape).eval()
    for num_new in (3, 2):
        network.grow(num_new)
    with torch.inference_mode():
        outputs = network(torch.rand(2, *shape))
    assert outputs.logits.shape == (2, 5)
    assert outputs.embedding is not None
    assert outputs.embedding.shape == (2, network.embedding_width)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learner_goes_with_every_experiment(learner: str, experiment: str) -> None:
    own = ["model=dkt_small"] if learner.startswith("dkt") and experiment == "cifar100_c50_conv" else []
    by_step = experiment in ("cifar100_c20", "cifar100_c50_fast")
    own += ["optim.schedule.unit=epoch"] if learner == "dkt_official" and by_step else []
    words = COMPANIONS.get(("learner", learner), own)
    config = config_of(f"experiment={experiment}", f"learner={learner}", *words)
    network = network_of(config, INPUT_SHAPES.get("dkt_tiny") if config.data.name == "digits" else (3, 32, 32))
    built = make_learner(config, network)
    assert isinstance(built, learners[config.learner.name])
    assert (built.distillation is not None) == (learner in WITH_A_TERM)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_its_learner_and_says_its_tasks(preset: str) -> None:
    config = config_of(f"experiment={preset}")
    assert isinstance(config, Config)
    num_classes, num_tasks = PRESETS[preset]
    scenario = config.scenario.model_dump(exclude={"order_seed"})
    tasks = task_sequence(num_classes, **scenario, seed=config.scenario.order_seed)
    assert tasks.num_tasks == num_tasks
    assert tasks.class_order != tuple(range(num_classes))
    shape = (3, 64, 64) if "tiny" in preset else (3, 224, 224) if "imagenet" in preset else (3, 32, 32)
    learner = make_learner(config, network_of(config, shape))
    assert isinstance(learner, learners[config.learner.name])
    learner.network.grow(tasks.task_sizes[0])
    with torch.inference_mode():
        assert learner.network.eval()(torch.rand(1, *shape)).logits.shape == (1, tasks.task_sizes[0])


def test_the_tables_of_fine_tuning_epochs_are_those_of_the_release() -> None:
    """R9: by size of the tasks, from the second task on; the last number goes on."""
    tables = {
        "cifar100_b0_inc20": [1, 10],
        "cifar100_b0_inc10": [1, 1, 10],
        "cifar100_b0_inc5": [1, 1, 1, 1, 1, 10],
        "imagenet100_seed1993_b0_inc10": [5, 5, 10],
        "imagenet1000_b0_inc100": [5, 5, 10],
    }
    found = {preset: config_of(f"experiment={preset}").learner.parameters for preset in tables}
    assert {preset: learner["finetune_epochs"] for preset, learner in found.items()} == tables
    assert found["imagenet1000_b0_inc100"]["finetune_lr"] == found["cifar100_b0_inc10"]["finetune_lr"] / 512


@pytest.mark.parametrize("choice", groups()["data"])
def test_every_data_set_is_loaded_or_says_what_gets_it(choice: str, tmp_path: Path) -> None:
    companions = COMPANIONS.get(("data", choice), [])
    config = config_of(f"data={choice}", *companions)
    try:
        data = open_data(config)
    except MissingData:
        missing = config_of(f"data={choice}", f"data.root={tmp_path}", *companions)
        with pytest.raises(MissingData, match=r"data\.(download=true|path|root)"):
            open_data(missing)
        return
    images = make_transform(config, data).test(data.train.fetch(torch.arange(2)))
    assert images.shape == (2, *data.input_shape)
    assert images.is_floating_point()


def test_the_real_cifar100_is_found_by_the_environment(cil_data: Path) -> None:
    config = config_of("data=cifar100")
    assert config.data.root == cil_data
    assert open_data(config).num_classes == 100


@pytest.mark.parametrize("choice", groups()["optim"])
def test_every_recipe_makes_an_optimizer_and_a_schedule(choice: str) -> None:
    recipe = config_of(f"optim={choice}").optim
    optimizer = make_optimizer(torch.nn.Linear(2, 2), recipe)
    assert optimizer.param_groups[0]["lr"] == recipe.peak_lr
    assert len(learning_rates(recipe.schedule, recipe.epochs, recipe.peak_lr)) == recipe.epochs


@pytest.mark.parametrize("choice", groups()["memory"])
def test_every_memory_names_a_rule(choice: str) -> None:
    assert config_of(f"memory={choice}").memory.selection in selection_rules


def test_every_registered_distiller_and_learner_has_a_file_of_its_name() -> None:
    # the cluster-separation term belongs to learner=dkt and is configured there
    assert set(distillers) - {"cluster_separation"} <= set(groups()["kd"])
    assert set(learners) <= set(groups()["learner"])


@pytest.mark.parametrize(
    ("overrides", "terms"),
    [
        (["kd=kd"], {"kd": 1.0}),
        (["kd=none"], {}),
        (["kd=[dkt,kd]", "kd.kd.weight=0.5"], {"dkt": 1.0, "kd": 0.5}),
        (["kd=[kd,dkt]", "kd.dkt.weight=2", "kd.kd.temperature=2"], {"dkt": 2.0, "kd": 1.0}),
        (["learner=dkt"], {"dkt": 1.0}),
        (["learner=dkt_official"], {"dkt_official": 1.0}),
        (["learner=dkt_official", "kd=none"], {}),
        (["learner=dkt_official", "kd=kd"], {"kd": 1.0}),
        (["experiment=cifar100_c50", "kd=kd"], {"kd": 1.0}),
        (["learner=replay"], {}),
        (["experiment=tiny", "learner=finetune"], {}),
        (
            ["kd=kd", "+kd.second.method=kd", "kd.second.temperature=1", "kd.second.weight=3"],
            {"kd": 1.0, "second": 3.0},
        ),
    ],
)
def test_distillation_terms_are_chosen_and_weighted_by_name(overrides: list[str], terms: dict[str, float]) -> None:
    distillation = make_distillation(config_of(*overrides))
    assert (distillation.weights if distillation else {}) == terms


def test_a_parameter_of_one_term_reaches_that_term() -> None:
    distillation = make_distillation(config_of("kd=[dkt,kd]", "kd.kd.temperature=7"))
    assert distillation is not None
    assert {name: term.temperature for name, term in distillation.distillers.items()} == {"dkt": 1.0, "kd": 7.0}


#: Every switch of docs/method.md that a config sets: where it stands, as released, as corrected.
SWITCHES = {
    "R1": ("learner.base_weight", 2.0, 1.0),
    "R2": ("learner.base_reduction", "mean", "batchmean"),
    "R4a": ("learner.finetune_shuffle", False, True),
    "R4b": ("learner.finetune_drop_last", True, False),
    "R6": ("learner.finetune_frozen_in_eval", False, True),
    "R7": ("learner.finetune_general_token", True, False),
    "R8 rule": ("memory.selection", "herding_residual", "herding"),
    "R8 images": ("memory.transform", "train", "test"),
    "R8 time": ("memory.when", "before_finetuning", "before_finetuning"),
    "R9": ("learner.finetune_epochs", [1, 1, 10], [10]),
    "R11": ("optim.schedule.legacy_shift", True, False),
    "R17": ("evaluation.continuum", True, False),
    "R19 views": ("optim.sampling.views", 3, 1),
    "R19 floor": ("optim.sampling.round_to", 256, 1),
    "R20": ("optim.sampling.emulate_missing_launcher", False, False),
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("learner", ["dkt_official", "dkt"])
def test_every_switch_of_dkt_stands_where_the_learner_says(switch: str, learner: str) -> None:
    path, official, corrected = SWITCHES[switch]
    config = config_of("experiment=cifar100_c50", f"learner={learner}")
    built = make_learner(config, network_of(config, (3, 32, 32)))
    part, _, name = path.partition(".")
    found = getattr(built, name) if part == "learner" else read(config, path)
    assert found == (official if learner == "dkt_official" else corrected)


@pytest.mark.parametrize(("learner", "as_released"), [("dkt_official", True), ("dkt", False)])
def test_the_switches_of_network_and_distillation_reach_what_is_built(learner: str, as_released: bool) -> None:
    config = config_of("experiment=cifar100_c50", f"learner={learner}")
    network = network_of(config, (3, 32, 32))
    assert (network.merge_bias, network.merge_norm) == (not as_released, not as_released)  # R3a, R3b
    assert config.model.parameters["still_biases"] == (not as_released)
    distillation = make_distillation(config)
    assert distillation is not None
    (term,) = distillation.distillers.values()
    assert (term.temperature, term.reduction) == (1.0, "mean" if as_released else "batchmean")  # R2
    assert config.data.augment["cutout"] == {"size": 16, "holes": 1}  # R21


def test_the_experiment_on_cifar100_is_the_scaled_recipe_of_the_release() -> None:
    config = config_of("experiment=cifar100_c50", "learner=dkt_official")
    assert config.optim.peak_lr == pytest.approx(2.5e-4)
    learner = make_learner(config, network_of(config, (3, 32, 32)))
    from cil.stages import Stage

    finetuning = []
    for task in range(5):
        learner.network.grow(10)
        stage = Stage(task, range(10 * task, 10 * task + 10), config.optim, has_memory=True)
        finetuning += [phase.recipe for phase in learner.phases(stage) if phase.source == "memory"]
    assert [recipe.epochs for recipe in finetuning] == [1, 1, 10, 10]
    assert [recipe.peak_lr for recipe in finetuning] == pytest.approx([2.5e-5] * 4)
    rates = learning_rates(config.optim.schedule, config.optim.epochs, config.optim.peak_lr)
    assert rates[:2] == [1e-6, 1e-6]  # R11
    assert (config.optim.schedule.warmup_epochs, config.optim.schedule.min_lr) == (1, 1e-5)
    assert (config.memory.size, config.scenario.classes, config.scenario.class_order) == (1000, 50, "order1")
