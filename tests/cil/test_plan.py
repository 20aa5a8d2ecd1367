"""`plan=true` says what a run will take; what it says is what the run then does."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cil.checking import check
from cil.cli import compose, groups, main
from cil.config import Config
from cil.costs import idle_parameters, multiply_adds, num_bytes, saved_bytes
from cil.engine import Engine
from cil.events import read_events
from cil.models.dkt import DKTNetwork
from cil.plan import TIMED_STEPS, Plan, plan
from cil.plan_table import as_text
from cil.stages import Phase
from tests.conftest import RunTiny, tiny_command
from tests.run_folders import metrics_of
from tests.test_configs import COMPANIONS

RELEASED = 11_073_124  # parameters of the release after ten tasks of ten classes
RELEASED_IDLE_PROJECTION = 32 * 3 * 9 + 32 + 2 * 32 + 384 * 32 * 16 + 384  # of the release, which never uses it


def config_of(*overrides: str, learner: str = "dkt") -> Config:
    return check(compose(tiny_command(Path("runs"), *overrides, learner=learner)))


def write_images(path: Path, num_classes: int, per_class: int, shape: tuple[int, int, int]) -> str:
    """A data set of noise, shape as height, width, channels; returns the override that chooses it."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), per_class)
    images = generator.integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    np.savez(path, x_train=images, y_train=labels, x_test=images[::per_class], y_test=labels[::per_class])
    return f"data.path={path}"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override for a hundred classes of small images: their size changes no parameter."""
    return write_images(tmp_path_factory.mktemp("data") / "images.npz", 100, 26, (8, 8, 3))


def plan_of_release(images: str, *overrides: str) -> Plan:
    """The released network and switches."""
    words = ["data=npz", images, "model=dkt", "learner=dkt_official", "optim=dkt", "optim.batch_size=64"]
    return plan(check(compose([*words, "num_threads=1", *overrides])))


@pytest.fixture(scope="module")
def release(images: str) -> Plan:
    """A hundred classes in three tasks, since ten take long."""
    return plan_of_release(images, "scenario.task_sizes=[10,10,80]", "scenario.increment=null")


@pytest.mark.slow
def test_the_release_has_as_many_parameters_after_ten_tasks_as_are_published(images: str) -> None:
    tasks = plan_of_release(images, "scenario=b0_inc10").tasks
    assert len(tasks) == 10
    assert tasks[-1].num_parameters == RELEASED - RELEASED_IDLE_PROJECTION
    assert [task.phases[-1].epochs for task in tasks] == [500, 1, 1, *[10] * 7]


def test_the_release_has_as_many_parameters_as_are_published(release: Plan) -> None:
    after = [task.num_parameters + RELEASED_IDLE_PROJECTION for task in release.tasks]
    assert after == [11_034_250, 11_039_252, RELEASED - 7 * 384]  # the last for want of the task tokens of seven tasks
    main_phase, finetuning = release.tasks[-1].phases
    assert main_phase.num_trainable == 11_034_250 - RELEASED_IDLE_PROJECTION + 70 * 385
    assert finetuning.num_trainable == 1_837_156


def test_the_release_leaves_all_but_the_middle_of_the_decoders_depthwise_kernels_idle(release: Plan) -> None:
    for task in release.tasks:
        for phase in task.phases:
            assert phase.idle["network.skab.mlp.depthwise.weight"] == 1536 * 8


def test_otherwise_only_what_a_batchnorm_or_a_softmax_takes_away_is_idle(release: Plan) -> None:
    """A constant before BatchNorm, also one that a linear layer passes on, and a constant added to all keys."""
    before_norms = ("stem.bias", "expand.bias", "depthwise.bias", "reduce.bias", "norm2.bias", "k.bias")
    main_phase, finetuning = release.tasks[-1].phases
    for phase in (main_phase, finetuning):
        assert all(name.endswith((*before_norms, "skab.mlp.depthwise.weight")) for name in phase.idle)
    per_block = 2 * 1536 + 3 * 384
    assert main_phase.num_idle == 6 * per_block + 32 + 1536 * 8
    assert finetuning.num_idle == per_block + 1536 * 8


def test_the_frozen_parameters_are_those_of_the_phases(release: Plan) -> None:
    assert [len(task.phases) for task in release.tasks] == [1, 2, 2]
    assert release.tasks[0].num_trainable == release.tasks[0].num_parameters
    old = 2 * 384 + 20 * 385 + 2 * 384  # two task tokens and the stability classifier
    assert release.tasks[-1].num_trainable == release.tasks[-1].num_parameters - old


@pytest.mark.parametrize(("num_tasks", "published"), [(1, 590.8 + 20.7), (10, 590.8 + 23.4)])
def test_an_image_costs_the_released_network_the_published_multiply_adds(num_tasks: int, published: float) -> None:
    """To 0.1 million: the decoder's share is published to three digits, and the classifiers are not in it."""
    network = DKTNetwork((3, 32, 32)).eval()
    for _ in range(num_tasks):
        network.grow(10)
    with torch.no_grad():
        found = multiply_adds(lambda: network(torch.zeros(1, 3, 32, 32)))
    assert found / 1e6 == pytest.approx(published, abs=0.1)


