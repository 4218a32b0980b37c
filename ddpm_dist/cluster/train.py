"""Ray Train adapter: starts one training process per worker, and again after a failure that may pass.

Ray restarts, places and watches the workers; the state they resume from is ours (the room `state`), so
nothing is ever reported to Ray Train. The internals touched are the two policies that `TorchTrainer` hands to
its controller, and what Ray knows of nodes that are about to be taken away
(tests/cluster/test_train.py holds what we assume of them).
"""

import os
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from ddpm_dist.cluster.connect import connect_ray
from ddpm_dist.config import Config
from ddpm_dist.engine import use_interface_of
from ddpm_dist.errors import (
    ClusterError,
    DdpmDistError,
    HangError,
    LoaderProcessError,
    PreemptedError,
    ShortReadError,
    UnreachableError,
)
from ddpm_dist.recipe import dump_config

MAY_PASS = (HangError, LoaderProcessError, UnreachableError, ShortReadError)
"""Errors of ours that another attempt may not meet; all other errors of ours stop the run."""

RESIZE_CHECK_S = 10.0
"""How often an elastic run looks for more room."""


def train_on_ray(cfg: Config, worker: Callable[[dict[str, Any]], None], newest_state: Callable[[], int | None]) -> None:
    """Runs `worker({"config": YAML})` in each worker process until it returns in all of them.

    newest_state: step of the newest published training state; an elastic run grows only after a new one.
    Raises ClusterError if the resources don't come, and the worker's own DdpmDistError if it stopped the run.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    connect_ray()
    await_resources(cfg.worker_range[0], _resources(cfg), cfg.cluster.wait_seconds)
    with tempfile.TemporaryDirectory(prefix="ddpm-ray-train-") as folder:
        try:
            _trainer(cfg, worker, newest_state, folder).fit()
        except TrainingFailedError as error:
            raise (_own_error(error) or ClusterError(f"the training failed: {_brief(error)}")) from error


def _trainer(
    cfg: Config, worker: Callable[[dict[str, Any]], None], newest_state: Callable[[], int | None], folder: str
) -> "_Trainer":
    low, high = cfg.worker_range
    return _Trainer(
        worker,
        elastic=_Elastic(admissible_sizes(cfg), newest_state) if low < high else None,
        train_loop_config={"config": dump_config(cfg)},
        torch_config=_TorchSetup(backend="nccl" if cfg.cluster.gpus_per_worker else "gloo"),
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
            worker_runtime_env={"env_vars": _worker_environment(cfg)},
        ),
    )


def preemption_announced() -> bool:
    """Whether Ray has told this worker that a node of the run is about to be taken away.

    Ray's own `get_preemption_info` is a barrier of all workers; the loop has a cheaper way to agree.
    """
    return get_internal_train_context().preemption_context.preemption_info is not None


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


class _Trainer(TorchTrainer):
    """TorchTrainer with policies of ours for failures and sizes."""

    def __init__(self, worker: Callable[[dict[str, Any]], None], elastic: _Elastic | None, **arguments: Any) -> None:
        super().__init__(worker, **arguments)
        self._policies: dict[str, Any] = {"failure_policy": _StopOnWrong(arguments["run_config"].failure_config)}
        if elastic is not None:
            self._policies["scaling_policy"] = _AdmissibleSizes(arguments["scaling_config"], elastic)

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return super()._initialize_and_run_controller(**{**arguments, **self._policies})


class _InterfaceFirst(_TorchBackend):
    """Joins the process group over the interface of each node's own address, as `init_world` would."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


class _TorchSetup(TorchConfig):
    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _InterfaceFirst


def _choose_interface() -> None:
    use_interface_of(ray.util.get_node_ip_address())


class _StopOnWrong(DefaultFailurePolicy):
    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        own = _own_error(training_failed_error)
        if isinstance(own, PreemptedError):  # nobody's failure: it doesn't count
            return FailureDecision.RETRY
        if own is not None and not isinstance(own, MAY_PASS):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


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


def _brief(error: TrainingFailedError) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _resources(cfg: Config) -> dict[str, float]:
    each: dict[str, float] = {"CPU": cfg.cluster.cpus_per_worker}
    if cfg.cluster.gpus_per_worker:
        each["GPU"] = cfg.cluster.gpus_per_worker
    return each


def _worker_environment(cfg: Config) -> dict[str, str]:
    """Settings that must stand before torch is imported; never a secret, since a job's details show them."""
    environment = {"OMP_NUM_THREADS": str(cfg.threads), "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    if not cfg.cluster.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
