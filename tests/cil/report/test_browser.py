"""The pages in a real browser, headless: nothing is wrong on the console, and sorting, filters and themes work."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cil.report import write_comparison, write_report

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs the extra `browser`: pip install dkt-incremental[browser]"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path: apt-get install chromium")

MakeRun = Callable[..., Path]
PHONE, DESK = 375, 1280  # pixels
OPTIONS = {"args": ["--no-sandbox", "--disable-gpu"], "timeout": 120_000}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, **OPTIONS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def run_page(with_snapshots: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(with_snapshots, tmp_path_factory.mktemp("page") / "run.html")


@pytest.fixture(scope="module")
def comparison_page(tmp_path_factory: pytest.TempPathFactory, write_run: MakeRun) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    made = [
        write_run(folder / f"{learner}-seed{seed}", learner=learner, seed=seed)
        for learner in ("replay", "dkt", "finetune")
        for seed in (0, 1)
    ]
    made.append(write_run(folder / "other-seed0", learner="other", protocol="0123456789abcdef"))
    return write_comparison(made, folder / "page.html")


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """`visit(page, width, scheme)` opens a page; at the end nothing may have been said on the console or fetched."""
    said: list[str] = []
    opened = []

    def open_page(path: Path, width: int = DESK, scheme: str = "light") -> Any:
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        opened.append(tab)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        tab.goto(path.as_uri(), timeout=120_000)
        return tab

    yield open_page
    for tab in opened:
        tab.close()
    assert said == []


def column(tab: Any, table: str, index: int) -> list[str]:
    """The visible cells of a column."""
    return tab.eval_on_selector_all(
        f"#{table} tbody:not([hidden]) tr:not([hidden])",
        f"rows => rows.map(row => row.cells[{index}].textContent.trim())",
    )


def ground(tab: Any) -> str:
    return tab.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("name", ["run_page", "comparison_page"])
def test_a_phone_shows_the_whole_width(name: str, visit: Any, request: pytest.FixtureRequest) -> None:
    tab = visit(request.getfixturevalue(name), PHONE)
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE


@pytest.mark.parametrize(("scheme", "other"), [("light", "Dark"), ("dark", "Light")])
def test_the_theme_follows_the_system_and_the_switch(scheme: str, other: str, visit: Any, run_page: Path) -> None:
    tab = visit(run_page, scheme=scheme)
    switch = tab.locator("#theme")
    grounds, inks = [ground(tab)], [tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill")]
    assert switch.inner_text() == other
    for _ in range(2):
        switch.click()
        grounds.append(ground(tab))
        inks.append(tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill"))
    assert grounds[0] == grounds[2] != grounds[1]
    assert inks[0] == inks[2] != inks[1]
    assert (grounds[0] == "rgb(255, 255, 255)") == (scheme == "light")


def test_a_table_is_sorted_by_any_column_both_ways(visit: Any, comparison_page: Path) -> None:
    tab = visit(comparison_page)
    assert column(tab, "groups", 0) == ["replay", "dkt", "finetune", "other"]
    head = tab.locator("#groups th button")
    head.nth(2).click()
    means = [float(text.split(" ")[0]) for text in column(tab, "groups", 2)]
    assert means == sorted(means, reverse=True)
    head.nth(2).click()
    assert [float(text.split(" ")[0]) for text in column(tab, "groups", 2)] == sorted(means)
    head.nth(0).click()
    assert column(tab, "groups", 0) == ["dkt", "finetune", "other", "replay"]
    sorts = tab.eval_on_selector_all("#groups th", "heads => heads.map(head => head.getAttribute('aria-sort'))")
    assert sorts[:3] == ["ascending", None, None]


def test_what_is_not_known_is_sorted_last_in_both_directions(visit: Any, comparison_page: Path) -> None:
    tab = visit(comparison_page)
    for _ in range(2):
        tab.locator("#pairs th button").nth(1).click()
        assert column(tab, "pairs", 0)[-1] == "other"
        assert column(tab, "pairs", 1)[-1] == "other protocol"


def test_a_filter_keeps_the_rows_that_have_every_word(visit: Any, comparison_page: Path) -> None:
    tab = visit(comparison_page)
    box = tab.get_by_placeholder("Filter runs")
    box.fill("SEED1 t")
    assert column(tab, "runs", 0) == ["dkt-seed1", "finetune-seed1"]
    assert tab.get_by_text("2 of 7", exact=True).is_visible()
    box.fill("")
    assert len(column(tab, "runs", 0)) == 7


def test_differences_are_taken_to_the_base_that_is_chosen(visit: Any, comparison_page: Path) -> None:
    tab = visit(comparison_page)
    assert column(tab, "pairs", 0) == ["dkt", "finetune", "other"]
    first = column(tab, "pairs", 1)[0]
    tab.locator("select").select_option("dkt")
    assert column(tab, "pairs", 0) == ["replay", "finetune", "other"]
    assert column(tab, "pairs", 1)[0] == first.replace("+", "\N{MINUS SIGN}")


def test_different_protocols_are_warned_of(visit: Any, comparison_page: Path) -> None:
    assert visit(comparison_page).get_by_role("alert").is_visible()


def test_a_cell_that_is_pointed_at_is_told(visit: Any, run_page: Path) -> None:
    tab = visit(run_page)
    figure = tab.locator("figure:has(output)")
    figure.scroll_into_view_if_needed()
    box = tab.evaluate("JSON.parse(document.querySelector('figure script').textContent).box")
    place = figure.locator("svg").bounding_box()
    x = place["x"] + place["width"] * (box[0] + (box[2] - box[0]) * 0.35)
    y = place["y"] + place["height"] * (box[1] + (box[3] - box[1]) * 0.35)
    tab.mouse.move(x, y)
    told = figure.locator("output").inner_text()
    assert told.startswith("three: ")
    assert told.endswith(" of 30 rightly answered")


def test_the_table_is_downloaded_without_a_server(visit: Any, comparison_page: Path) -> None:
    tab = visit(comparison_page)
    with tab.expect_download() as started:
        tab.get_by_role("link", name="CSV").click()
    assert started.value.suggested_filename == "table.csv"
    assert Path(started.value.path()).read_text().startswith("runs,protocol,num_finished")