def test_backward_through_a_layer_costs_twice_what_forward_does() -> None:
    for layer, shape in [
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 5, 5)),
        (nn.Conv2d(4, 8, 3, stride=2, groups=2), (2, 4, 7, 7)),
        (nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
        (nn.Linear(5, 7), (3, 5)),
    ]:
        inputs = torch.randn(shape, requires_grad=True)
        forward = multiply_adds(lambda layer=layer, inputs=inputs: layer(inputs))
        assert multiply_adds(lambda layer=layer, inputs=inputs: layer(inputs).sum().backward()) == 3 * forward > 0


def test_fused_attention_is_counted() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    assert multiply_adds(lambda: nn.functional.scaled_dot_product_attention(q, k, v)) == 2 * 2 * 4 * 6 * 6 * 8


def test_only_what_the_backward_pass_needs_counts_as_kept_and_each_storage_once() -> None:
    layer, images = nn.Linear(16, 16), torch.randn(8, 16)
    constants = list(layer.parameters())
    assert saved_bytes(lambda: layer(images).sum(), constants) == images.nbytes
    assert saved_bytes(lambda: (layer(images) + layer(images)).sum(), constants) == images.nbytes
    assert saved_bytes(lambda: layer(images).relu().sum(), constants) == 2 * images.nbytes


def test_a_parameter_is_idle_without_gradient_or_with_rounding_errors_for_one() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Linear(2, 2)).double()
    module[2].requires_grad_(False)
    module[2](module[1](module[0](torch.randn(16, 3, dtype=torch.float64)))).pow(3).sum().backward()
    assert idle_parameters(module) == {"0.bias": 4, "3.weight": 4, "3.bias": 2}


@pytest.mark.parametrize(
    ("learner", "more"),
    [
        ("dkt", ()),
        ("dkt", ("memory.when=after_finetuning", "evaluation.every_epochs=1")),
        ("dkt_official", ("memory.budget=fixed_total",)),
        ("replay", ("memory.budget=per_class", "memory.size=5", "optim.batch_size=33", "data.validation=0.1")),
        ("finetune", ("optim.initial_epochs=1", "evaluate_on=validation", "data.validation=0.2")),
        ("joint", ("model=resnet32", "optim=sgd", "optim.epochs=1", "optim.initial_epochs=2")),
    ],
)
def test_a_run_does_what_its_plan_says(run_tiny: RunTiny, learner: str, more: tuple[str, ...]) -> None:
    planned = plan(config_of(*more, learner=learner))
    folder = run_tiny(*more, learner=learner, report=False)
    events, metrics = read_events(folder / "events.jsonl"), metrics_of(folder)
    started = [event for event in events if event["event"] == "stage_started"]
    for task, event in zip(planned.tasks, started, strict=True):
        assert [task.labels.start, task.labels.stop - 1] == event["labels"]
        facts = (task.num_parameters, task.num_trainable, task.num_new_samples)
        assert facts == (event["num_parameters"], event["num_trainable"], event["num_new_samples"])
    phases = [(stage, phase) for stage, task in enumerate(planned.tasks) for phase in task.phases]
    starts = [event for event in events if event["event"] == "phase_started"]
    assert [(stage, p.name, p.epochs, p.num_samples, p.steps_per_epoch) for stage, p in phases] == [
        (event["stage"], event["phase"], event["epochs"], event["num_samples"], event["num_steps"]) for event in starts
    ]
    assert planned.num_images == metrics["views_trained"]
    assert planned.num_steps == sum(event["num_steps"] * event["epochs"] for event in starts)
    assert [task.num_exemplars for task in planned.tasks] == metrics["exemplars"]
    reads = [event for event in events if event["event"] == "test_read"]
    for stage, task in enumerate(planned.tasks):
        assert task.num_evaluated == sum(event["num_images"] for event in reads if event["stage"] == stage)
    chosen = [event["stage"] for event in events if event["event"] == "memory_updated"]
    assert [task.num_embedded for task in planned.tasks] == [
        chosen.count(stage) * task.num_new_samples for stage, task in enumerate(planned.tasks)
    ]


def test_a_distillation_term_that_warms_up_or_stops_is_planned_as_it_counts() -> None:
    plain, warming, stopping = (
        plan(config_of(*words)).tasks[1].phases[0].multiply_adds
        for words in (
            ["kd=kd"],
            ["kd=kd", "+kd.kd.warmup_epochs=2", "+kd.kd.epoch_base=0"],
            ["kd=kd", "+kd.kd.stop={rule: epoch, epoch: 1}"],
        )
    )
    assert plain == warming == stopping


def untimed(found: Plan) -> Plan:
    def of_phases(task: object) -> object:
        return replace(task, reading_seconds=0.0, phases=tuple(replace(p, seconds=0.0) for p in task.phases))

    return replace(found, tasks=tuple(of_phases(task) for task in found.tasks))


