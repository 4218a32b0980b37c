"""`cluster:` and `logging:`, how many work on it and what is seen of them."""

from typing import Annotated

from pydantic import Field

from ddpm_dist.config.base import Count, Free, Positive, Section


class ClusterConfig(Section):
    """What Ray is asked for, and how long a failure is borne."""

    workers: Free[Positive | tuple[Positive, Positive]] = 1
    """Training processes, or [min, max] for an elastic run."""
    cpus_per_worker: Free[Annotated[float, Field(gt=0)]] = 1
    gpus_per_worker: Free[Annotated[float, Field(ge=0)]] = 0
    """0: a worker computes on the CPU, also beside GPUs; 1: on one. Sampling and evaluation take fractions, too."""
    deterministic: Free[bool] = True
    """On a GPU: the same bits each time, as a resumed run needs them, by slower kernels (docs/gpus.md)."""
    tf32: Free[bool] = False
    """On a GPU: float32 products and convolutions with 10 bits of mantissa, as torch's own default is for convolutions.
    Faster; on the CPU, and in bf16 and fp16, without effect."""
    fused_kernels: Free[bool] = True
    """On a GPU: noise and group norms by our own kernels, where Triton works; false: by torch's, which are more."""
    max_failures: Free[Annotated[int, Field(ge=-1)]] = 10
    """Attempts that may fail before the run is given up; -1: no limit."""
    wait_seconds: Free[Annotated[float, Field(gt=0)]] = 60
    """How long to wait for the resources of the smallest admissible size."""
    hang_seconds: Free[Annotated[float, Field(gt=0)]] = 300
    """Floor of the heartbeat's limit for one step. Under Ray a rank that doesn't even say that it lives is ended after
    ten times as long, and one without peers after twice as long."""


class LoggingConfig(Section):
    """What a run writes for people to look at."""

    every_steps: Free[Positive] = 50
    grid_images: Free[Count] = 16
    """Images of the EMA sample grid written to TensorBoard with each snapshot; 0: none."""
    grid_steps: Free[Positive] = 50
    """Network evaluations for such a grid, by deterministic DDIM."""
    peak_tflops: Free[Annotated[float, Field(gt=0)] | None] = None
    """Peak of one worker's device in the run's precision, in 10^12 FLOP/s, for the model FLOPs utilisation."""
    profile_steps: Free[tuple[Count, Count] | None] = None
    """First and last step of a torch profiler trace."""


def check_cluster(cluster: ClusterConfig, worker_range: tuple[int, int], batch: int) -> None:
    """Numbers of workers that divide the global batch; else ValueError."""
    low, high = worker_range
    if low > high:
        raise ValueError(f"cluster.workers: [{low}, {high}] is not [min, max]")
    if high > batch:
        raise ValueError(f"cluster.workers: {high} are more than train.global_batch: {batch} has images")
    admissible = [w for w in range(1, high + 1) if batch % w == 0]
    if low not in admissible or high not in admissible:
        raise ValueError(
            f"cluster.workers: {cluster.workers} must divide train.global_batch: {batch}; "
            f"admissible up to {high}: {admissible}"
        )
