"""The report: every number is there, it reaches for nothing outside, and it survives what names may hold."""

import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.evaluation.chart import MAX_POINTS, Series, line_chart
from ddpm_dist.evaluation.report import MAX_GRIDS, render
from ddpm_dist.recipe import parse_config
from ddpm_dist.training.events import Events


def config(name: str = "run") -> Config:
    return parse_config(
        f"""
        run: {{url: "memory://runs/{name}"}}
        data: {{url: "memory://digits", image_size: 8, channels: 1}}
        model: {{channels: 32, channel_mult: [1, 2], attention_resolutions: [4]}}
        train: {{steps: 300, global_batch: 4}}
        """
    )


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), level, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def result(step: int, value: float, **changes: Any) -> dict[str, Any]:
    grid = f"memory://grids/{step}.png"
    storage.publish(grid, png(step % 256))
    return {
        "name": f"{step}",
        "num_samples": 500,
        "step": step,
        "weights": "ema",
        "seed": 0,
        "sampling": {"sampler": "ddim", "steps": 50, "precision": "bf16"},
        "reference": {"data": "memory://digits", "num_samples": 1797},
        "networks": {"lite0": {"resize": "antialiased bilinear"}},
        "snapshot": f"memory://run/snapshots/{step:09d}",
        "question": {"id": "a"},
        "answers": {"frechet_lite0": "f", "precision_lite0": "p"},
        "sampled_on": {"device": "cpu AVX2", "threads": 1, "torch": "2.13.0"},
        "workers": 2,
        "versions": {"torch": "2.13.0"},
        "metrics": {"frechet_lite0": value, "frechet_lite0_floor": 91.5},
        "warnings": ["500 samples are few"],
        "seconds": 12.0,
        "sampling_seconds": 75.0,
        "grid": grid,
        **changes,
    }


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would load."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


EVENTS = Events({"loss/mean": [(step, 1 / (step + 1)) for step in range(300)]}, {"samples/ema": [(100, png(1))]})


def test_shows_metrics_floors_warnings_and_grids() -> None:
    page = render(config(), [result(100, 250.25), result(200, 120.5), result(300, 130.75)], EVENTS, {"goodput": 0.97})
    parsed = Page(page)
    assert parsed.open == []
    text = " ".join(parsed.text)
    for shown in (
        "250.2",
        "120.5",
        "130.8",
        "91.5",
        "500 samples are few",
        "antialiased bilinear",
        "0.97",
        "2 × cpu AVX2",
    ):
        assert shown in text
    assert "1:15 sampling, 0:12 evaluation" in text
    assert "<b>120.5</b>" in page
    assert page.count("<svg") == 2
    assert sum(source.startswith("data:image/png") for source in parsed.sources) == 3


def test_reaches_for_nothing_outside() -> None:
    page = render(config(), [result(100, 1.0), result(200, 2.0)], EVENTS, None)
    assert all(source.startswith("data:") for source in Page(page).sources)
    assert not re.search(r"https?://|@import|url\(|<script", page)


def test_without_evaluations_it_shows_the_training() -> None:
    page = render(config(), [], EVENTS, None)
    assert "Nothing has been evaluated yet" in page
    assert page.count("data:image/png") == 1
    empty = render(config(), [], Events({}, {}), None)
    assert "<svg" not in empty
    Page(empty)


def test_of_scores_the_largest_is_the_best() -> None:
    found = [result(step, 1.0, metrics={"precision_lite0": value}) for step, value in ((1, 0.25), (2, 0.75), (3, 0.5))]
    assert re.findall("<b>(.*?)</b>", render(config(), found, EVENTS, None)) == ["0.75"]


def bold_of(found: list[dict[str, Any]]) -> list[str]:
    return re.findall("<b>(.*?)</b>", render(config(), found, EVENTS, None))


def test_only_answers_to_one_question_compete_and_share_a_curve() -> None:
    few = {"question": {"id": "b"}, "answers": {"frechet_lite0": "g"}, "num_samples": 50}
    found = [result(step, value) for step, value in ((100, 9.0), (200, 8.0))]
    found += [result(step, value, name=f"few{step}", **few) for step, value in ((100, 90.0), (200, 80.0), (300, 7.0))]
    page = render(config(), sorted(found, key=lambda one: int(one["step"])), EVENTS, None)
    assert re.findall("<b>(.*?)</b>", page) == ["8", "7"]
    text = " ".join(Page(page).text)
    assert "A: 500 samples of ddim, 50 steps, bf16, seed 0, against memory://digits" in text
    assert "B: 50 samples of ddim" in text
    curves = [line for line in points_of(page)[1:] if len({y for _, y in line}) > 1]
    assert [len(line) for line in curves] == [2, 3]
    assert all(x == sorted(x) for x in ([x for x, _ in line] for line in curves)), "no curve turns back"


