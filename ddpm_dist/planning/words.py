"""A plan in words, as JSON, and the table of what it would be otherwise."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ddpm_dist.planning.failures import CONSTANTS
from ddpm_dist.planning.memory import memory_of
from ddpm_dist.planning.plan import Otherwise, Plan
from ddpm_dist.planning.simulation import Outcome
from ddpm_dist.planning.step import LAUNCH_S
from ddpm_dist.planning.traffic import LATENCY_S

GIB, GB = 2**30, 1e9
MICRO_BATCHES = (1, 8, 32, 128)


def as_text(name: str, plan: Plan, others: Sequence[Otherwise], advised: str) -> str:
    """What a person wants to know of a run before it starts."""
    step, setting = plan.step, plan.step.setting
    card, counted, batch = setting.card, plan.counted, plan.step.batch
    lines = [
        f"{name} on {setting.gpus} × {card.name} in {setting.nodes} node{'s' if setting.nodes > 1 else ''}",
        "",
        f"network        {counted.parameters:,} parameters, {counted.training_flops / 1e9:,.1f} GFLOP an image, both "
        "ways (counted)",
        f"batch          {batch.share * setting.gpus} images: {batch.share} a GPU, in {batch.accumulation} × "
        f"{batch.micro_batch}",
        f"memory         {step.memory.total / GIB:.2f} GiB of {card.memory / GIB:.0f}: between steps "
        f"{step.memory.between_steps / GIB:.2f}, gradients {step.memory.gradients / GIB:.2f}, activations "
        f"{step.memory.activations / GIB:.2f}, the device's own {step.memory.overhead / GIB:.2f}",
        f"traffic        {step.traffic.sent(setting.gpus) / 1e6:,.1f} MB from each GPU a step, in "
        f"{step.traffic.collectives} collectives",
        f"step           {1000 * step.seconds:,.1f} ms: arithmetic {1000 * step.compute_s:,.1f}, or starting kernels "
        f"{1000 * step.launch_s:,.1f} where that is longer, and communication {1000 * step.communication_s:,.1f}",
        f"rate           {step.images_per_s:,.0f} images/s, {step.images_per_s / setting.gpus:,.0f} a GPU; efficiency "
        f"{step.efficiency:.1%}",
        f"state          {plan.state_bytes / 1e6:,.0f} MB; a save stops it for {1000 * plan.cost.stall_s:.1f} ms, "
        f"and is published {plan.cost.background_s:.1f} s later",
        f"failures       one in {plan.mtbf_s / 3600:,.1f} h; {plan.restart_s:.0f} s to the next step, on average",
        f"saves          each {_time(plan.interval_s)} by the recipe: goodput {plan.goodput:.2%}; best each "
        f"{_time(plan.best_s)} (checkpoint.every_steps={plan.best_steps}; Young {_time(plan.young_s)}, Daly "
        f"{_time(plan.daly_s)}): {plan.best_goodput:.2%}",
        f"the whole run  {plan.images:,} images: {plan.days:,.2f} days, {plan.gpu_hours:,.0f} GPU-hours",
        "",
        *_memory_table(plan),
        "",
        *_otherwise_table(plan, others),
        "",
        f"we would: {advised}",
        "",
        *_sources(plan),
    ]
    return "\n".join(lines)


def _memory_table(plan: Plan) -> list[str]:
    """GiB of a GPU by stage and micro-batch."""
    step = plan.step
    rows = [f"{'GiB of a GPU':<15}" + "".join(f"{f'{m} images':>12}" for m in MICRO_BATCHES)]
    for stage in (0, 1, 2, 3):
        if stage == 0 and step.precision != "fp32":
            continue
        each = [memory_of(plan.counted, stage, step.precision, step.setting.gpus, m).total / GIB for m in MICRO_BATCHES]
        rows.append(f"{f'ZeRO-{stage}':<15}" + "".join(f"{value:>12.2f}" for value in each))
    return rows


def _otherwise_table(plan: Plan, others: Sequence[Otherwise]) -> list[str]:
    head = (
        f"{'otherwise':<28}{'ms a step':>12}{'images/s':>12}{'efficiency':>12}{'days':>10}{'GPU-hours':>12}{'GiB':>8}"
    )
    rows = [head]
    for what, one in [("as it is", plan), *((other.what, other.plan) for other in others)]:
        step = one.step
        rows.append(
            f"{what:<28}{1000 * step.seconds:>12.1f}{step.images_per_s:>12,.0f}{step.efficiency:>12.1%}"
            f"{one.days:>10.2f}{one.gpu_hours:>12,.0f}{step.memory.total / GIB:>8.1f}"
        )
    return rows


def _sources(plan: Plan) -> list[str]:
    card = plan.step.setting.card
    rate = (
        "images/s of one GPU: given"
        if plan.step.setting.images_per_s
        else f"share of the peak: {card.share:.0%}, {card.share_source}"
    )
    return [
        "rests on:",
        f"  card: {card.source}; {rate}",
        f"  {1e6 * LAUNCH_S:.0f} µs to start a kernel, {1e6 * LATENCY_S:.0f} µs a hop between nodes, rings at the full "
        "rate of the slower link: assumed",
        "  activations: what autograd keeps, counted, and a tenth more: assumed",
        *(f"  {name} {c.value:g} {c.unit}".rstrip() + f": {c.meaning} ({c.source})" for name, c in CONSTANTS.items()),
    ]


def as_dict(name: str, plan: Plan, others: Sequence[Otherwise], advised: str) -> dict[str, Any]:
    """The plan for programs: plain numbers in bytes, seconds, images and FLOPs."""
    return {
        "recipe": name,
        **_numbers(plan),
        "otherwise": [{"what": other.what, **_numbers(other.plan)} for other in others],
        "advice": advised,
        "constants": {key: asdict(constant) for key, constant in CONSTANTS.items()},
    }


def _numbers(plan: Plan) -> dict[str, Any]:
    step, setting = plan.step, plan.step.setting
    return {
        "gpus": setting.gpus, "nodes": setting.nodes, "card": setting.card.name, "zero_stage": step.stage,
        "card_source": setting.card.source, "share_of_peak": setting.card.share,
        "share_source": "given" if setting.images_per_s else setting.card.share_source,
        "parameters": plan.counted.parameters, "training_flops_per_image": plan.counted.training_flops,
        "batch": asdict(step.batch), "memory_bytes": {**asdict(step.memory), "total": step.memory.total},
        "fits": step.fits, "sent_bytes_per_step": step.traffic.sent(setting.gpus),
        "collectives_per_step": step.traffic.collectives, "step_s": step.seconds, "compute_s": step.compute_s,
        "launch_s": step.launch_s, "communication_s": step.communication_s, "images_per_s": step.images_per_s,
        "efficiency": step.efficiency, "state_bytes": plan.state_bytes, "save": asdict(plan.cost),
        "mtbf_s": plan.mtbf_s, "restart_s": plan.restart_s, "interval_s": plan.interval_s, "goodput": plan.goodput,
        "young_s": plan.young_s, "daly_s": plan.daly_s, "best_interval_s": plan.best_s,
        "best_every_steps": plan.best_steps, "best_goodput": plan.best_goodput, "images": plan.images,
        "days": plan.days, "gpu_hours": plan.gpu_hours,
    }  # fmt: skip


def simulation_text(outcomes: Sequence[tuple[str, Outcome]], days: float, seed: int) -> str:
    """A table of what was simulated: the plan first, then with other failures and restarts."""
    lines = [
        f"simulated, {days:g} days, seed {seed}:",
        f"{'':<34}{'goodput':>9}{'failures':>10}{'saving':>9}{'lost':>9}{'restarts':>10}{'slower':>9}",
    ]
    for what, o in outcomes:
        lines.append(
            f"{what:<34}{o.goodput:>9.2%}{o.failures:>10}{o.saving:>9.2%}{o.lost:>9.2%}{o.restarting:>10.2%}{o.slower:>9.2%}"
        )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
