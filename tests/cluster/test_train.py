"""What we assume of Ray Train's two policies, and what ours decide with them."""

import asyncio
from collections.abc import Callable, Container
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from ddpm_dist.cluster import train as ray_train
from ddpm_dist.cluster.agreement import Agreement
from ddpm_dist.errors import (
    DdpmDistError,
    HangError,
    LoaderProcessError,
    NonFiniteError,
    PreemptedError,
    UnreachableError,
)
from ddpm_dist.recipe import parse_config

RECIPE = """
run: {url: memory://run}
data: {url: memory://data, image_size: 8, channels: 1}
model: {channels: 32, channel_mult: [1], attention_resolutions: []}
train: {steps: 10, global_batch: 96}
"""


def failure(*errors: BaseException) -> WorkerGroupError:
    """As Ray reports the failures of a group: ours wrapped, those of a dead process as they are."""
    wrapped = {
        rank: UserExceptionWithTraceback(e, "trace") if isinstance(e, DdpmDistError) else e
        for rank, e in enumerate(errors)
    }
    return WorkerGroupError("failed", wrapped)  # type: ignore[arg-type]


def stop_on_wrong(max_failures: int) -> ray_train._StopOnWrong:
    """The policy with an agreement of its own process."""
    agreement = Agreement(max_failures)

    def ray_failed() -> SimpleNamespace:
        answer: Future[bool] = Future()
        agreement._attempt.number += 1  # a group that began, and was lost
        answer.set_result(asyncio.run(agreement.ray_failed()))
        return SimpleNamespace(future=lambda: answer)

    actor = SimpleNamespace(ray_failed=SimpleNamespace(remote=ray_failed))
    return ray_train._StopOnWrong(FailureConfig(max_failures=max_failures), actor)


@pytest.mark.parametrize(
    ("errors", "decision"),
    [
        ([RuntimeError("the process died")], FailureDecision.RETRY),
        ([UnreachableError("the bucket is away"), RuntimeError("a peer left")], FailureDecision.RETRY),
        ([HangError("no step")], FailureDecision.RETRY),
        ([LoaderProcessError("killed")], FailureDecision.RETRY),
        ([RuntimeError("a peer left"), NonFiniteError("20 steps")], FailureDecision.RAISE),
    ],
)
def test_only_errors_that_come_again_stop_a_run(errors: list[BaseException], decision: FailureDecision) -> None:
    policy = stop_on_wrong(1)
    assert policy.make_decision(failure(*errors)) is decision


def test_failures_are_counted() -> None:
    policy = stop_on_wrong(1)
    assert policy.make_decision(failure(RuntimeError("1"))) is FailureDecision.RETRY
    assert policy.make_decision(failure(RuntimeError("2"))) is FailureDecision.RAISE


def test_admissible_sizes_divide_the_global_batch() -> None:
    assert ray_train.admissible_sizes(parse_config(RECIPE, ["cluster.workers=[2,8]"])) == [2, 3, 4, 6, 8]


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ray_train._AdmissibleSizes]:
    """Our policy over Ray's, with nodes and published states as the test says; time runs without waiting."""

    def make(cpus: list[int], states: list[int | None], dead: Container[int] = ()) -> ray_train._AdmissibleSizes:
        nodes = {str(i) for i in range(len(cpus)) if i not in dead}
        monkeypatch.setattr(ray_train, "lasting_nodes", lambda: nodes)
        monkeypatch.setattr(ElasticScalingPolicy, "_maybe_send_resource_request", lambda self: None)
        monkeypatch.setattr(
            ElasticScalingPolicy,
            "_get_reserved_resources",
            lambda self: {str(i): {"CPU": float(n)} for i, n in enumerate(cpus)},
        )
        scaling = ScalingConfig(
            num_workers=(2, 8), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=0
        )
        elastic = ray_train._Elastic([2, 3, 4, 6, 8], lambda: states.pop(0))
        return ray_train._AdmissibleSizes(scaling, elastic)

    return make


@pytest.mark.parametrize(("cpus", "size"), [([8], 8), ([7], 6), ([3, 2], 4), ([2], 2), ([16, 16], 8)])
def test_a_start_takes_the_largest_admissible_size(policy: Callable[..., object], cpus: list[int], size: int) -> None:
    decision = policy(cpus, []).make_decision_for_non_running_worker_group()  # type: ignore[attr-defined]
    assert isinstance(decision, ResizeDecision)
    assert decision.num_workers == size


def test_a_lost_node_gives_no_room(policy: Callable[..., ray_train._AdmissibleSizes]) -> None:
    """Though Ray's coordinator still counts it."""
    decision = policy([4, 4], [], dead={1}).make_decision_for_non_running_worker_group()
    assert decision.num_workers == 4


def test_too_little_room_waits(policy: Callable[..., ray_train._AdmissibleSizes]) -> None:
    assert isinstance(policy([1], []).make_decision_for_non_running_worker_group(), NoopDecision)


def test_growth_waits_for_a_new_state(policy: Callable[..., ray_train._AdmissibleSizes]) -> None:
    ours = policy([8], [100, 100, 200])
    running = SimpleNamespace(num_workers=2, start_time=float("-inf"))
    decisions = [ours.make_decision_for_running_worker_group(running, None) for _ in range(3)]
    assert [type(d) for d in decisions] == [NoopDecision, NoopDecision, ResizeDecision]
    assert decisions[-1].num_workers == 8


def test_running_workers_are_not_ended_to_have_fewer(policy: Callable[..., ray_train._AdmissibleSizes]) -> None:
    """Those of a node that is to be taken away save a state first, and leave by themselves."""
    running = SimpleNamespace(num_workers=4, start_time=float("-inf"))
    ours = policy([2, 2], [], dead=[1])
    assert isinstance(ours.make_decision_for_running_worker_group(running, None), NoopDecision)


def test_a_preemption_is_not_counted_as_a_failure() -> None:
    policy = stop_on_wrong(0)
    assert policy.make_decision(failure(PreemptedError("step 7 is saved"))) is FailureDecision.RETRY


def test_the_same_size_is_no_decision(policy: Callable[..., ray_train._AdmissibleSizes]) -> None:
    running = SimpleNamespace(num_workers=4, start_time=float("-inf"))
    assert isinstance(policy([5], []).make_decision_for_running_worker_group(running, None), NoopDecision)
