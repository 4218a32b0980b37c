"""Ray: connecting, the training's supervisors, the standby that ranks come from, jobs beside a job, a pool of actors.

The only room that imports Ray (a rank's own side and the standby don't). It receives the functions that workers run, so
it imports no training code, and never touches a run's folder.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.cluster.connect import connect_ray as connect_ray
    from ddpm_dist.cluster.environment import METRICS_CLOSED as METRICS_CLOSED
    from ddpm_dist.cluster.jobs import submit_beside as submit_beside
    from ddpm_dist.cluster.memory import Memory as Memory
    from ddpm_dist.cluster.nodes import Nodes as Nodes
    from ddpm_dist.cluster.places import NodePlace as NodePlace, distinct as distinct
    from ddpm_dist.cluster.pool import ActorPool as ActorPool, Done as Done, Failed as Failed
    from ddpm_dist.cluster.rank import (
        lasting_memory as lasting_memory,
        preemption_announced as preemption_announced,
        restart_parts as restart_parts,
        tell as tell,
    )
    from ddpm_dist.cluster.train import train_on_ray as train_on_ray, warm_nodes as warm_nodes

__all__, _asked = lazily(
    __name__,
    connect="connect_ray",
    environment="METRICS_CLOSED",
    jobs="submit_beside",
    memory="Memory",
    nodes="Nodes",
    places="NodePlace distinct",
    pool="ActorPool Done Failed",
    rank="lasting_memory preemption_announced restart_parts tell",
    train="train_on_ray warm_nodes",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
