"""What TensorBoard shows of a run: its event files, written and read."""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ddpm_dist import storage
from ddpm_dist.errors import StorageError
from ddpm_dist.temporary import TemporaryFolder

log = logging.getLogger(__name__)

EVENTS = "tensorboard"
UPLOAD_S = 10.0
ROTATE_BYTES = 8 * 2**20


class EventLog:
    """TensorBoard event files of one attempt, written locally and published to the run's folder.

    A store has no append, so the current file is published again while it grows, and closed at 8 MiB.
    """

    def __init__(self, run_url: str, attempt: int, start_step: int | None, name: str = "") -> None:
        """start_step: what earlier attempts wrote from there on is void. name: of a separate curve, none: training."""
        self._url = storage.join(run_url, EVENTS, name)
        self._temporary = TemporaryFolder("events")
        self._folder = self._temporary.path
        self._attempt, self._part = attempt, 0
        self._purge_step: int | None = start_step
        self._published: dict[str, int] = {}
        self._lock = threading.Lock()
        self._writer = self._open()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tensorboard", daemon=True)
        self._thread.start()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """A point of each tag's curve."""
        with self._lock:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def image(self, tag: str, image: Tensor, step: int) -> None:
        """image: [C, H, W] uint8."""
        with self._lock:
            self._writer.add_image(tag, image, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """A text, as Markdown."""
        with self._lock:
            self._writer.add_text(tag, text, step)

    def close(self) -> None:
        """Publishes what is left and ends; StorageError where the store doesn't take it."""
        self._ended.set()
        self._thread.join()
        with self._lock:
            self._writer.close()
        self._publish(storage.PATIENCE_S)
        self._temporary.close()

    def _open(self) -> SummaryWriter:
        suffix = f".a{self._attempt}.{self._part}"
        writer = SummaryWriter(str(self._folder), purge_step=self._purge_step, filename_suffix=suffix)
        self._purge_step, self._part = None, self._part + 1
        return writer

    def _work(self) -> None:
        while not self._ended.wait(UPLOAD_S):
            with self._lock:
                self._writer.flush()
                newest = max(self._folder.iterdir(), key=lambda file: file.stat().st_mtime)
                if newest.stat().st_size > ROTATE_BYTES:
                    self._writer.close()
                    self._writer = self._open()
            try:
                self._publish(UPLOAD_S)
            except StorageError as error:
                log.warning("TensorBoard events were not published, will try again: %s", error)

    def _publish(self, patience_s: float) -> None:
        for file in sorted(self._folder.iterdir()):
            if file.stat().st_size != self._published.get(file.name):
                data = file.read_bytes()
                storage.publish(storage.join(self._url, file.name), data, patience_s)
                self._published[file.name] = len(data)


@dataclass(frozen=True)
class Events:
    """What TensorBoard shows of a run."""

    scalars: dict[str, list[tuple[int, float]]]
    """{tag: [(step, value), …]}."""
    images: dict[str, list[tuple[int, bytes]]]
    """{tag: [(step, PNG), …]}."""


def read_events(run_url: str) -> Events:
    """All curves and pictures of a run's training, later attempts over earlier ones; empty if there are none."""
    folder_url = storage.join(run_url, EVENTS)
    with TemporaryFolder("events") as folder:
        for name in storage.list_names(folder_url):
            if ".tfevents." in name:
                (folder / name).write_bytes(storage.read(storage.join(folder_url, name)))
        logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it tells of each file that it finished
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
        events.Reload()
    tags = events.Tags()
    return Events(
        {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]},
        {tag: [(event.step, event.encoded_image_string) for event in events.Images(tag)] for tag in tags["images"]},
    )


def image_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """[N, C, H, W] uint8 to one [C, rows·(H+1)−1, columns·(W+1)−1] uint8 picture with grey lines between."""
    n, c, h, w = images.shape
    columns = columns or max(1, round(n**0.5))
    rows = -(-n // columns)
    grid = torch.full((c, rows * (h + 1) - 1, columns * (w + 1) - 1), 128, dtype=torch.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        grid[:, y * (h + 1) : y * (h + 1) + h, x * (w + 1) : x * (w + 1) + w] = image
    return grid
