import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cil.events import EventLog
from cil.metrics import AccuracyMatrix
from cil.report import find_runs, write_comparison, write_report

MakeRun = Callable[..., Path]
FIGURES = (
    "Accuracy after each task",
    "Accuracy matrix",
    "Forgetting per task",
    "Before and after fine-tuning",
    "Parameters and memory",
    "Time per part",
    "Losses",
    "Learning rate",
)


def text_of(page: Path) -> str:
    """What a reader sees, tags taken out and spaces made one."""
    unseen = r"<style>.*?</style>|<script.*?</script>|<[^>]*>"
    html = re.sub(unseen, " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, write_run: MakeRun) -> Path:
    """A finished run with its page; not to be changed."""
    run = write_run(tmp_path_factory.mktemp("runs") / "demo")
    write_report(run)
    return run


def edit_metrics(run: Path, **facts: object) -> None:
    path = run / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_the_page_stands_in_the_run_folder_unless_told_otherwise(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    assert write_report(run) == run / "report.html"
    assert write_report(run, tmp_path / "page.html") == tmp_path / "page.html"
    assert (run / "report.html").read_text() == (tmp_path / "page.html").read_text()


def test_the_page_of_a_run_has_every_section(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    text = text_of(finished / "report.html")
    for title in (*FIGURES, "Task by task", "Classes of each task", "How it was made", "Config"):
        assert title in text
    for number in ("average_incremental_accuracy", "last_accuracy"):
        assert f"{number.replace('_', ' ')} {100 * metrics[number]:.1f} %" in text
    assert f"forgetting {100 * metrics['forgetting']:.1f}" in text
    assert f"backward transfer −{100 * -metrics['backward_transfer']:.1f}" in text
    for fact in (
        "parameters 1 206 920",
        "exemplars 200",
        "images per second 345",
        "wall time 1:13",
        "seed 0",
    ):
        assert fact in text
    for fact in ("protocol 5f1d0c0ffee01234", "zero, one", "eight, nine", "batch_size: 64", "finetuning", "bce", "kd"):
        assert fact in text
    assert "not finished" not in text


def test_the_matrix_is_shown_with_all_its_values(finished: Path) -> None:
    rows = json.loads((finished / "metrics.json").read_text())["accuracy_matrix"]
    html = (finished / "report.html").read_text()
    (heat_map,) = re.findall(r'<svg [^>]*aria-label="Accuracy matrix">.*?</svg>', html, flags=re.DOTALL)
    shown = Counter(re.findall(r">(\d+\.\d)</text>", heat_map))
    assert shown == Counter(f"{100 * value:.1f}" for row in rows for value in row if value is not None)


def test_the_page_loads_nothing_from_anywhere(with_snapshots: Path, tmp_path: Path) -> None:
    html = write_report(with_snapshots, tmp_path / "page.html").read_text()
    assert "://" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html
    assert all(address.startswith("data:image/png;base64,") for address in re.findall(r'\bsrc="([^"]*)"', html))
    assert all(target.startswith(("#", "data:")) for target in re.findall(r'href="([^"]*)"', html))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_figures_take_their_colours_and_fonts_from_the_page(finished: Path) -> None:
    html = (finished / "report.html").read_text()
    figures = re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL)
    assert len(figures) == len(FIGURES)
    for svg in figures:
        assert not re.findall(r"(?:fill|stroke|color)[:=] ?\"?(?:#|rgb|black|white)", svg)
        assert "font-family" not in svg
        assert "width=" not in svg[: svg.index(">")]
        assert "<text" in svg  # text that can be read, found and copied, not outlines
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert used <= set(re.findall(r"(--[\w-]+): light-dark", html)) | {"--space", "--widest"}
    assert "color-scheme: light dark" in html
    assert 'name="viewport"' in html


def test_ids_are_unique_and_references_find_them(finished: Path) -> None:
    html = (finished / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', html)) <= set(ids)


def test_the_same_run_gives_the_same_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    pages = [write_report(run, tmp_path / name).read_bytes() for name in ("first.html", "second.html")]
    assert pages[0] == pages[1]


def test_names_cannot_become_markup(make_run: MakeRun) -> None:
    run = make_run()
    events = run / "events.jsonl"
    events.write_text(events.read_text().replace('"zero"', '"<script>alert(1)</script>"').replace('"kd"', '"<b>$kd$"'))
    edit_metrics(run, name="<i>demo</i>", learner="a & b")
    html = write_report(run).read_text()
    assert "<script>alert" not in html
    assert "<b>" not in html
    assert "<i>" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "&lt;b&gt;$kd$" in html


@pytest.mark.parametrize("stages", [1, 3])
def test_an_unfinished_run_says_so_and_shows_what_it_has(make_run: MakeRun, stages: int) -> None:
    run = make_run(stages=stages)
    text = text_of(write_report(run))
    assert f"not finished: {stages} of 5 tasks have been evaluated" in text
    last = json.loads((run / "metrics.json").read_text())["last_accuracy"]
    assert f"last accuracy {100 * last:.1f} %" in text
    assert ("Forgetting per task" in text) == (stages > 1)
    assert "six, seven" in text or stages < 3  # the task that is being learned


def test_a_run_within_its_first_task_shows_its_losses(make_run: MakeRun) -> None:
    text = text_of(write_report(make_run(stages=0)))
    assert "not finished: no task has been evaluated yet" in text
    assert "average incremental accuracy –" in text
    assert "Losses" in text
    assert "bce" in text
    assert "Accuracy matrix" not in text


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("run_started", name="demo", resumed_at=None)
    assert "no task has been evaluated yet" in text_of(write_report(tmp_path))


def test_results_alone_are_enough_for_numbers_and_matrix(make_run: MakeRun) -> None:
    run = make_run()
    (run / "events.jsonl").unlink()
    (run / "config.yaml").unlink()
    text = text_of(write_report(run))
    assert "average incremental accuracy 93.4 %" in text
    assert "Accuracy matrix" in text
    assert "Losses" not in text
    assert "not finished" not in text


def test_events_alone_give_the_numbers_that_the_results_give(make_run: MakeRun) -> None:
    run = make_run(stages=3)
    headline = re.compile(r"average incremental accuracy .*? parameters")
    with_results = headline.findall(text_of(write_report(run)))
    (run / "metrics.json").unlink()
    assert headline.findall(text_of(write_report(run))) == with_results != []


def test_uneven_tasks_are_weighted_by_their_images(tmp_path: Path) -> None:
    matrix = AccuracyMatrix.from_counts([[45, -1, -1], [33, 18, -1], [29, 12, 27]], [50, 20, 30])
    facts = {"name": "uneven", "task_sizes": [5, 2, 3], "num_test_images": [50, 20, 30], **matrix.summary()}
    (tmp_path / "metrics.json").write_text(json.dumps(facts))
    text = text_of(write_report(tmp_path))
    assert f"average incremental accuracy {100 * (45 / 50 + 51 / 70 + 68 / 100) / 3:.1f} %" in text


def test_a_loss_that_was_not_finite_leaves_a_gap(make_run: MakeRun) -> None:
    run = make_run()
    events = run / "events.jsonl"
    events.write_text(re.sub(r'"kd": [\d.]+', '"kd": null', events.read_text(), count=3))
    assert "Losses" in text_of(write_report(run))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.json", "{", "metrics.json cannot be read"),
        ("metrics.json", "[1]", "metrics.json must hold a mapping, found list"),
        ("metrics.json", '{"accuracy_matrix": [[0.5], [0.5], [0.5], [0.5], [0.5], [0.5]]}', "do not fit together"),
        ("config.yaml", "a: [", "config.yaml cannot be read"),
        ("config.yaml", "just words", "config.yaml must hold a mapping, found str"),
        ("events.jsonl", "{}\n{}\n", "events.jsonl, line 1"),
        ("events.jsonl", '{"event": "epoch", "time": "", "elapsed_seconds": 1}\n', "do not fit together"),
    ],
)
def test_damaged_files_are_named(make_run: MakeRun, file: str, content: str, message: str) -> None:
    run = make_run()
    (run / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder: it has none of"):
        write_report(tmp_path)


def test_runs_are_found_below_a_folder_and_once(make_run: MakeRun) -> None:
    first, second = make_run("a"), make_run("b", seed=1)
    shutil.copytree(first, first.with_name("a.old-1"))
    (first.parent / "notes").mkdir()
    assert find_runs([first.parent]) == [first, second]
    assert find_runs([second, first.parent]) == [second, first]
    assert find_runs([first.with_name("a.old-1")]) == [first.with_name("a.old-1")]
    with pytest.raises(ValueError, match="has none below it"):
        find_runs([first.parent / "notes"])
    with pytest.raises(ValueError, match="is not a folder"):
        find_runs([first / "metrics.json"])


def test_seeds_of_one_setting_are_one_group(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(f"dkt_{seed}", seed=seed) for seed in range(3)] + [make_run("ft", learner="finetune")]
    last = [100 * json.loads((run / "metrics.json").read_text())["last_accuracy"] for run in runs]
    page = write_comparison(runs, tmp_path / "page.html")
    text = text_of(page)
    mean = sum(last[:3]) / 3
    std = (sum((value - mean) ** 2 for value in last[:3]) / 2) ** 0.5
    (dkt,) = re.findall(r"wall time learner=dkt 3 (.*?) learner=finetune", text)
    assert f" {mean:.1f} ± {std:.1f} " in f" {dkt} "
    assert re.search(rf"learner=finetune 1 [\d.]+ {last[3]:.1f} ", text)
    assert "different protocols" not in text
    assert "learner.head.merge_bias True False" in text
    html = page.read_text()
    assert html.count("<svg ") == 2
    assert all(f">learner={name}</text>" in html for name in ("dkt", "finetune"))


def test_unfinished_runs_are_listed_but_do_not_enter_a_mean(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b", seed=1, stages=2), make_run("c", learner="replay", stages=2)]
    last = 100 * json.loads((runs[0] / "metrics.json").read_text())["last_accuracy"]
    text = text_of(write_comparison(runs, tmp_path / "page.html"))
    assert re.search(rf"learner=dkt 1 of 2 [\d.]+ {last:.1f} ", text)
    assert "learner=replay 0 of 1 – – –" in text
    assert "learner=replay (not finished)" in text
    assert text.count("2 (not finished)") == 2


def test_different_protocols_are_a_warning_that_names_the_runs(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b", seed=1, protocol="0123456789abcdef"), make_run("c", seed=2, stages=0)]
    text = text_of(write_comparison(runs, tmp_path / "page.html"))
    assert "different protocols, so their numbers must not be compared" in text
    assert "5f1d0c0ffee01234 : a" in text
    assert "0123456789abcdef : b" in text


def test_runs_without_a_config_are_never_taken_for_repeats(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b", seed=1)]
    for run in runs:
        (run / "config.yaml").unlink()
        edit_metrics(run, name=run.name)
    text = text_of(write_comparison(runs, tmp_path / "page.html"))
    assert re.search(r"wall time a 1 .* b 1 ", text)
    assert "±" not in text.split("Runs")[0].split("Groups")[1]


def labels_in(page: Path) -> list[str]:
    """The labels of the groups, in order."""
    (groups,) = re.findall(r'<table [^>]*id="groups".*?</table>', page.read_text(), flags=re.DOTALL)
    return re.findall(r'<tr><td class="text">(.*?)</td>', groups)


def test_groups_are_named_as_their_runs_but_for_the_seed(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [
        make_run(f"{learner}-seed{seed}", learner=learner, seed=seed) for learner in ("dkt", "ft") for seed in (0, 1)
    ]
    assert labels_in(write_comparison(runs, tmp_path / "page.html")) == ["dkt", "ft"]


def test_groups_of_other_names_are_told_apart_by_the_fewest_settings(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(name, learner=learner) for name, learner in (("a", "dkt"), ("b", "replay"), ("c", "replay"))]
    runs.append(make_run("d", seed=1))
    config = runs[2] / "config.yaml"
    config.write_text(config.read_text().replace("increment: 2", f"class_order: {list(range(100))}"))
    order = "scenario.class_order="
    assert labels_in(write_comparison(runs, tmp_path / "page.html")) == [
        f"learner=dkt, {order}not set",
        f"learner=replay, {order}not set",
        f"learner=replay, {order}[0, 1, 2, 3, 4, 5, 6, 7…",
    ]


def test_the_report_needs_no_torch() -> None:
    check = "import sys, cil.report.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
