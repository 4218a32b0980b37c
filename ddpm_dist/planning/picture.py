"""A plan as one SVG: a GPU's step and memory on different numbers of GPUs, readable in light and dark."""

import html
from collections.abc import Sequence

from ddpm_dist.planning.plan import Plan

WIDTH, HEIGHT, MARGIN, HEAD = 760, 340, 56, 48
PANEL = (WIDTH - 3 * MARGIN) / 2
BASE, TOP = HEIGHT - 64, HEAD + 24
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.t{font-weight:600}.a{fill:#3b6ea8}.b{fill:#c9822b}.c{fill:#7a7a7a}"
    ".d{fill:#5a9a6a}.g{stroke:#8884;stroke-width:1}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.back{fill:#181818}}.back{fill:#fff}"
    "@media(prefers-color-scheme:dark){.back{fill:#181818}}"
)
Bar = tuple[str, Sequence[float]]
"""What stands below it, and its parts from the bottom up."""


def as_svg(title: str, plans: Sequence[Plan]) -> str:
    """Two panels: milliseconds of a step and GiB of a GPU, a bar for each plan, in the order of their GPUs."""
    plans = sorted(plans, key=lambda plan: plan.step.setting.gpus)
    steps: list[Bar] = []
    memories: list[Bar] = []
    for plan in plans:
        step, memory = plan.step, plan.step.memory
        name = str(step.setting.gpus)
        idle = max(0.0, step.launch_s - step.compute_s)
        steps.append((name, [1e3 * step.compute_s, 1e3 * idle, 1e3 * step.communication_s]))
        parts = (memory.between_steps, memory.gradients, memory.activations, memory.overhead)
        memories.append((name, [part / 2**30 for part in parts]))
    limit = plans[0].step.setting.card.memory / 2**30
    panels = [
        _panel(MARGIN, "ms a step by GPUs, and efficiency", steps, ("arithmetic", "the host", "communication"), "abc",
               [f"{plan.step.efficiency:.0%}" for plan in plans]),
        _panel(2 * MARGIN + PANEL, f"GiB of a GPU, of {limit:.0f}", memories,
               ("between steps", "gradients", "activations", "device"), "abdc", [""] * len(plans)),
    ]  # fmt: skip
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' role='img'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<rect class='back' width='{WIDTH}' height='{HEIGHT}'/>"
        f"<text class='t' x='{MARGIN}' y='24'>{html.escape(title)}</text>{''.join(panels)}</svg>\n"
    )


def _panel(
    left: float, title: str, bars: Sequence[Bar], parts: Sequence[str], classes: str, above: Sequence[str]
) -> str:
    """A title, bars with what stands above each, and what the colours mean."""
    most = max(sum(values) for _, values in bars) or 1.0
    wide = PANEL / len(bars)
    out = [f"<text x='{left:.0f}' y='{HEAD}'>{html.escape(title)}</text>"]
    for share in (0.5, 1.0):
        y = BASE - share * (BASE - TOP - 14)
        out.append(f"<line class='g' x1='{left:.0f}' x2='{left + PANEL:.0f}' y1='{y:.1f}' y2='{y:.1f}'/>")
        out.append(f"<text x='{left - 6:.0f}' y='{y + 4:.1f}' text-anchor='end'>{share * most:.3g}</text>")
    for at, (name, values) in enumerate(bars):
        x, y = left + at * wide + 0.15 * wide, float(BASE)
        for value, kind in zip(values, classes, strict=True):
            high = value / most * (BASE - TOP - 14)
            y -= high
            out.append(f"<rect class='{kind}' x='{x:.1f}' y='{y:.1f}' width='{0.7 * wide:.1f}' height='{high:.1f}'/>")
        middle = x + 0.35 * wide
        out.append(f"<text x='{middle:.1f}' y='{y - 4:.1f}' text-anchor='middle'>{above[at]}</text>")
        out.append(f"<text x='{middle:.1f}' y='{BASE + 16}' text-anchor='middle'>{html.escape(name)}</text>")
    across = float(left)
    for part, kind in zip(parts, classes, strict=True):
        out.append(f"<rect class='{kind}' x='{across:.0f}' y='{BASE + 32}' width='10' height='10'/>")
        out.append(f"<text x='{across + 14:.0f}' y='{BASE + 41}'>{html.escape(part)}</text>")
        across += 20 + 6.4 * len(part)
    return "".join(out)
