"""Ray: connecting, the training's worker group, jobs beside a job, and a pool of actors.

The only room that imports Ray. It receives the functions that workers run, so it imports no training code, and never
touches a run's folder.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.cluster.connect import connect_ray as connect_ray
    from ddpm_dist.cluster.jobs import submit_beside as submit_beside
    from ddpm_dist.cluster.pool import ActorPool as ActorPool, Done as Done, Failed as Failed
    from ddpm_dist.cluster.train import preemption_announced as preemption_announced, train_on_ray as train_on_ray

__all__, _asked = lazily(
    __name__,
    connect="connect_ray",
    jobs="submit_beside",
    pool="ActorPool Done Failed",
    train="preemption_announced train_on_ray",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
