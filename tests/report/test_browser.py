"""The page in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.report.runs import Builder, embedded, measured

from batchnorm.report import write_html

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (group 'test')")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

LAYERS = ["conv1", "conv2", "conv3", "conv4", "conv5", "out"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms, two rates, two seeds, six layers; one seed of one arm diverges."""
    folder = tmp_path_factory.mktemp("report")
    builder = Builder(folder / "run")
    for seed in range(2):
        for rate in (0.1, 1.0):
            for norm in ("none", "batch"):
                lost = norm == "none" and rate == 1.0 and seed == 1
                records = measured(norm, layers=LAYERS, stop=20 if lost else None)
                state = {"state": "diverged", "step": 20} if lost else {}
                builder.cell(norm, rate, seed, records, layers=LAYERS, **state)
    path = folder / "report.html"
    write_html(builder.run(), path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        flags += ["--disable-component-update", "--disable-sync"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@dataclass
class Seen:
    """An open page with all that it complained about and asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def seen(browser: Any, report: Path) -> Iterator[Seen]:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    seen = Seen(page)
    page.on("console", lambda message: seen.complaints.append(message.text))
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_selector("svg[role=img]")
    yield seen
    page.close()
    assert seen.complaints == []
    assert seen.requests == [report.as_uri()]


def test_every_chart_is_drawn_named_and_described(seen: Seen, report: Path) -> None:
    for chart in embedded(report.read_text())["charts"]:
        plots = seen.page.locator(f"[data-chart={chart['id']}] svg[role=img]")
        assert plots.count() >= 1, chart["id"]
        for plot in plots.all():
            assert chart["title"] in plot.get_attribute("aria-label")
            assert plot.get_attribute("aria-description")
            assert plot.get_attribute("tabindex") == "0"
            assert plot.locator("path").count() > 0


def test_controls_and_regions_have_names(seen: Seen) -> None:
    unnamed = seen.page.evaluate(
        """() => [...document.querySelectorAll("select, summary, [role=region], section, nav")]
            .filter((e) => !(e.labels?.length || e.textContent.trim()
                || e.ariaLabel || e.getAttribute("aria-labelledby")))
            .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []
    levels = seen.page.evaluate(
        "() => [...document.querySelectorAll('h1,h2,h3')].map((h) => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_colours_stand_out_from_the_paper_in_both_schemes(seen: Seen) -> None:
    for scheme in ("light", "dark"):
        seen.page.emulate_media(color_scheme=scheme)
        ratios = seen.page.evaluate(
            """() => {
                const light = (color) => {
                    const parts = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
                        .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
                };
                const paper = light(getComputedStyle(document.body).backgroundColor);
                const contrast = (color) => {
                    const [a, b] = [light(color), paper].sort((x, y) => y - x);
                    return (a + 0.05) / (b + 0.05);
                };
                const text = [document.body, document.querySelector(".how")];
                const arms = [...document.querySelectorAll(".swatch")];
                return [
                    Math.min(...text.map((e) => contrast(getComputedStyle(e).color))),
                    Math.min(...arms.map((e) => contrast(getComputedStyle(e).backgroundColor))),
                ];
            }"""
        )
        assert ratios[0] >= 4.5
        assert ratios[1] >= 3


def test_numbers_open_by_keyboard(seen: Seen) -> None:
    summary = seen.page.locator("#chart-loss summary")
    summary.focus()
    seen.page.keyboard.press("Enter")
    table = seen.page.locator("#chart-loss details table").first
    table.wait_for()
    assert table.locator("thead th").all_inner_texts() == [
        "step",
        "no normalization",
        "batch norm",
    ]
    assert table.locator("tbody tr").count() == 11
    assert table.locator("tbody tr").first.locator("td").first.inner_text().startswith("2.31")


def test_values_are_read_with_keys_and_pointer(seen: Seen) -> None:
    chart = seen.page.locator("#chart-accuracy")
    plot = chart.locator("svg[role=img]").last
    plot.focus()
    seen.page.keyboard.press("End")
    live = chart.locator("[aria-live]")
    assert live.inner_text().startswith("step 100: no normalization 86.1%")
    tip = chart.locator(".bn-panel").last.locator(".bn-tip")
    assert tip.is_visible()
    seen.page.keyboard.press("Escape")
    assert tip.is_hidden()
    plot.hover(position={"x": 60, "y": 100})
    assert tip.is_visible()
    assert tip.inner_text().startswith("step 0")


def test_the_learning_rate_changes_all_charts(seen: Seen) -> None:
    finding = seen.page.locator("#chart-loss .bn-finding")
    ends = seen.page.locator("#chart-loss .bn-legend", has_text="a seed diverged")
    assert ends.count() == 0
    seen.page.get_by_label("Learning rate shown").select_option("1")
    assert "diverged without normalization at step 20 (1 of 2 seeds)" in finding.inner_text()
    assert ends.count() == 1


def test_the_layer_menu_shows_one_layer(seen: Seen) -> None:
    chart = seen.page.locator("#chart-percentiles")
    titles = chart.locator(".bn-title")
    assert titles.first.inner_text() == "layer conv5, no normalization"
    assert titles.count() == 6
    chart.get_by_role("combobox").select_option("out")
    assert titles.all_inner_texts() == ["layer out, no normalization", "layer out, batch norm"]


@pytest.mark.parametrize("width", [320, 400, 1200, 2000])
def test_no_width_needs_sideways_scrolling(seen: Seen, width: int) -> None:
    seen.page.set_viewport_size({"width": width, "height": 800})
    seen.page.wait_for_timeout(200)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    widest = seen.page.evaluate(
        "Math.max(...[...document.querySelectorAll('svg[role=img]')].map(s => s.clientWidth))"
    )
    assert widest <= width
