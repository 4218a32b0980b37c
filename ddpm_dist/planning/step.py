"""A step's time and memory for a number of GPUs, and how well it scales."""

from dataclasses import dataclass

from ddpm_dist.config import Config
from ddpm_dist.planning.cards import Card, peak_of
from ddpm_dist.planning.memory import Memory, memory_of
from ddpm_dist.planning.network import Counted
from ddpm_dist.planning.traffic import Traffic, seconds, traffic_of
from ddpm_dist.training import BatchPlan

LAUNCH_S = 5e-6
"""Of the host for one operation on a GPU; an assumption that is usual in the field."""
OPERATIONS = {0: (1495, 674), 1: (1893, 673), 2: (2231, 693), 3: (1942, 674)}
"""By stage, of the CIFAR-10 network: operations of forward and backward, and of the optimizer with noise and averages.
Counted: NOTES.md, "Operations of a training step" (the sums), the parts by the same rule."""
OPERATIONS_TENSORS = 329
"""Parameters of the CIFAR-10 network, by whose number those of another one are scaled."""


@dataclass(frozen=True)
class Setting:
    """Where a run is to compute."""

    gpus: int
    nodes: int
    card: Card
    network: float
    """Bytes/s of a node to the others, in each direction."""
    images_per_s: float | None = None
    """Measured on one GPU, with batches that fill it; else the card's share of its peak is taken."""


@dataclass(frozen=True)
class StepPlan:
    """One step of a run on some GPUs."""

    setting: Setting
    stage: int
    precision: str
    batch: BatchPlan
    memory: Memory
    traffic: Traffic
    compute_s: float
    """Arithmetic of a rank's share."""
    launch_s: float
    """The host's work to start its kernels; what is longer of both counts."""
    communication_s: float
    """Not hidden behind arithmetic: overlap_comm is off (engine/start.py)."""

    @property
    def seconds(self) -> float:
        """Of the step."""
        return max(self.compute_s, self.launch_s) + self.communication_s

    @property
    def images_per_s(self) -> float:
        """Of the whole run."""
        return self.batch.share * self.setting.gpus / self.seconds

    @property
    def efficiency(self) -> float:
        """Of a GPU, beside one that only computes."""
        return self.compute_s / self.seconds

    @property
    def fits(self) -> bool:
        """Whether a rank's memory is large enough."""
        return self.memory.total <= self.setting.card.memory


def step_on(
    cfg: Config, counted: Counted, setting: Setting, stage: int | None = None, batch: int | None = None
) -> StepPlan:
    """A step of the recipe, or of one with another ZeRO stage or global batch, which `setting.gpus` divides."""
    stage = cfg.zero.stage if stage is None else stage
    plan = BatchPlan.of(batch or cfg.train.global_batch, setting.gpus, cfg.train.max_micro_batch)
    card, on_gpu = setting.card, setting.card.per_node > 1
    peak = peak_of(card, "tf32" if cfg.precision == "fp32" and cfg.cluster.tf32 else cfg.precision) * card.share
    recomputed = 4 / 3 if cfg.model.checkpoint_levels else 1.0  # at most: a second forward pass of all levels
    each = 1 / setting.images_per_s if setting.images_per_s else recomputed * counted.training_flops / peak
    passes, rest = OPERATIONS[stage]
    launches = (plan.accumulation * passes + rest) * len(counted.numels) / OPERATIONS_TENSORS
    traffic = traffic_of(counted.numels, stage, cfg.precision, plan.accumulation)
    return StepPlan(
        setting, stage, cfg.precision, plan,
        memory_of(
            counted, stage, cfg.precision, setting.gpus, plan.micro_batch, 1 + len(cfg.ema.power),
            cfg.zero.offload_optimizer, on_gpu,
        ),
        traffic,
        compute_s=plan.share * each,
        launch_s=launches * LAUNCH_S if on_gpu else 0.0,
        communication_s=seconds(traffic, setting.gpus, setting.nodes, card, setting.network),
    )  # fmt: skip
