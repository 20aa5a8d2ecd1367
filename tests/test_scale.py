from pathlib import Path

import pytest

from benchmarks import scale
from cil.checking import check
from cil.cli import compose
from cil.plan import plan
from tests.conftest import tiny_command


@pytest.fixture(scope="module")
def need() -> scale.Need:
    config = check(compose(tiny_command(Path("runs"), "memory.size=24", learner="dkt")))
    return scale.Need("cifar100_b0_inc10", plan(config), scale.launches(config))


def test_arithmetic_is_that_of_all_phases(need: scale.Need) -> None:
    phases = [phase for task in need.plan.tasks for phase in task.phases]
    assert need.operations == 2 * sum(phase.multiply_adds * phase.num_images for phase in phases)
    assert need.launches > 100


def test_a_step_takes_its_arithmetic_or_the_time_to_start_it(need: scale.Need) -> None:
    arithmetic = (need.operations + need.reading_operations) / 1e6
    assert need.seconds(1e-6, 0.0, 1) == pytest.approx(arithmetic)
    assert need.seconds(1e-6, 0.0, 8) == pytest.approx(arithmetic / 8)
    slow_start = need.plan.num_steps * need.launches * 1e-3
    assert need.seconds(1e9, 1e3, 8) == pytest.approx(slow_start)


def test_more_processes_divide_activations_and_nothing_else(need: scale.Need) -> None:
    assert need.peak_bytes(1) == max(task.peak_bytes for task in need.plan.tasks)
    saved = need.peak_bytes(1) - need.peak_bytes(4)
    assert saved == pytest.approx(0.75 * need.plan.tasks[-1].largest_phase.activation_bytes, rel=0.1)


def test_both_tables_are_printed(
    need: scale.Need, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale, "need", lambda experiment: need)
    scale.main(["cifar100_b0_inc10", "--gpus", "1", "4", "16"])
    out = capsys.readouterr().out
    assert out.count("cifar100_b0_inc10 ") == 1 + 3
    assert f"{need.plan.num_steps}" in out


@pytest.mark.slow
@pytest.mark.parametrize("experiment", scale.PRESETS)
def test_presets_train_a_few_steps_on_images_of_their_real_size(experiment: str, tmp_path: Path) -> None:
    from cil.cli import main

    words = [*scale.SYNTHETIC, *(word for word in scale.PRESETS[experiment] if "images_per_class" not in word)]
    few = ["data.images_per_class=2", "data.test_images_per_class=1", "optim.epochs=1", "learner.finetune_epochs=1"]
    more = ["optim.batch_size=8", "optim.sampling.round_to=1", "scenario.classes=20", "scenario.increment=10"]
    place = [f"runs_dir={tmp_path}", "name=short", "memory.size=20", "log=[]"]
    assert main([f"experiment={experiment}", *words, *few, *more, *place]) == 0
    assert (tmp_path / "short" / "metrics.json").exists()
