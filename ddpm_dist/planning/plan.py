"""A run on some GPUs from its first image to its last: step, states, failures, days; and what it would be otherwise."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ddpm_dist.config import Config
from ddpm_dist.planning.checkpoint import Saving, best_interval, daly, goodput, saving, state_bytes, young
from ddpm_dist.planning.failures import hours_between_failures, values
from ddpm_dist.planning.network import Counted, count
from ddpm_dist.planning.simulation import Scenario
from ddpm_dist.planning.step import Setting, StepPlan, step_on

EFFICIENT = 0.8
"""Below this, fewer GPUs or a larger batch are looked for."""
FACTORS = (1 / 4, 1 / 2, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """A recipe on a number of GPUs."""

    counted: Counted
    step: StepPlan
    images: int
    """That the recipe trains on."""
    state_bytes: float
    cost: Saving
    read_s: float
    mtbf_s: float
    restart_s: float
    """After an average failure."""
    interval_s: float
    """Of the recipe's checkpoint.every_steps."""
    best_s: float
    """The best one."""

    @property
    def young_s(self) -> float:
        """The best interval to first order, by the stall alone."""
        return young(self.cost.stall_s, self.mtbf_s)

    @property
    def daly_s(self) -> float:
        """The best interval to higher order, by the stall alone."""
        return daly(self.cost.stall_s, self.mtbf_s)

    @property
    def goodput(self) -> float:
        """At the recipe's interval."""
        return goodput(self.interval_s, self.cost, self.restart_s, self.mtbf_s)

    @property
    def best_goodput(self) -> float:
        """At the best interval."""
        return goodput(self.best_s, self.cost, self.restart_s, self.mtbf_s)

    @property
    def best_steps(self) -> int:
        """The best interval as checkpoint.every_steps."""
        return max(1, round(self.best_s / self.step.seconds))

    @property
    def days(self) -> float:
        """To the recipe's last image, failures included."""
        share = self.goodput
        return self.images / self.step.images_per_s / share / 86400 if share else float("inf")

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs together."""
        return self.days * 24 * self.step.setting.gpus


@dataclass(frozen=True)
class Otherwise:
    """The same recipe, or one with another batch, and why one would."""

    what: str
    plan: Plan


def plan_of(
    cfg: Config,
    setting: Setting,
    store: float,
    mtbf_hours: float | None = None,
    counted: Counted | None = None,
    stage: int | None = None,
    batch: int | None = None,
    changed: Mapping[str, float] | None = None,
) -> Plan:
    """The plan of a recipe. store: bytes/s of a node to and from the store. mtbf_hours: of the whole run; by default
    that of published clusters. stage, batch: instead of the recipe's, at the same number of images. changed: constants
    of failures and restarts.
    """
    constants = values(**(changed or {}))
    counted = counted or count(cfg)
    step = step_on(cfg, counted, setting, stage, batch)
    averages, images = 1 + len(cfg.ema.power), cfg.train.steps * cfg.train.global_batch
    size = state_bytes(counted.parameters, averages)
    cost = saving(counted.parameters, averages, setting.gpus, setting.nodes, store, step.seconds, constants["per_part"])
    mtbf_s = 3600 * (mtbf_hours or hours_between_failures(setting.gpus))
    read_s = size / setting.nodes / store
    scenario = Scenario(
        setting.gpus, setting.nodes, step.batch.share * setting.gpus, 1.0, cost, read_s, mtbf_s, constants
    )
    share = constants["process_share"]
    restart = share * scenario.restart_s(False) + (1 - share) * scenario.restart_s(True)
    interval = cfg.checkpoint.every_steps * step.seconds
    best = best_interval(cost, mtbf_s, step.seconds)
    return Plan(counted, step, images, size, cost, read_s, mtbf_s, restart, interval, best)


def scenario_of(plan: Plan, interval_s: float, changed: dict[str, float]) -> Scenario:
    """What `simulate` runs, with the constants that are `changed`."""
    setting = plan.step.setting
    batch = plan.step.batch.share * setting.gpus
    return Scenario(
        setting.gpus, setting.nodes, batch, interval_s, plan.cost, plan.read_s, plan.mtbf_s, values(**changed)
    )


def otherwise(cfg: Config, plan: Plan, again: Callable[..., Plan]) -> list[Otherwise]:
    """Fewer and more GPUs, larger batches and other stages that fit, each with why one would.

    again: `plan_of` for another (setting, stage, batch, precision).
    """
    setting, batch = plan.step.setting, cfg.train.global_batch
    per_node = max(1, setting.gpus // setting.nodes)
    found = []
    for factor in FACTORS:
        gpus = int(setting.gpus * factor)
        if gpus >= 1 and batch % gpus == 0:
            nodes = max(1, -(-gpus // per_node))
            other = again(replace(setting, gpus=gpus, nodes=nodes), None, None)
            found.append(Otherwise(f"{gpus} GPUs", other))
    for factor in (2, 4, 8):
        found.append(Otherwise(f"batch {batch * factor} (another run)", again(setting, None, batch * factor)))
    for stage in (1, 2, 3):
        if stage != plan.step.stage:
            found.append(Otherwise(f"zero.stage={stage}", again(setting, stage, None)))
    if cfg.precision == "fp32" and "bf16" in setting.card.peak and setting.images_per_s is None:
        found.append(Otherwise("precision=bf16 (another run)", again(setting, cfg.zero.stage or 1, None, "bf16")))
    return [one for one in found if one.plan.step.fits]


def advice(plan: Plan, others: list[Otherwise]) -> str:
    """One sentence: what we would do."""
    step = plan.step
    if not step.fits:
        stages = [one for one in others if one.what.startswith("zero")]
        what = f"set {stages[0].what}" if stages else "lower train.max_micro_batch, or set model.checkpoint_levels=[0]"
        return f"it doesn't fit: a rank needs {step.memory.total / 2**30:.1f} GiB; {what}"
    if step.efficiency < EFFICIENT:
        fewer = [o for o in others if o.what.endswith("GPUs") and o.plan.step.setting.gpus < step.setting.gpus]
        better = [o for o in fewer if o.plan.step.efficiency >= EFFICIENT] or fewer[:1]
        if better:
            most = max(better, key=lambda o: o.plan.step.setting.gpus)
            return (
                f"{most.what} would take {most.plan.days:.2g} days instead of {plan.days:.2g}, and "
                f"{most.plan.gpu_hours:,.0f} GPU-hours instead of {plan.gpu_hours:,.0f}: with {step.batch.share} "
                f"images a GPU computes for {step.efficiency:.0%} of a step (a larger batch is another run)"
            )
    if plan.best_goodput - plan.goodput > 0.01:
        return (
            f"checkpoint.every_steps={plan.best_steps}: goodput {plan.best_goodput:.1%} instead of {plan.goodput:.1%}"
        )
    faster = [o for o in others if o.what.startswith("precision") and o.plan.days < plan.days / 2]
    if faster:
        return f"as it is, or with {faster[0].what}: {faster[0].plan.days:.2g} days instead of {plan.days:.2g}"
    return "as it is"
