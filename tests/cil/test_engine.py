from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cil import checkpoint
from cil.build import Run
from cil.checking import check
from cil.cli import compose
from cil.engine import Engine, RunFailed, machine
from cil.events import EventLog, read_events
from cil.optim import learning_rates
from cil.precision import Precision
from cil.seeding import SampleNoise, sample_noise
from cil.stages import Phase
from kd import Batch
from tests.conftest import RunTiny, tiny_command
from tests.run_folders import facts_of, weights_of

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(tmp_path: Path, request: pytest.FixtureRequest) -> MakeEngine:
    """An engine that has not run yet."""

    def make(*overrides: str, learner: str = "dkt") -> Engine:
        config = check(compose(tiny_command(tmp_path, *overrides, learner=learner)))
        config.folder.mkdir()
        log = EventLog(config.folder / "events.jsonl")
        request.addfinalizer(log.close)
        return Engine(Run.build(config), log)

    return make


def test_a_run_returns_the_matrix_that_its_events_tell(make_engine: MakeEngine) -> None:
    engine = make_engine("optim.epochs=1", learner="finetune")
    matrix = engine.run()["accuracy_matrix"]
    rows = [event["per_task"] for event in facts_of(engine.folder) if event["event"] == "evaluated"]
    for task, row in enumerate(rows):
        assert matrix[task][: task + 1] == row
    assert engine.position.stage == 3


def test_the_batch_of_a_sample_does_not_depend_on_its_company(make_engine: MakeEngine) -> None:
    engine = make_engine("data.augment.flip={}", "data.augment.randaugment={}")

    def batch(*ids: int) -> Batch:
        some = torch.tensor(ids)
        return engine.batch(SampleNoise(5, some, torch.zeros_like(some)), some, engine.samples.images.fetch(some))

    whole, part = batch(3, 141, 59, 26), batch(26, 141)
    assert part.images.equal(whole.images[[3, 1]])
    assert part.labels.equal(whole.labels[[3, 1]])
    assert part.ids.tolist() == [26, 141]
    assert whole.labels.tolist() == engine.samples.labels[[3, 141, 59, 26]].tolist()


