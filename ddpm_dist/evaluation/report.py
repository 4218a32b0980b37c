"""`evaluation/report.html`: a run on one page, without outside links, that opens from disk.

What was trained and how, the curves of loss and distances, sample grids over training, the nearest training
images of some samples, the table of metrics with floors and warnings, and where it ran and for how long.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from typing import Any

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.errors import NotFoundError
from ddpm_dist.evaluation.chart import Series, line_chart
from ddpm_dist.evaluation.result import results
from ddpm_dist.evaluation.table import curves_of, drawn, metrics_table, step_of, text, title_of, value_names
from ddpm_dist.progress import clock
from ddpm_dist.recipe import dump_config
from ddpm_dist.training import Events, read_events
from ddpm_dist.training.run_folder import read_summary

MAX_GRIDS = 8
LOSS, RATE = "loss/mean", "optimisation/lr"


def write_report(cfg: Config) -> str:
    """Publishes the report of a run's folder from what is there now; returns its URL."""
    folder = storage.join(cfg.run.url, "evaluation")
    url = storage.join(folder, "report.html")
    page = render(cfg, results(folder), read_events(cfg.run.url), read_summary(cfg.run.url))
    storage.publish(url, page.encode())
    return url


def render(cfg: Config, found: Sequence[dict[str, Any]], events: Events, summary: dict[str, Any] | None) -> str:
    """The page. found: results of evaluations, by step."""
    sections = [
        ("Metrics", metrics_table(found)),
        ("Warnings", _warnings(found)),
        ("Curves", _curves(found, events)),
        ("Samples over training", _grids(found, events)),
        ("Nearest training images", _nearest(found)),
        ("What was run", _runs(found, summary)),
        ("Recipe", f"<details><summary>configuration</summary><pre>{text(dump_config(cfg))}</pre></details>"),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    name = text(cfg.run.url.rstrip("/").rpartition("/")[2])
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><link rel='icon' href='data:,'><title>{name}</title>"
        f"<style>{_STYLE}</style></head><body><main><h1>{name}</h1>{_lead(cfg, found)}{body}</main></body></html>\n"
    )


def _process(cfg: Config) -> str:
    d = cfg.diffusion
    return f"{d.timesteps} steps, {d.schedule}" if d.process == "ddpm" else f"{d.process}, times {d.times}"


def _lead(cfg: Config, found: Sequence[dict[str, Any]]) -> str:
    network = f"{cfg.model.channels} channels × {list(cfg.model.channel_mult)}"
    size = f"{cfg.data.image_size}×{cfg.data.image_size}, {'colour' if cfg.data.channels == 3 else 'grey'}"
    facts = [
        ("data", cfg.data.url if isinstance(cfg.data.url, str) else ", ".join(cfg.data.url)),
        ("images", size),
        ("network", network),
        ("process", f"{_process(cfg)}, {cfg.diffusion.prediction}"),
        ("training", f"{cfg.train.steps:,} steps × {cfg.train.global_batch} images, lr {cfg.train.lr:g}"),
        ("sampler", f"{cfg.sampling.sampler}, {cfg.sampling.steps or cfg.diffusion.timesteps} steps"),
        ("evaluated", f"{len(found)} times"),
    ]
    return "<dl>" + "".join(f"<div><dt>{key}</dt><dd>{text(value)}</dd></div>" for key, value in facts) + "</dl>"


def _warnings(found: Sequence[dict[str, Any]]) -> str:
    steps: dict[str, list[str]] = {}
    for result in found:
        for warning in result["warnings"]:
            steps.setdefault(warning, []).append(step_of(result))
    items = "".join(
        f"<li>{text(warning)} <small>({'all' if len(at) == len(found) else 'step ' + ', '.join(at)})</small></li>"
        for warning, at in steps.items()
    )
    return f"<ul class='warn'>{items}</ul>" if items else ""


def _curves(found: Sequence[dict[str, Any]], events: Events) -> str:
    charts = []
    if events.scalars.get(LOSS):
        quartiles = [tag for tag in sorted(events.scalars) if tag.startswith("loss/t_quartile")]
        series = [Series("loss", events.scalars[LOSS])]
        series += [Series(f"t quartile {tag[-1]}", events.scalars[tag]) for tag in quartiles]
        charts.append(line_chart("Loss", series, log=True))
    if events.scalars.get(RATE):
        charts.append(line_chart("Learning rate", [Series("lr", events.scalars[RATE])]))
    charts += [line_chart(title_of(name), series) for name in value_names(found) if (series := curves_of(found, name))]
    return f"<div class='charts'>{''.join(charts)}</div>" if charts else ""


def _grids(found: Sequence[dict[str, Any]], events: Events) -> str:
    pictures = [(step_of(r), data) for r in found if r.get("grid") and (data := _read(r["grid"]))]
    if not pictures:
        pictures = [(str(step), data) for step, data in events.images.get("samples/ema", [])]
    return _gallery(_spread(pictures, MAX_GRIDS), "step {}")


