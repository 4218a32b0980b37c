"""What a run says of itself: time by phase, goodput over all attempts, means over the ranks, memory."""

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ddpm_dist.diffusion import QUARTILES
from ddpm_dist.training.control import Shared

PHASES = ("data", "forward", "backward", "step", "ema", "checkpoint", "snapshot", "other")
UNSETTLED_SPANS = 256


class PhaseClock:
    """Seconds by phase since the last `take`; phases don't nest.

    They are the host's, but on CUDA, which computes behind the host's back, those of its stream.
    """

    def __init__(self, on_cuda: bool = False) -> None:
        self._on_cuda = on_cuda
        self._spans: list[tuple[str, Any, Any]] = []
        """(phase, its start, its end), not yet in `_seconds`."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self._spans.append((name, start, self._now()))
            if len(self._spans) > UNSETTLED_SPANS:
                self._settle()

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self) -> None:
        for name, start, end in self._spans:
            if self._on_cuda:
                end.synchronize()
                self._seconds[name] += start.elapsed_time(end) / 1000
            else:
                self._seconds[name] += end - start
        self._spans.clear()

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last `take`; `other` is what no phase covers."""
        self._settle()
        seconds = dict(self._seconds)
        seconds["other"] = max(0.0, time.perf_counter() - self._since - sum(seconds.values()))
        return seconds

    def take(self) -> dict[str, float]:
        """As `read`, and begins anew."""
        seconds = self.read()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._since = time.perf_counter()
        return seconds


@dataclass
class Goodput:
    """Where the wall time of a run went, over all its attempts, in seconds. Saved in the training state."""

    began_at: float = field(default_factory=time.time)
    """Unix time at which the run's first attempt began."""
    productive_s: float = 0.0
    data_wait_s: float = 0.0
    checkpoint_s: float = 0.0
    snapshot_s: float = 0.0
    lost_s: float = 0.0
    """Steps that were done and then lost, because no state held them; with all of the attempts that saved nothing."""
    restart_s: float = 0.0
    """From the end of an attempt to the first step of the next."""
    restarts: int = 0
    """Attempts after the first."""

    def add(self, phases: Mapping[str, float]) -> None:
        self.data_wait_s += phases["data"]
        self.checkpoint_s += phases["checkpoint"]
        self.snapshot_s += phases["snapshot"]
        self.productive_s += sum(phases[name] for name in ("forward", "backward", "step", "ema", "other"))

    def plus(self, phases: Mapping[str, float]) -> "Goodput":
        """A copy with these phases added: what a state remembers between two log lines."""
        copy = replace(self)
        copy.add(phases)
        return copy

    def resume(self, saved_at: float, last_sign_at: float | None, restarts: int) -> None:
        """Accounts for the gap between the state's time and now.

        saved_at: when the state was taken, or when the run began, where there is none. last_sign_at: of the attempt
        that ended.
        """
        ended_at = max(saved_at, last_sign_at or saved_at)
        self.lost_s += ended_at - saved_at
        self.restart_s += max(0.0, time.time() - ended_at)
        self.restarts = restarts

    def shares(self) -> dict[str, float]:
        """Each share of the wall time since the run began; `goodput` is the productive one."""
        wall_s = max(time.time() - self.began_at, 1e-9)
        spent = {name.removesuffix("_s"): value for name, value in asdict(self).items() if name.endswith("_s")}
        shares = {name: value / wall_s for name, value in spent.items()}
        return {"goodput": shares.pop("productive"), **shares}


class Window:
    """Means over the steps since the last log line, from what all ranks told one another."""

    def __init__(self, step: int, bad_samples: int = 0) -> None:
        """bad_samples: of the attempts before."""
        self._step = step
        self._heard: list[Shared] = []
        self._bad_before = self.bad_samples = bad_samples

    def add(self, shared: Shared) -> None:
        self._heard.append(shared)
        self.bad_samples = self._bad_before + int(shared.bad_samples)

    def take(self, step: int) -> tuple[int, dict[str, float]]:
        """(steps since the last call, means by tag); what is heard one step late counts in the next window."""
        heard, steps = self._heard, step - self._step
        self._heard, self._step = [], step
        means: dict[str, float] = {}
        if heard:
            means["loss/mean"] = sum(h.loss_sum for h in heard) / sum(h.images for h in heard)
        for q in range(QUARTILES):
            images = sum(h.quartile_images[q] for h in heard)
            if images:
                means[f"loss/t_quartile_{q + 1}"] = sum(h.quartile_loss_sum[q] for h in heard) / images
        return steps, means


def memory_gib(device: torch.device) -> dict[str, float]:
    """Peak memory of this rank's process and, on CUDA, of its device, in GiB."""
    peak = {"memory/host_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        peak["memory/device_GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    return peak