def test_what_is_frozen_takes_no_gradient_and_stays_in_evaluation_mode(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.begin(engine.parts.stage(0))
    network: Any = engine.learner.network
    frozen = [network.encoder, network.token_pool.general_token]
    engine.set_trainable(Phase("p", "new", engine.config.optim, frozen=frozen))
    assert not any(parameter.requires_grad for parameter in network.encoder.parameters())
    assert not network.token_pool.general_token.requires_grad
    assert all(parameter.requires_grad for parameter in network.skab.parameters())
    assert not any(module.training for module in network.encoder.modules())
    assert network.skab.training
    engine.set_trainable(Phase("p", "new", engine.config.optim, frozen=frozen, frozen_in_eval=False))
    assert not any(parameter.requires_grad for parameter in network.encoder.parameters())
    assert all(module.training for module in network.encoder.modules())
    engine.set_trainable(Phase("p", "new", engine.config.optim))
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_teacher_is_never_set_to_learn(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for index in range(2):
        engine.begin(engine.parts.stage(index))
    engine.set_trainable(engine.learner.phases(engine.parts.stage(1))[0])
    assert engine.learner.teacher is not None
    assert not any(parameter.requires_grad for parameter in engine.learner.teacher.parameters())
    assert not any(module.training for module in engine.learner.teacher.modules())


def test_every_step_runs_at_the_rate_of_the_schedule(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("optim.schedule.warmup_epochs=1", learner="finetune")
    used: list[float] = []
    original = type(engine.learner).advance

    def advance(self: Any, optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        used.extend({group["lr"] for group in optimizer.param_groups})
        original(self, optimizer, *rest)

    monkeypatch.setattr(type(engine.learner), "advance", advance)
    engine.run()
    recipe, expected = engine.config.optim, []
    for event in facts_of(engine.folder):
        if event["event"] == "phase_started":
            expected += learning_rates(recipe.schedule, recipe.epochs, recipe.peak_lr, event["num_steps"])
    assert recipe.schedule.unit == "step"
    assert used == expected
    logged = [event["learning_rate"] for event in facts_of(engine.folder) if event["event"] == "epoch"]
    steps = len(expected) // 6
    assert logged == expected[steps - 1 :: steps]


def test_gradients_are_clipped_as_a_whole(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("optim.clip_norm=0.01", "optim.epochs=1", learner="replay")
    norms: list[float] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *rest: Any, **more: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
        return original(self, *rest, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    engine.run()
    assert norms
    assert max(norms) <= 0.01 * (1 + 1e-4)
    assert max(norms) > 0.009


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state_before(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(learner="replay")
    original = type(engine.learner).forward

    def forward(self: Any, batch: Batch) -> dict[str, Tensor]:
        losses = original(self, batch)
        return {name: loss * (float("nan") if engine.position.epoch else 1) for name, loss in losses.items()}

    monkeypatch.setattr(type(engine.learner), "forward", forward)
    kept = r"kept is the state of stage 0, phase 0, epoch 1, step 0"
    with pytest.raises(
        RunFailed, match=rf"stage 0, phase training, epoch 1, step \d+: the loss is not finite .*{kept}.*optim.lr"
    ):
        engine.run()
    state = checkpoint.load_state(engine.folder, torch.device("cpu"))
    assert state is not None
    assert state["position"] == {"stage": 0, "begun": True, "phase": 0, "epoch": 1, "step": 0}
    assert all(value.isfinite().all() for value in state["learner"].values())


def test_weights_that_are_not_finite_are_never_saved(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("checkpoint.every_steps=2", learner="replay")
    original = type(engine.learner).update

    def update(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        if engine.position.step == 3:
            with torch.no_grad():
                next(self.network.parameters()).fill_(float("inf"))

    monkeypatch.setattr(type(engine.learner), "update", update)
    with pytest.raises(RunFailed, match=r"step 4: a weight is not finite \(network\..*kept is the state .* step 2"):
        engine.run()
    state = checkpoint.load_state(engine.folder, torch.device("cpu"))
    assert state is not None
    assert all(value.isfinite().all() for value in state["learner"].values())


@pytest.mark.parametrize("model", [(), ("model=resnet8", "model.width=4")])
def test_a_step_without_finite_gradients_is_left_out_and_counted_if_that_is_asked_for(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, model: tuple[str, ...]
) -> None:
    engine = make_engine("optim.skip_nonfinite=true", *model, learner="replay")
    original = type(engine.learner).forward

    def forward(self: Any, batch: Batch) -> dict[str, Tensor]:
        if engine.position.step == 2:
            batch = replace(batch, images=batch.images * float("inf"))
        return original(self, batch)

    monkeypatch.setattr(type(engine.learner), "forward", forward)
    report = engine.run()
    epochs = [event for event in read_events(engine.folder / "events.jsonl") if event["event"] == "epoch"]
    assert report["skipped_steps"] == len(epochs) > 3
    assert all(event["losses"]["ce"] is not None for event in epochs)
    assert all(value.isfinite().all() for value in engine.learner.state_dict().values())


def test_the_state_is_everything_a_fresh_engine_needs(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine("optim.epochs=1", "learner.finetune_epochs=1")
    engine.run()
    state = checkpoint.load_state(engine.folder, torch.device("cpu"))
    assert state is not None
    parts = (
        "format config protocol position epoch structure learner training carried memory history seconds log_position"
    )
    assert state.keys() == set(parts.split())
    fresh = Engine(Run.build(engine.config), engine.log)
    fresh.restore()
    assert fresh.learner.structure() == engine.learner.structure()
    assert fresh.memory.state_dict() == engine.memory.state_dict()
    assert fresh.history == engine.history
    expected = engine.learner.state_dict()
    assert fresh.learner.state_dict().keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in fresh.learner.state_dict().items())


def test_a_state_is_saved_after_every_epoch_with_its_optimiser(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[dict[str, Any]] = []
    original = checkpoint.save_state

    def save(run: Path, stage: int, state: dict[str, Any]) -> None:
        saved.append(state)
        original(run, stage, state)

    monkeypatch.setattr(checkpoint, "save_state", save)
    run_tiny(learner="replay")
    positions = [(state["position"]["stage"], state["position"]["epoch"]) for state in saved]
    assert positions == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0)]
    assert [state["training"] is not None for state in saved] == [True, True, False] * 3
    steps = {float(entry["step"]) for entry in saved[0]["training"]["optimizer"]["state"].values()}
    assert len(steps) == 1


def test_the_exemplars_are_of_their_class_and_of_the_training_images(make_engine: MakeEngine) -> None:
    engine = make_engine("optim.epochs=1", "memory.selection=random", "data.validation=0.2", learner="replay")
    engine.run()
    ids, labels = engine.memory.ids(), engine.memory.labels()
    assert engine.samples.labels[ids].equal(labels)
    assert engine.memory.per_class() == dict.fromkeys(range(6), 4)


@pytest.mark.parametrize(
    ("budget", "size", "expected"),
    [("total", 20, [20, 20, 18]), ("per_class", 3, [6, 12, 18]), ("fixed_total", 20, [6, 12, 18])],
)
def test_every_budget_is_kept(run_tiny: RunTiny, budget: str, size: int, expected: list[int]) -> None:
    run = run_tiny(f"memory.budget={budget}", f"memory.size={size}", "optim.epochs=1", learner="replay")
    updates = [event["num_exemplars"] for event in facts_of(run) if event["event"] == "memory_updated"]
    assert updates == expected


def test_the_time_of_a_stage_is_told_by_parts(whole_run: RunTiny) -> None:
    events = read_events(whole_run() / "events.jsonl")
    parts = [event["seconds"].keys() for event in events if event["event"] == "stage_finished"]
    common = {"training", "memory", "evaluation", "checkpoint", "report"}
    assert parts == [common, common | {"finetuning"}, common | {"finetuning"}]
    assert all(event["peak_resident_bytes"] > 50_000_000 for event in events if event["event"] == "stage_finished")
    elapsed = [event["elapsed_seconds"] for event in events]
    assert elapsed == sorted(elapsed)


def test_the_parameters_of_a_stage_are_counted(whole_run: RunTiny) -> None:
    started = [event for event in facts_of(whole_run()) if event["event"] == "stage_started"]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    for event in started:
        of_stage = f"stage_{event['stage']:03}/"
        weights = [value for name, value in weights_of(whole_run()).items() if name.startswith(of_stage)]
        names = [name for name in weights_of(whole_run()) if name.startswith(of_stage)]
        expected = sum(w.numel() for name, w in zip(names, weights, strict=True) if not name.endswith(buffers))
        assert event["num_parameters"] == expected
    assert started[0]["num_trainable"] == started[0]["num_parameters"]
    assert started[1]["num_trainable"] < started[1]["num_parameters"]


def test_where_a_run_takes_place_is_told_once_and_not_in_the_results(whole_run: RunTiny) -> None:
    facts = machine(Precision("fp32", torch.device("cpu")))
    assert facts.keys() == {"host", "num_cores", "device", "precision", "versions"}
    started = [event for event in read_events(whole_run() / "events.jsonl") if event["event"] == "run_started"]
    assert len(started) == 1
    assert started[0]["host"] == facts["host"]
    text = (whole_run() / "metrics.json").read_text() + (whole_run() / "stage_002" / "stage.json").read_text()
    assert f'"{facts["host"]}"' not in text


def test_splitting_an_epoch_into_other_batches_drops_the_same_branches_of_the_same_samples(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine("model.depth=2", "model.drop_path=0.9")
    engine.begin(engine.parts.stage(0))
    network: Any = engine.learner.network
    block = network.encoder.blocks[1]

    def run(batches: list[list[int]]) -> dict[int, list[bool]]:
        dropped = {}
        for ids in batches:
            noise = SampleNoise(5, torch.tensor(ids), torch.zeros(len(ids), dtype=torch.int64))
            with sample_noise(noise):
                branch = block.drop_attention(torch.ones(len(ids), 3, 2))
            for sample, row in zip(ids, branch, strict=True):
                dropped[sample] = (row == 0).flatten().tolist()
        return dropped

    ids = list(range(40))
    whole = run([ids])
    assert run([ids[:7], ids[7:30], ids[30:]]) == whole
    assert {len(set(row)) for row in whole.values()} == {1}
    assert 0 < sum(row[0] for row in whole.values()) < 40


def test_learners_with_exemplars_are_read_in_two_ways(make_engine: MakeEngine) -> None:
    engine = make_engine("optim.epochs=1", "evaluation.nearest_mean=true", learner="replay")
    report = engine.run()
    both = report["accuracy_by"]
    assert list(both) == ["classifier", "nearest_mean"]
    assert both["classifier"]["after"] == report["accuracy_after"]
    assert both["classifier"]["last"] == report["last_accuracy"]
    assert [len(way["after"]) for way in both.values()] == [3, 3]
    assert both["nearest_mean"]["after"] != both["classifier"]["after"]
    assert report["exemplar_bytes"] == 24 * 8 * 8
    assert report["model_bytes"] == 4 * report["num_parameters"]


def test_without_exemplars_there_is_one_way_to_read(make_engine: MakeEngine) -> None:
    report = make_engine("optim.epochs=1", learner="finetune").run()
    assert list(report["accuracy_by"]) == ["classifier"]