def _nearest(found: Sequence[dict[str, Any]]) -> str:
    for result in reversed(found):
        data = _read(result.get("nearest", {}).get("picture"))
        if data:
            nearest = result["nearest"]
            distances = ", ".join(f"{distance:.3g}" for distance in nearest["distances"])
            caption = "step {}: samples above, nearest training images below"
            return (
                f"{_gallery([(step_of(result), data)], caption, 'wide')}"
                f"<p class='note'>Distances in {text(nearest['network'])} features: {distances}. "
                "A distance near 0 is a copy.</p>"
            )
    return ""


def _runs(found: Sequence[dict[str, Any]], summary: dict[str, Any] | None) -> str:
    """One row per result: what was drawn, where, and how long it took; what they share stands below."""
    table = ""
    if found:
        head = "".join(f"<th>{name}</th>" for name in ("step", "weights", "sampler", "where", "time", "software"))
        rows = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in _run_cells(r))}</tr>" for r in found)
        table = (
            f"<div class='scroll'><table class='left'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
            f"<p class='note'>{'<br>'.join(map(text, _compared_with(found)))}</p>"
        )
    if summary:
        table += (
            f"<details><summary>end of the last training attempt</summary><pre>"
            f"{text(json.dumps(summary, indent=2))}</pre></details>"
        )
    return table


def _run_cells(result: dict[str, Any]) -> tuple[object, ...]:
    place, where = result.get("sampled_on"), "unknown"
    if place:
        where = f"{result['workers']} × {place['device']}, threads: {place['threads']}"
    time = f"{clock(result['seconds'])} evaluation"
    if result.get("sampling_seconds") is not None:
        time = f"{clock(result['sampling_seconds'])} sampling, {time}"
    return (
        step_of(result),
        result["weights"] or "unknown",
        drawn(result),
        where,
        time,
        f"torch {result['versions']['torch']}",
    )


def _compared_with(found: Sequence[dict[str, Any]]) -> list[str]:
    """References and resizes, each once."""
    against = [r["reference"].get("data") or r["reference"].get("statistics") for r in found]
    resizes = [f"Resize of {name}: {network['resize']}." for r in found for name, network in r["networks"].items()]
    return list(dict.fromkeys([*(f"Compared with {url}." for url in against), *resizes]))


def _gallery(pictures: Iterable[tuple[str, bytes]], caption: str, style: str = "") -> str:
    figures = "".join(
        f"<figure><img alt='{text(caption.format(name))}' src='data:image/png;base64,"
        f"{base64.b64encode(data).decode()}'><figcaption>{text(caption.format(name))}</figcaption></figure>"
        for name, data in pictures
    )
    return f"<div class='gallery {style}'>{figures}</div>" if figures else ""


def _spread(items: Sequence[tuple[str, bytes]], most: int) -> list[tuple[str, bytes]]:
    """At most so many, evenly over the sequence, with its first and last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _read(url: str | None) -> bytes | None:
    try:
        return storage.read(url) if url else None
    except NotFoundError:
        return None


_STYLE = """
:root{--bg:#fff;--fg:#1c1e21;--dim:#5f6570;--line:#d9dce1;--soft:#f4f5f7;--warn:#8a4b00;
--s0:#1f5fbf;--s1:#b3541e;--s2:#2c7a4b;--s3:#7a3fa0;--s4:#8a6d00}
@media(prefers-color-scheme:dark){:root{--bg:#16181c;--fg:#e6e8eb;--dim:#9aa1ac;--line:#343840;--soft:#1f2227;
--warn:#f0b060;--s0:#7fb0ff;--s1:#f0a070;--s2:#76c893;--s3:#c89be8;--s4:#d8bf5a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;margin:0 0 16px;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:40px 0 12px}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:12px 24px;margin:0}
dt{color:var(--dim);font-size:.8rem}dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:6px 12px 6px 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th{font-size:.8rem;font-weight:500;color:var(--dim)}th:first-child,td:first-child{text-align:left}
.left th,.left td{text-align:left;font-size:.85rem}
.whole{white-space:nowrap}td small{display:block;color:var(--dim);white-space:nowrap}
.note{color:var(--dim);font-size:.85rem;max-width:70ch}
.warn{color:var(--warn);padding-left:1.2em;margin:0;max-width:80ch}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr));gap:24px}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,230px),1fr));gap:16px}
.gallery.wide{grid-template-columns:1fr}
figure{margin:0}img{width:100%;image-rendering:pixelated;display:block}
figcaption{color:var(--dim);font-size:.8rem;padding-top:4px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--dim);font-size:12px}
svg .grid{stroke:var(--line);stroke-width:1}svg .line{fill:none;stroke-width:2;stroke-linejoin:round}
@media(max-width:520px){svg text{font-size:16px}}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.8rem;color:var(--dim);padding:4px 0 0}
.legend i{display:inline-block;width:12px;height:3px;margin-right:6px;vertical-align:middle}
h3{font-size:.95rem;font-weight:500;margin:0 0 4px}
details{margin-top:12px}
details summary{cursor:pointer;color:var(--dim)}pre{background:var(--soft);padding:12px;overflow-x:auto;font-size:.8rem}
"""
