from collections.abc import Callable
from pathlib import Path

import pytest

from cil.report.__main__ import main

MakeRun = Callable[..., Path]


def test_one_run_gets_its_page(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert "<title>demo</title>" in (run / "report.html").read_text()


def test_a_folder_of_one_run_gets_the_page_of_that_run(make_run: MakeRun) -> None:
    run = make_run()
    assert main([str(run.parent)]) == 0
    assert (run / "report.html").is_file()


def test_a_folder_of_runs_gets_a_comparison(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    runs = make_run("a").parent
    make_run("b", seed=1)
    assert main([str(runs)]) == 0
    assert capsys.readouterr().out == f"{runs / 'report.html'}\n"
    assert "<title>Comparison of 2 runs</title>" in (runs / "report.html").read_text()


def test_the_output_can_be_chosen(make_run: MakeRun, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main([str(make_run("a")), str(make_run("b", seed=1)), "-o", str(page)]) == 0
    assert "Comparison of 2 runs" in page.read_text()


@pytest.mark.parametrize("where", ["missing", "empty"])
def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / where)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cil.report: ")
    assert err.count("\n") == 1
    assert where in err


def test_a_page_that_cannot_be_written_is_one_message(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(make_run()), "-o", str(tmp_path / "nowhere" / "page.html")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "nowhere" in err


def test_no_input_is_a_mistake_of_the_command_line() -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
