"""A process on each node of a Ray cluster, for a look around that takes no resources and leaves nothing."""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddpm_dist.cluster.connect import connect_ray
from ddpm_dist.cluster.places import NodePlace, distinct
from ddpm_dist.errors import ClusterError, last_line

PATIENCE_S = 120.0
"""For a node to start a process, import, and do what it is asked."""


class _Visitor:
    """The actor."""

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return function(*arguments)


class Nodes:
    """An actor on each node that is alive; to be used as a context. Raises ClusterError if no Ray answers."""

    def __init__(self) -> None:
        connect_ray()
        nodes = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: (n["NodeManagerHostname"], n["NodeID"]))
        self.places = _places(nodes)
        visitor: Any = ray.remote(_Visitor)
        self._actors: list[Any] = [
            visitor.options(
                num_cpus=0, num_gpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote()
            for node in nodes
        ]

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def call(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """function(*arguments[i]) on node i, on all at once: what it returned, or the exception that kept it from it.

        function: importable on the nodes. Whoever doesn't answer within PATIENCE_S gives a ClusterError.
        """
        asked = [actor.run.remote(function, given) for actor, given in zip(self._actors, arguments, strict=True)]
        deadline = time.monotonic() + PATIENCE_S
        return [self._answer(reference, deadline) for reference in asked]

    def _answer(self, reference: Any, deadline: float) -> Any:
        try:
            return ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError:
            return ClusterError(f"no answer within {PATIENCE_S:.0f} s")
        except RayTaskError as error:
            return error.cause or error
        except RayError as error:
            return ClusterError(last_line(error))

    def total(self) -> dict[str, float]:
        """Resources of the cluster, such as {"CPU": 8.0}."""
        return {str(name): float(amount) for name, amount in ray.cluster_resources().items()}


def _places(nodes: Sequence[dict[str, Any]]) -> list[NodePlace]:
    names = distinct([str(node["NodeManagerHostname"]) for node in nodes])
    return [
        NodePlace(
            name, str(node["NodeManagerAddress"]), node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)
        )
        for name, node in zip(names, nodes, strict=True)
    ]
