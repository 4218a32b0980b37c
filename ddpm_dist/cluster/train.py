"""Ray Train adapter: places one supervisor per worker, which starts the training process and starts it again after a
failure that may pass; Ray itself restarts what it alone can: a lost supervisor, node or head.

The state that workers resume from is ours (the room `state`), so nothing is ever reported to Ray Train. The internals
touched are the two policies and the callbacks that a trainer hands to its controller, and what Ray knows of nodes that
are about to be taken away (tests/cluster/test_train.py holds what we assume of them).
"""

import base64
import json
import os
import pickle
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray._private.state import state
from ray.exceptions import RayActorError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddpm_dist.cluster.agreement import Agreement
from ddpm_dist.cluster.connect import connect_ray
from ddpm_dist.cluster.supervisor import Order, supervise, warm
from ddpm_dist.config import Config
from ddpm_dist.errors import (
    ClusterError,
    DdpmDistError,
    HangError,
    LoaderProcessError,
    PreemptedError,
    ShortReadError,
    UnreachableError,
    last_line,
)
from ddpm_dist.recipe import dump_config
from ddpm_dist.temporary import TemporaryFolder

MAY_PASS = (HangError, LoaderProcessError, UnreachableError, ShortReadError)
"""Errors of ours that another attempt may not meet; all other errors of ours stop the run."""

RESIZE_CHECK_S = 10.0
"""How often an elastic run looks for more room."""
ANSWER_S = 30.0
"""How long the agreement may take to say whether there is to be another attempt."""


def warm_nodes(cfg: Config) -> None:
    """Joins the cluster, and has each node with room for a worker start its standby; returns without waiting for them.

    To be called early: the seconds of their imports pass beside the driver's own checks.
    """
    connect_ray()
    task: Any = ray.remote(num_cpus=0, max_retries=0)(warm)
    there, each = lasting_nodes(), _resources(cfg)
    roomy = (n for n in ray.nodes() if all(n["Resources"].get(name, 0.0) >= amount for name, amount in each.items()))
    for node in sorted(there & {n["NodeID"] for n in roomy}):
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            _rank_environment(cfg), cfg.cluster.gpus_per_worker > 0
        )


def train_on_ray(cfg: Config, worker: Callable[[dict[str, Any]], None], newest_state: Callable[[], int | None]) -> None:
    """Runs `worker({"config": YAML})` in a process of its own for each worker until it returns in all of them.

    worker: can be pickled by name. newest_state: step of the newest published training state; an elastic run grows only
    after a new one. Raises ClusterError if the resources don't come, and the worker's own DdpmDistError if it stopped
    the run.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    connect_ray()
    await_resources(cfg.worker_range[0], _resources(cfg), cfg.cluster.wait_seconds)
    with TemporaryFolder("ray-train") as folder:
        try:
            _trainer(cfg, worker, newest_state, str(folder)).fit()
        except TrainingFailedError as error:
            raise (_own_error(error) or ClusterError(f"the training failed: {last_line(error)}")) from error
        except RayActorError as error:
            raise ClusterError(
                "Ray Train's controller was lost (killed, or out of memory?); the same command continues the run"
            ) from error


def _trainer(
    cfg: Config, worker: Callable[[dict[str, Any]], None], newest_state: Callable[[], int | None], folder: str
) -> "_Trainer":
    low, high = cfg.worker_range
    agreement = _agreement(cfg.cluster.max_failures)
    order = Order(
        json.dumps(
            {"worker": base64.b64encode(pickle.dumps(worker)).decode(), "arguments": {"config": dump_config(cfg)}}
        ),
        _rank_environment(cfg),
        MAY_PASS,
        cfg.cluster.gpus_per_worker > 0,
        cfg.cluster.hang_seconds,
        agreement,
        cfg.checkpoint.memory_every_steps is not None,
    )
    return _Trainer(
        partial(supervise, order),
        elastic=_Elastic(admissible_sizes(cfg), newest_state) if low < high else None,
        agreement=agreement,
        backend_config=_Devices(),
        scaling_config=ScalingConfig(
            num_workers=low if low == high else (low, high),
            use_gpu=cfg.cluster.gpus_per_worker > 0,
            resources_per_worker=_resources(cfg),
            elastic_resize_monitor_interval_s=RESIZE_CHECK_S,
        ),
        run_config=RunConfig(
            # Ray Train resumes whatever it finds under the same name; ours must not, so both are new.
            name=f"ddpm-{uuid.uuid4().hex[:8]}",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=cfg.cluster.max_failures),
        ),
    )


def _agreement(max_failures: int) -> Any:
    """The supervisors' actor, on the driver's node: where that is lost, so is the job."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote  # its overloads know neither actors nor strategies together
    actor = remote(num_cpus=0, max_concurrency=100_000, scheduling_strategy=here)(Agreement)
    return actor.remote(max_failures)


def await_resources(workers: int, each: dict[str, float], patience_s: float) -> None:
    """Waits until the cluster as a whole has room for so many workers; ClusterError if it never does."""
    needed = {name: amount * workers for name, amount in each.items()}
    deadline = time.monotonic() + patience_s
    while True:
        there = ray.cluster_resources()
        missing = {name: amount for name, amount in needed.items() if there.get(name, 0.0) < amount}
        if not missing:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{workers} workers need {_amounts(needed)}; the cluster has "
                f"{_amounts({name: there.get(name, 0.0) for name in needed})} after {patience_s:.0f} s of waiting; "
                "add nodes, lower cluster.workers or cluster.cpus_per_worker, or raise cluster.wait_seconds"
            )
        time.sleep(1.0)


