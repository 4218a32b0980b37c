"""What tools/bench/gpu.py measures, each in a process of its own: processes that do a few steps when they are asked to.

A process holds one side: a class with `step()`, made from a `Setting` and arguments. So each side has its own flags of
cuDNN and of determinism, its own memory, and a CUDA that started with them.
"""

import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Setting:
    """Where and how large everything is measured."""

    device: str
    small: bool
    """A rehearsal: a tiny network, small batches and few steps; its figures mean nothing."""
    compiles: bool
    """Whether torch.compile is there to be measured."""
    until: float
    """time.monotonic() at which a part begins nothing more."""

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def size(self) -> int:
        """Height and width of the images in pixels."""
        return 8 if self.small else 32

    def batches(self, *wanted: int) -> list[int]:
        """These numbers of images, or two small ones."""
        return list(wanted) if not self.small else [4, 8][: len(wanted)]

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.until

    def times(self, wanted: int) -> int:
        """So many repetitions, or two."""
        return wanted if not self.small else 2


class Side(Protocol):
    """Something whose steps are counted."""

    def step(self) -> None: ...


class Process:
    """A process with one side in it. Use as a context manager."""

    def __init__(self, make: Callable[..., Any], setting: Setting, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._made = 0.0
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, setting, arguments), daemon=False)
        self._process.start()
        theirs.close()
        self._pipe.send(("ready", ()))

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def ready(self) -> float:
        """Waits until the side is made and has done its first steps; the seconds that took, compiling included.

        Several that were started are made side by side.
        """
        if not self._made:
            self._made = float(self._hear())
        return self._made

    def ask(self, what: str, *arguments: Any) -> Any:
        """A method of the side, or `seconds` (of so many steps), `profiled`, `memory`. RuntimeError with its words."""
        self.ready()
        self._pipe.send((what, arguments))
        return self._hear()

    def _hear(self) -> Any:
        try:
            ended_well, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"its process ended with exit code {self._process.exitcode}") from None
        if not ended_well:
            raise RuntimeError(answer)
        return answer


class Apart:
    """Rows of a function, computed in the process that this is made in."""

    def __init__(self, setting: Setting, function: Callable[[Setting], Iterator[dict[str, Any]]]) -> None:
        self._setting, self._function = setting, function

    def step(self) -> None:
        """Nothing that repeats."""

    def rows(self) -> list[dict[str, Any]]:
        return list(self._function(self._setting))


def apart(function: Callable[[Setting], Iterator[dict[str, Any]]], setting: Setting) -> Iterator[dict[str, Any]]:
    """Its rows, from a process of its own: what it settles and holds on the device ends with it."""
    with Process(Apart, setting, function) as process:
        yield from process.ask("rows")


def alternate(processes: dict[str, Process], steps: int, rounds: int) -> dict[str, list[float]]:
    """{side: [seconds of a step, of each round]}: the sides take turns, the first changing every round."""
    found: dict[str, list[float]] = {name: [] for name in processes}
    for r in range(rounds):
        for name in sorted(processes, reverse=bool(r % 2)):
            found[name].append(processes[name].ask("seconds", steps) / steps)
    return found


def ratio(found: dict[str, list[float]], ours: str, theirs: str) -> float:
    """Median over the rounds of their time over ours: above 1 is in our favour."""
    return statistics.median(b / a for a, b in zip(found[ours], found[theirs], strict=True))


def seconds_of(action: Callable[[], Any], device: str, rounds: int, warm_up: int = 2) -> float:
    """Median seconds of a call, with the device's work."""
    found = []
    for r in range(-warm_up, rounds):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        if r >= 0:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def profiled(step: Callable[[], Any], device: str, steps: int = 3) -> dict[str, float]:
    """What the device does in a step: its kernels and copies, and the share of the time in which it does nothing."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    synchronize(device)
    with profile(activities=activities) as prof:
        for _ in range(steps):
            step()
        synchronize(device)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in prof.events() or ()
        if str(event.device_type).endswith("CUDA") and not event.is_user_annotation
    )
    if not spans:
        return {}
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return {"launches": len(spans) / steps, "idle": 1 - busy / max(until - spans[0][0], 1e-9)}


def _serve(pipe: Any, make: Callable[..., Any], setting: Setting, arguments: Sequence[Any]) -> None:
    os.environ["DS_ACCELERATOR"] = setting.device
    side: Any = None
    while True:
        try:
            what, values = pipe.recv()
        except EOFError:
            return
        try:
            if side is None:
                start = time.perf_counter()
                side = make(setting, *arguments)
                for _ in range(3):
                    side.step()
                synchronize(setting.device)
                if setting.on_cuda:
                    torch.cuda.reset_peak_memory_stats()
                made = time.perf_counter() - start
            pipe.send((True, _answer(side, setting, what, values, made)))
        except BaseException as error:
            lines = traceback.format_exc().strip().splitlines()
            pipe.send((False, f"{type(error).__name__}: {str(error).strip()[:300] or lines[-1]}"))


def _answer(side: Any, setting: Setting, what: str, values: Sequence[Any], made: float) -> Any:
    if what == "ready":
        return made
    if what == "seconds":
        synchronize(setting.device)
        start = time.perf_counter()
        for _ in range(values[0]):
            side.step()
        synchronize(setting.device)
        return time.perf_counter() - start
    if what == "profiled":
        return profiled(side.step, setting.device)
    if what == "memory":
        return torch.cuda.max_memory_allocated() if setting.on_cuda else 0
    return getattr(side, what)(*values)
