"""The step, the averages and the loop, and what a run's folder holds beside its states.

Everything that happens between a batch and a snapshot, the same under each launcher. The room never starts a cluster,
and never samples more than the grid of a snapshot.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.training.branch import resolve as resolve
    from ddpm_dist.training.ema import power_label as power_label
    from ddpm_dist.training.entry import (
        deepspeed_worker as deepspeed_worker,
        finished as finished,
        ray_worker as ray_worker,
        report_end as report_end,
    )
    from ddpm_dist.training.events import (
        EVENTS as EVENTS,
        EventLog as EventLog,
        Events as Events,
        read_events as read_events,
    )
    from ddpm_dist.training.flops import training_flops_per_image as training_flops_per_image
    from ddpm_dist.training.posthoc import Profile as Profile, coefficients as coefficients, distance as distance
    from ddpm_dist.training.step import BatchPlan as BatchPlan

__all__, _asked = lazily(
    __name__,
    modules="run_folder",
    branch="resolve",
    entry="deepspeed_worker finished ray_worker report_end",
    ema="power_label",
    events="EVENTS EventLog Events read_events",
    flops="training_flops_per_image",
    step="BatchPlan",
    posthoc="Profile coefficients distance",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