def lasting_nodes() -> set[str]:
    """Ids of the nodes that the cluster's head knows to be alive now, and not about to be taken away."""
    draining = state.get_draining_nodes()
    return {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining}


def admissible_sizes(cfg: Config) -> list[int]:
    """Numbers of workers that divide the global batch, within cluster.workers (contract 1)."""
    low, high = cfg.worker_range
    return [size for size in range(low, high + 1) if cfg.train.global_batch % size == 0]


@dataclass(frozen=True)
class _Elastic:
    admissible: list[int]
    newest_state: Callable[[], int | None]


class _Trainer(DataParallelTrainer):
    """Ray's trainer with policies of ours for failures and sizes."""

    def __init__(self, work: Callable[[], None], elastic: _Elastic | None, agreement: Any, **arguments: Any) -> None:
        super().__init__(work, **arguments)
        failure = _StopOnWrong(arguments["run_config"].failure_config, agreement)
        self._policies: dict[str, Any] = {"failure_policy": failure}
        if elastic is not None:
            self._policies["scaling_policy"] = _AdmissibleSizes(arguments["scaling_config"], elastic)

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return super()._initialize_and_run_controller(**{**arguments, **self._policies})

    def _create_default_callbacks(self) -> list[Any]:
        """Ray's own, but for an actor that frees the workers' room if the controller dies and the job goes on.

        Ours doesn't: it ends with its controller, and its room with it. The actor asks the dashboard each second, and
        fills the screen with a traceback where there is none, or where another Ray is on the machine.
        """
        return [c for c in super()._create_default_callbacks() if not isinstance(c, PlacementGroupCleanerCallback)]


class _SharesDevices(Backend):
    """Each rank sees the GPUs of all ranks of its node, as NCCL wants it; the process group is the ranks' own."""

    share_cuda_visible_devices = True


class _Devices(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _SharesDevices


class _StopOnWrong(DefaultFailurePolicy):
    """What follows when a worker group has failed as a whole. agreement: counts failures, those of ranks as well."""

    def __init__(self, failure_config: FailureConfig, agreement: Any) -> None:
        super().__init__(failure_config)
        self._agreement = agreement

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        own = _own_error(training_failed_error)
        if isinstance(own, PreemptedError):  # nobody's failure: it doesn't count
            return FailureDecision.RETRY
        if own is not None and not isinstance(own, MAY_PASS):
            return FailureDecision.RAISE
        if not isinstance(training_failed_error, WorkerGroupError):
            return super().make_decision(training_failed_error)
        another = self._agreement.ray_failed.remote().future().result(ANSWER_S)
        return FailureDecision.RETRY if another else FailureDecision.RAISE


class _AdmissibleSizes(ElasticScalingPolicy):
    """Ray's elastic policy, but it takes sizes that divide the global batch only, and grows without loss.

    Growing restarts the workers, which costs the steps since the last state; so after more room is seen,
    the next state is awaited. Running workers are never ended to have fewer: those of a lost node fail, and those
    of a node that was announced to go away save a state before they leave.
    """

    def __init__(self, scaling_config: ScalingConfig, elastic: _Elastic) -> None:
        super().__init__(scaling_config)
        self._elastic = elastic
        self._state_when_room_was_seen: int | None = None
        self._room_seen = False

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        # Ray's coordinator hears of a lost node up to 20 s late; workers that it has no room for cost a minute.
        there = lasting_nodes()
        possible = super()._count_possible_workers({n: r for n, r in reserved_resources.items() if n in there})
        return max((size for size in self._elastic.admissible if size <= possible), default=0)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if not isinstance(decision, ResizeDecision):
            return decision
        if decision.num_workers <= worker_group_state.num_workers:
            return NoopDecision()
        newest = self._elastic.newest_state()
        if not self._room_seen:
            self._room_seen, self._state_when_room_was_seen = True, newest
            return NoopDecision()
        if newest == self._state_when_room_was_seen:
            return NoopDecision()
        self._room_seen = False
        return decision


def _own_error(error: TrainingFailedError) -> DdpmDistError | None:
    """The first error of ours among the workers' failures (other ranks fail as a consequence)."""
    if not isinstance(error, WorkerGroupError):
        return None
    for failure in error.worker_failures.values():
        cause = failure._base_exc if isinstance(failure, UserExceptionWithTraceback) else failure
        if isinstance(cause, DdpmDistError):
            return cause
    return None


def _resources(cfg: Config) -> dict[str, float]:
    each: dict[str, float] = {"CPU": cfg.cluster.cpus_per_worker}
    if cfg.cluster.gpus_per_worker:
        each["GPU"] = cfg.cluster.gpus_per_worker
    return each


def _rank_environment(cfg: Config) -> dict[str, str]:
    """Settings that must stand before torch is imported; never a secret, since a job's details show them."""
    environment = {"OMP_NUM_THREADS": str(cfg.threads)}
    if not cfg.cluster.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