def test_the_same_config_has_the_same_plan_but_for_the_clock() -> None:
    assert untimed(plan(config_of())) == untimed(plan(config_of()))


def test_every_pass_that_is_timed_makes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made, step = [], Engine.step

    def counted(self: Engine, phase: Phase, *arguments: Any) -> Any:
        made.append((self.position.stage > 0, phase.name))
        return step(self, phase, *arguments)

    monkeypatch.setattr(Engine, "step", counted)
    plan(config_of("memory.size=24", "learner.finetune_epochs=1"))
    once = TIMED_STEPS + 1  # and one before, to warm up
    assert Counter(made) == {(False, "training"): once, (True, "training"): once, (True, "finetuning"): once}


def test_memory_is_that_of_weights_gradients_and_optimizer() -> None:
    first, second, _ = plan(config_of("memory.size=24")).tasks
    assert first.teacher_bytes == 0
    assert 0 < second.teacher_bytes <= first.model_bytes < second.model_bytes
    for phase in (*first.phases, *second.phases):
        assert phase.gradient_bytes == 4 * phase.num_trainable
        assert phase.optimizer_bytes == pytest.approx(2 * phase.gradient_bytes, rel=0.1)  # AdamW, and its step counts
        assert phase.activation_bytes > 0
    assert first.exemplar_bytes == first.num_exemplars * 64 == 24 * 64
    sgd = plan(config_of("optim=sgd", learner="replay")).tasks[0].phases[0]
    assert sgd.optimizer_bytes == sgd.gradient_bytes  # its momentum


def test_activations_at_the_batch_size_follow_from_a_small_batch() -> None:
    from cil.build import Run

    config = config_of("optim.batch_size=96", learner="replay")
    phase = plan(config).tasks[0].phases[0]
    learner = Run.build(config).learner
    learner.network.grow(2)
    config.fast.apply(learner)
    images = torch.randn(phase.batch_size, 1, 8, 8, device=next(learner.parameters()).device)
    constants = [*learner.parameters(), *learner.buffers()]
    kept = saved_bytes(lambda: learner.network(images).logits.logsumexp(1).mean(), constants)
    assert phase.batch_size == 96
    assert phase.activation_bytes == pytest.approx(kept, rel=0.02)


def test_bytes_are_those_of_tensors_only() -> None:
    assert num_bytes([torch.zeros(3), 7, None, torch.zeros(2, dtype=torch.float64)]) == 28


@pytest.mark.parametrize("learner", groups()["learner"])
def test_every_learner_has_a_plan(learner: str) -> None:
    found = plan(config_of("optim.epochs=1", *COMPANIONS.get(("learner", learner), []), learner=learner))
    assert [len(task.labels) for task in found.tasks] == [2, 2, 2]
    assert found.training_seconds > 0
    assert "Traceback" not in as_text(found)


@pytest.mark.parametrize("model", groups()["model"])
def test_every_model_has_a_plan(model: str, tmp_path: Path) -> None:
    path = write_images(tmp_path / "images.npz", 2, 4, (8, 8, 3) if model == "dkt_tiny" else (32, 32, 3))
    words = ["data=npz", path, "scenario.increment=1", f"model={model}", "learner=finetune", "num_threads=1"]
    more = [word for word in COMPANIONS.get(("model", model), []) if not word.startswith("learner=")]
    first, second = plan(check(compose([*words, *more]))).tasks
    assert first.multiply_adds <= second.multiply_adds
    assert first.num_parameters < second.num_parameters


def test_the_command_prints_a_plan_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["experiment=tiny", "plan=true"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert list(tmp_path.iterdir()) == []
    lines = out.splitlines()
    assert lines[0].startswith("tiny-dkt-dkt-seed0: 3 tasks, 4 + 2 x 3 = 10 classes")
    assert max(len(line) for line in lines) <= 100
    assert sum(" training " in line for line in lines) == 3 + 1
    assert "steps on" in lines[-2]
    assert lines[-1].startswith("about ")


def test_a_plan_is_no_part_of_the_config_of_a_run_and_leaves_its_folder_alone(run_tiny: RunTiny) -> None:
    folder = run_tiny(learner="finetune", report=False)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "\n  plan:" not in (folder / "config.yaml").read_text()
    run_tiny("plan=true", "overwrite=true", learner="finetune", report=False)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.epochs=0", "optim.epochs: input should be greater than 0"),
        ("plan=perhaps", "plan: input should be a valid boolean"),
        ("plam=true", "plam: unknown key 'plam'; did you mean 'plan'?"),
        ("memory.size=3", "memory.size=3 has no room for an exemplar of each of the 10 classes"),
        ("optim.sampling.round_to=100000", "is empty: lower them"),
        ("data=npz", "data.path"),
    ],
)
def test_a_plan_of_a_wrong_request_is_refused(override: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["data.path=nowhere.npz"] if override == "data=npz" else []
    assert main(["experiment=tiny", "plan=true", override, *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert expected in err
