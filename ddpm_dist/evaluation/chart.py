"""Line charts as SVG, for the report: no script, colours from the page's style."""

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 72, 8, 10, 26
COLOURS = 5
MAX_POINTS = 400
MAX_TICKS = 6


@dataclass(frozen=True)
class Series:
    """A named curve."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y) in any order; values that aren't finite are left out, and of several at one x all but the last."""


def line_chart(title: str, series: Sequence[Series], log: bool = False) -> str:
    """HTML of a chart with its title and legend. log: logarithmic y axis, if all values allow it."""
    finite = [Series(s.name, sorted({x: y for x, y in s.points if math.isfinite(y)}.items())) for s in series]
    log = log and all(y > 0 for s in finite for _, y in s.points)
    finite = [s for s in finite if s.points]
    if not finite:
        return ""
    xs = [x for s in finite for x, _ in s.points]
    ys = [math.log10(y) if log else y for s in finite for _, y in s.points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = _padded(min(ys), max(ys), from_zero=not log)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low or 1)
        up = ((math.log10(y) if log else y) - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    ticks = _log_ticks(y_low, y_high) if log else _ticks(y_low, y_high)
    for value, label in zip(ticks, _labels(ticks), strict=True):
        y = place(x_low, value)[1]
        parts.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{label}</text>")
    for x, anchor in ((x_low, "start"), (x_high, "end"))[: 2 if x_high > x_low else 1]:
        at = place(x, 10**y_low if log else y_low)[0]
        parts.append(f"<text x='{at:.1f}' y='{HEIGHT - 6}' text-anchor='{anchor}'>step {_number(x)}</text>")
    for number, s in enumerate(finite):
        points = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in _thin(s.points))
        parts.append(f"<polyline class='line' style='stroke:var(--s{number % COLOURS})' points='{points}'/>")
    legend = "".join(
        f"<span><i style='background:var(--s{number % COLOURS})'></i>{html.escape(s.name)} "
        f"{_number(s.points[-1][1])}</span>"
        for number, s in enumerate(finite)
    )
    name = html.escape(title)
    return (
        f"<div><h3>{name}</h3><svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{name} by step'>"
        f"{''.join(parts)}</svg><div class='legend'>{legend}</div></div>"
    )


def _padded(low: float, high: float, from_zero: bool) -> tuple[float, float]:
    """Limits that hold all values; from 0 where that costs little."""
    if from_zero and 0 <= low < high / 2:
        low = 0.0
    span = (high - low) or abs(high) or 1.0
    return (low if low == 0 else low - 0.04 * span), high + 0.04 * span


def _ticks(low: float, high: float) -> list[float]:
    """About 4 round numbers between the limits."""
    raw = (high - low) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """About 4 of 1, 2, 5 · 10^k between the limits, which are logarithms; round numbers where that is too coarse."""
    exponents = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [value for k in exponents for f in factors if low <= math.log10(value := f * 10.0**k) <= high]
        if len(found) <= MAX_TICKS:
            break
    if len(found) > MAX_TICKS:
        found = found[:: -(-len(found) // MAX_TICKS)]
    return found if len(found) > 1 else _ticks(10**low, 10**high)


def _labels(values: Sequence[float]) -> list[str]:
    """Numbers with as many digits as tell each of them exactly."""
    for digits in range(1, 12):
        texts = [_number(value, digits) for value in values]
        if all(math.isclose(float(t.replace(",", "")), v, rel_tol=1e-9) for t, v in zip(texts, values, strict=True)):
            break
    return texts


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most MAX_POINTS, means of equal groups."""
    if len(points) <= MAX_POINTS:
        return points
    edges = [i * len(points) // MAX_POINTS for i in range(MAX_POINTS + 1)]
    groups = [points[low:high] for low, high in itertools.pairwise(edges)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _number(value: float, digits: int = 4) -> str:
    """With so many significant digits, and no zeros at its end."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    if abs(value) >= 100:
        text = f"{value:,.{max(0, digits - len(str(int(abs(value)))))}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{max(digits, 2)}g}"
