"""The results of a report: the table of metrics and their curves, question by question.

Only answers to the same question share a curve, or compete for the bold cell of a column.
"""

import html
from collections.abc import Sequence
from typing import Any

from ddpm_dist.evaluation.chart import Series
from ddpm_dist.evaluation.ranking import best_of, groups

_BESIDE = ("_floor", "_deviation", "_real", "_prior", "_decoder")


def metrics_table(found: Sequence[dict[str, Any]]) -> str:
    """One row per result, one column per metric, floors beside; bold is the best among comparable ones."""
    if not found:
        return "<p>Nothing has been evaluated yet.</p>"
    names = value_names(found)
    best = {(name, best_of(group, name)["name"]) for name in names for group in groups(found, name) if len(group) > 1}
    letters = _letters(found)
    head = "".join(f"<th>{text(title_of(name))}</th>" for name in names)
    asked = "<th>question</th>" if letters else ""
    rows = []
    for result in found:
        cells = "".join(_cell(result["metrics"], name, (name, result["name"]) in best) for name in names)
        against = result["reference"].get("num_samples")
        numbers = f"{result['num_samples']:,}" + (f" / {against:,}" if against else "")
        letter = f"<td>{letters.get(_question_id(result), '–')}</td>" if letters else ""
        rows.append(f"<tr><td>{step_of(result)}</td>{letter}<td class='whole'>{numbers}</td>{cells}</tr>")
    return (
        f"<div class='scroll'><table><thead><tr><th>step</th>{asked}<th>samples / reference</th>"
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "<p class='note'>Small: the same between real images of the reference (real against real). A distance at its "
        "floor can't be told from the data at that number of images. Bold: the best of its column among answers to "
        f"the same question.{_questions(found, letters)}</p>"
    )


def _letters(found: Sequence[dict[str, Any]]) -> dict[str | None, str]:
    """{question's id: its letter}, where there is more than one, or results that don't say theirs."""
    ids = list(dict.fromkeys(_question_id(result) for result in found))
    known = [one for one in ids if one is not None]
    return {} if len(ids) < 2 else {one: _letter(number) for number, one in enumerate(known)}


def _letter(number: int) -> str:
    return chr(ord("A") + number % 26) + (str(number // 26) if number >= 26 else "")


def _question_id(result: dict[str, Any]) -> str | None:
    asked = result.get("question")
    return asked.get("id") if isinstance(asked, dict) else None


def _questions(found: Sequence[dict[str, Any]], letters: dict[str | None, str]) -> str:
    """What the letters stand for."""
    lines = []
    for one, letter in letters.items():
        result = next(r for r in found if _question_id(r) == one)
        against = result["reference"].get("data") or result["reference"].get("statistics")
        lines.append(f"{letter}: {result['num_samples']:,} samples of {drawn(result)}, against {against}")
    if letters and any(_question_id(result) is None for result in found):
        lines.append("–: it doesn't say all that its numbers depend on, and is not ranked")
    return "".join(f"<br>{text(line)}" for line in lines)


def _cell(values: dict[str, float], name: str, is_best: bool) -> str:
    if name not in values:
        return "<td>–</td>"
    shown = f"{values[name]:.4g}"
    if is_best:
        shown = f"<b>{shown}</b>"
    if f"{name}_floor" in values:
        shown += f"<small>real {values[f'{name}_floor']:.4g}</small>"
    if f"{name}_deviation" in values:
        shown += f"<small>± {values[f'{name}_deviation']:.2g}</small>"
    return f"<td>{shown}</td>"


def curves_of(found: Sequence[dict[str, Any]], name: str) -> list[Series]:
    """A curve for each question that several steps answer, and its floor."""
    letters, series = _letters(found), []
    for group in groups(found, name):
        letter = letters.get(_question_id(dict(group[0])))
        mark = f" ({letter})" if letter else ""
        rated = [r for r in group if r["step"] is not None]
        if len(rated) < 2:
            continue
        series.append(Series(title_of(name) + mark, [(r["step"], r["metrics"][name]) for r in rated]))
        floor = [(r["step"], r["metrics"][f"{name}_floor"]) for r in rated if f"{name}_floor" in r["metrics"]]
        if floor:
            series.append(Series(f"real against real{mark}", floor))
    return series


def value_names(found: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(n for r in found for n in r["metrics"] if not n.endswith(_BESIDE)))


def drawn(result: dict[str, Any]) -> str:
    sampling = result["sampling"]
    if not sampling:
        return "unknown"
    labels = result.get("labels") or "none"
    guided = f", guidance {sampling['guidance_scale']:g}" if sampling.get("guidance_scale", 1) != 1 else ""
    return (
        f"{sampling['sampler']}, {sampling['steps'] or 'all'} steps, {sampling['precision']}{guided}, seed "
        f"{result['seed']}" + ("" if labels == "none" else f", labels {labels}")
    )


def step_of(result: dict[str, Any]) -> str:
    return f"{result['step']:,}" if result["step"] is not None else "–"


def title_of(name: str) -> str:
    return (
        name.replace("_", " ")
        .replace("frechet", "Fréchet")
        .replace("fid", "FID")
        .replace("kid", "KID")
        .replace("is ", "IS ")
    )


def text(value: object) -> str:
    return html.escape(str(value))
