"""The picture of tools/bench/samplers.py: distance ÷ limit by evaluations."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ddpm_dist.diffusion.samplers import SAMPLERS
from tools.bench.samplers_rows import METRICS, NEAR, Row, curves

PANEL, MARGIN, SCALE = (460, 250), 44, 2
_COLOURS = ("#7f7f7f", "#1f77b4", "#d62728", "#ff9896", "#2ca02c", "#9467bd", "#e377c2")
COLOURS = dict(zip(SAMPLERS, itertools.cycle(_COLOURS), strict=False))
RATIOS = (0.8, 4.0)
"""Of the vertical axis; what lies outside is drawn at its edge."""


def picture(rows: Sequence[Row]) -> Image.Image:
    """Distance ÷ limit by evaluations, both logarithmic: a panel for each spacing and distance.

    A curve for each sampler; the band is within 5 % of the limit.
    """
    spacings = sorted({row.draw.spacing for row in rows})
    size = PANEL[0] * len(METRICS) * SCALE, PANEL[1] * len(spacings) * SCALE
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    few, many = min(row.evaluations for row in rows), max(row.evaluations for row in rows)
    for (down, spacing), (across, metric) in itertools.product(enumerate(spacings), enumerate(METRICS)):
        left, top = (PANEL[0] * across + MARGIN) * SCALE, (PANEL[1] * down + MARGIN / 2) * SCALE
        panel = Panel(pen, left, top, (few, many))
        panel.axes(f"{metric} / limit, {spacing}", sorted({row.evaluations for row in rows}))
        for curve in curves([row for row in rows if row.draw.spacing == spacing]).values():
            panel.curve(COLOURS[curve[0].draw.sampler], [(row.evaluations, row.ratios[metric]) for row in curve])
        panel.legend([name for name in COLOURS if any(row.draw.sampler == name for row in rows)])
    return image.resize((size[0] // SCALE, size[1] // SCALE), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Panel:
    """One pair of axes, in pixels of the picture before it is scaled down."""

    pen: ImageDraw.ImageDraw
    left: float
    top: float
    limits: tuple[int, int]
    """Of the horizontal axis."""
    width: float = (PANEL[0] - 1.5 * MARGIN) * SCALE
    height: float = (PANEL[1] - 1.2 * MARGIN) * SCALE

    def place(self, evaluations: float, ratio: float) -> tuple[float, float]:
        low, high = self.limits
        across = math.log(evaluations / low) / (math.log(high / low) or 1)
        up = math.log(min(max(ratio, RATIOS[0]), RATIOS[1]) / RATIOS[0]) / math.log(RATIOS[1] / RATIOS[0])
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def text(self, x: float, y: float, words: str, anchor: str, colour: str = "black") -> None:
        self.pen.text((x, y), words, colour, font=ImageFont.load_default(11 * SCALE), anchor=anchor)

    def axes(self, title: str, ticks: Sequence[int]) -> None:
        low, high = self.limits
        self.pen.rectangle([self.place(low, NEAR), self.place(high, 1 / NEAR)], fill="#e4f3e4")
        for ratio in (1, 1.5, 2, 3, 4):
            y = self.place(low, ratio)[1]
            self.pen.line([(self.left, y), (self.left + self.width, y)], "#cccccc", SCALE)
            self.text(self.left - 6 * SCALE, y, str(ratio), "rm")
        for tick in ticks:
            self.text(self.place(tick, 1)[0], self.top + self.height + 4 * SCALE, str(tick), "mt")
        self.text(self.left, self.top - 4 * SCALE, title, "ls")

    def curve(self, colour: str, points: Sequence[tuple[float, float]]) -> None:
        places = [self.place(*point) for point in points]
        self.pen.line(places, colour, 2 * SCALE, joint="curve")
        for x, y in places:
            self.pen.ellipse([x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE], fill=colour)

    def legend(self, names: Sequence[str]) -> None:
        for line, name in enumerate(names):
            y = self.top + (8 + 14 * line) * SCALE
            self.text(self.left + self.width - 4 * SCALE, y, name, "rm", COLOURS[name])
