"""The page as text: complete, self-contained, small, and never half written."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.report.runs import LAYERS, Builder, embedded, measured

from batchnorm.records import Record, Run
from batchnorm.report import page, shell, write_html


class Page(HTMLParser):
    """What a page refers to, its ids, and the attributes of its elements."""

    VOID = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, attribute: str) -> list[str]:
        return [value for _, found in self.elements if (value := found.get(attribute)) is not None]


def full(builder: Builder) -> None:
    for rate in (0.1, 1.0):
        for seed in range(2):
            for norm in ("none", "batch"):
                builder.cell(norm, rate, seed, measured(norm, offset=0.001 * seed))


def one_arm(builder: Builder) -> None:
    builder.cell("batch", 0.1, 0, measured("batch"))


def one_layer(builder: Builder) -> None:
    for norm in ("none", "batch"):
        builder.cell(norm, 0.1, 0, measured(norm, layers=["only"]), layers=["only"])


def many_arms(builder: Builder) -> None:
    for norm in ("none", "batch", "layer", "group", "ghost", "renorm", "l1", "linf", "noisy"):
        builder.cell(norm, 0.1, 0, measured(norm))


def regression(builder: Builder) -> None:
    for norm in ("none", "batch"):
        builder.cell(norm, 0.1, 0, measured(norm, accuracy=False), kind="regression")


def interrupted(builder: Builder) -> None:
    builder.cell("none", 0.1, 0, measured("none"))
    builder.cell("batch", 0.1, 0, measured("batch", steps=40), state="interrupted", step=40)
    builder.cell("none", 0.1, 1, None)
    builder.cell("batch", 0.1, 1, None)


def none_finished(builder: Builder) -> None:
    builder.cell("none", 0.1, 0, measured("none", steps=20), state="running", step=20)
    builder.cell("batch", 0.1, 0, [], state="running", step=0, timing={})


def none_started(builder: Builder) -> None:
    for norm in ("none", "batch"):
        builder.cell(norm, 0.1, 0, None)


def all_diverged(builder: Builder) -> None:
    for norm in ("none", "batch"):
        for rate in (1.0, 10.0):
            records = measured(norm, stop=20)
            builder.cell(norm, rate, 0, records, state="diverged", step=20)


def diverged_at_once(builder: Builder) -> None:
    builder.cell("none", 0.1, 0, measured("none"))
    nothing = [Record(0, "", "batch/loss", float("nan"))]
    builder.cell("batch", 0.1, 0, nothing, state="diverged", step=0)


SHAPES = [
    full,
    one_arm,
    one_layer,
    many_arms,
    regression,
    interrupted,
    none_finished,
    none_started,
    all_diverged,
    diverged_at_once,
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_every_shape_of_run_has_a_page(builder: Builder, shape: object) -> None:
    shape(builder)  # type: ignore[operator]
    text = page.render(builder.run())
    parsed = Page(text)
    drawn = [chart["id"] for chart in embedded(text)["charts"]]
    assert parsed.all("data-chart") == drawn
    ids = parsed.all("id")
    assert len(ids) == len(set(ids))
    assert {"headline", "training", "landscape", "run"} <= set(ids)
    assert not [link for link in parsed.all("href") if not link.startswith(("#", "data:"))]
    assert {link[1:] for link in parsed.all("href") if link.startswith("#")} <= set(ids)
    assert parsed.all("src") == []
    assert "@import" not in text
    assert "url(" not in text.split("<script")[0]
    assert "NaN" not in text.split("<script")[0]


def test_a_full_run_has_all_charts(builder: Builder) -> None:
    full(builder)
    text = page.render(builder.run())
    assert len(embedded(text)["charts"]) == 16
    assert "Not measured" not in text
    for words in (
        "batchnorm compare --out runs/demo",
        "digits",
        "2.13.0",
        "25.0%",
        "fc1, fc2, out",
    ):
        assert words in text


def test_an_unfinished_study_says_so(builder: Builder) -> None:
    interrupted(builder)
    assert "1 of 4 training runs ended, 1 stopped or going on, 2 not started" in page.render(
        builder.run()
    )


def test_nothing_measured_is_said_in_every_section(builder: Builder) -> None:
    none_started(builder)
    text = page.render(builder.run())
    assert text.count("Not measured in this run.") == 7
    assert "One learning rate was tried" in text
    assert "No training run has ended yet" in text


def test_hostile_names_stay_text(builder: Builder) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    layers = (*LAYERS, evil)
    builder.cell(evil, 0.1, 0, measured("batch", layers=layers), layers=layers, changes=[evil])
    parsed = Page(page.render(builder.run()))
    assert not [tag for tag, _ in parsed.elements if tag == "img"]


@pytest.fixture
def deep(builder: Builder) -> Run:
    layers = [f"features.{i}.conv" for i in range(8)]
    for rate in (0.1, 1.0):
        for norm in ("none", "batch"):
            records = measured(norm, steps=300, every=1, layers=layers)
            kept = [r for r in records if r.quantity != "activation/histogram"]
            builder.cell(norm, rate, 0, kept, layers=layers)
    return builder.run()


def longest(charts: list[dict[str, Any]]) -> int:
    panels = [panel for chart in charts for panel in chart["panels"]]
    return max(len(line["x"]) for panel in panels for line in panel["lines"])


def test_a_deep_network_stays_below_3_mb(deep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.render(deep)
    assert len(text.encode()) < 3_000_000
    # What does not fit is thinned first; as a last resort only a few layers remain.
    monkeypatch.setattr(shell, "_BUDGET", 400_000)
    charts = embedded(page.render(deep))["charts"]
    assert 50 <= longest(charts) <= 100
    monkeypatch.setattr(shell, "_BUDGET", 180_000)
    charts = embedded(page.render(deep))["charts"]
    assert longest(charts) == 50
    assert all("overview" not in chart for chart in charts)
    (norms,) = (chart for chart in charts if chart["id"] == "weight-norm")
    assert len(norms["panels"]) == 3 * 2
    assert "left out here" in norms["findings"][""]


def test_a_failed_write_leaves_the_old_report(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_arm(builder)
    run: Run = builder.run()
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(source: object, target: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_html(run, path)
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "run"]
    write_html(run, path)
    assert path.read_text().startswith("<!doctype html>")