def test_results_that_do_not_say_what_they_answer_are_shown_and_not_ranked() -> None:
    old = [result(100, 1.5), result(200, 9.5)]
    for one in old:
        del one["question"], one["answers"]
    page = render(config(), [*old, result(300, 5.0), result(400, 4.0)], EVENTS, None)
    assert bold_of([*old, result(300, 5.0), result(400, 4.0)]) == ["4"]
    text = " ".join(Page(page).text)
    assert "1.5" in text
    assert "–: it doesn't say all that its numbers depend on, and is not ranked" in text


def test_a_value_that_is_no_number_is_not_the_best() -> None:
    assert bold_of([result(100, float("nan")), result(200, 3.0), result(300, 2.0)]) == ["2"]


def test_a_snapshot_that_was_made_anew_counts_once() -> None:
    old = result(200, 1.0, name="old", finished_at="2026-01-01T00:00:00Z")
    new = result(200, 6.0, name="new", finished_at="2026-01-02T00:00:00Z")
    assert bold_of([result(100, 7.0), old, new]) == bold_of([result(100, 7.0), new, old]) == ["6"]


def test_samples_of_unknown_origin() -> None:
    unknown = dict.fromkeys(("step", "weights", "seed", "sampling", "sampled_on", "sampling_seconds"))
    page = render(config(), [{**result(100, 1.0), **unknown}], EVENTS, None)
    assert "<td>unknown</td><td>unknown</td><td>unknown</td><td>0:12 evaluation</td>" in page


def test_names_are_escaped() -> None:
    page = render(config("<script>x"), [result(100, 1.0, warnings=["a <b> & c"])], EVENTS, None)
    assert "<script" not in page
    assert "a &lt;b&gt; &amp; c" in page


def test_many_grids_are_thinned_to_first_and_last() -> None:
    page = render(config(), [result(step, 1.0) for step in range(10, 310, 10)], EVENTS, None)
    shown = re.findall(r"<figcaption>step ([\d,]+)<", page)
    assert len(shown) == MAX_GRIDS
    assert (shown[0], shown[-1]) == ("10", "300")


def points_of(chart: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r"points='([^']*)'", chart)
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]  # type: ignore[misc]


@pytest.mark.parametrize("log", [False, True])
def test_chart_keeps_order_and_bounds(log: bool) -> None:
    series = [
        Series("a", [(step, 10.0 ** (-step / 500)) for step in range(1500)]),
        Series("b", [(0, 0.5), (1499, 0.2)]),
    ]
    lines = points_of(line_chart("loss", series, log))
    assert len(lines[0]) == MAX_POINTS
    assert all(0 <= x <= 480 and 0 <= y <= 240 for line in lines for x, y in line)
    assert [x for x, _ in lines[0]] == sorted(x for x, _ in lines[0])
    assert [y for _, y in lines[0]] == sorted(y for _, y in lines[0])


def test_a_curve_goes_forward_whatever_the_order_of_its_points() -> None:
    chart = line_chart("x", [Series("a", [(1, 1.0), (3, 3.0), (2, 2.0), (3, 4.0)])])
    assert [x for x, _ in points_of(chart)[0]] == sorted({x for x, _ in points_of(chart)[0]})
    assert "</i>a 4</span>" in chart, "of two values at one step the later one counts"


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("span", [(8e-4, 0.9), (0.03, 0.031), (1e-5, 3e3), (0.2, 0.9), (100, 100.9), (2e6, 9e6)])
def test_ticks_are_round_numbers_each_once(log: bool, span: tuple[float, float]) -> None:
    chart = line_chart("x", [Series("a", [(0, span[0]), (9, span[1])])], log)
    ticks = re.findall(r"text-anchor='end'>([^<s]*)</text>", chart)
    assert 2 <= len(ticks) == len(set(ticks)) <= 6
    digits = [tick.partition("e")[0].replace(",", "").replace(".", "").strip("0") for tick in ticks]
    assert all(len(text) <= (1 if log and span[1] > 4 * span[0] else 5) for text in digits), ticks
    assert all("e+" not in tick for tick in ticks)


@pytest.mark.parametrize(
    "points", [[(5, 3.0)], [(0, 2.0), (1, 2.0)], [(0, 0.0), (1, 0.0)], [(0, float("nan")), (1, -1.0), (2, 1e9)]]
)
def test_chart_of_few_or_odd_values(points: list[tuple[float, float]]) -> None:
    for log in (False, True):
        assert "nan" not in line_chart("x", [Series("a", points)], log)
    assert line_chart("x", [Series("a", [(0, float("inf"))])]) == ""
