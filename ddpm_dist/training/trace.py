"""A torch profiler trace of some steps of rank 0, for chrome://tracing or ui.perfetto.dev."""

import gzip
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.engine import World
from ddpm_dist.temporary import TemporaryFolder

log = logging.getLogger(__name__)


class StepTrace:
    """Records the steps first..last (from 0, inclusive) of logging.profile_steps, and publishes one file."""

    def __init__(self, cfg: Config, world: World, check_owner: Callable[[], None]) -> None:
        """check_owner: raises if this attempt may publish nothing more."""
        self._check_owner = check_owner
        self._steps = cfg.logging.profile_steps if world.is_first else None
        self._on_cuda = world.device.type == "cuda"
        self._folder = storage.join(cfg.run.url, "profiles")
        self._profile: profile | None = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """What happens inside belongs to this step."""
        if self._steps is not None and step == self._steps[0]:
            activities = [ProfilerActivity.CPU]
            if self._on_cuda:
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        yield
        if self._profile is not None and self._steps is not None and step == self._steps[1]:
            finished, self._profile = self._profile, None
            finished.stop()
            self._publish(finished, *self._steps)

    def _publish(self, finished: profile, first: int, last: int) -> None:
        url = storage.join(self._folder, f"steps-{first}-{last}.json.gz")
        with TemporaryFolder("trace") as folder:
            path = folder / "trace.json"
            finished.export_chrome_trace(str(path))
            self._check_owner()
            storage.publish(url, gzip.compress(path.read_bytes()))
        log.info("trace of steps %d to %d: %s", first, last, url)
