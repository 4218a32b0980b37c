"""The worker of a sampling job: makes the images of a unit and publishes them, the same bytes wherever it runs."""

import hashlib
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist import device as devices, snapshot, storage
from ddpm_dist.allocator import keep_freed_memory
from ddpm_dist.config import ClusterConfig, SamplingConfig
from ddpm_dist.data import EncodedSample, encode_png, encode_raw, write_shard
from ddpm_dist.diffusion import Guide, Network, Process, check_guide, check_settings, sample, trajectory
from ddpm_dist.errors import SamplingError, WorkerRefusedError
from ddpm_dist.sampling.capture import captured
from ddpm_dist.sampling.folder import Receipt
from ddpm_dist.sampling.images import to_uint8
from ddpm_dist.sampling.plan import Fingerprint, Manifest, Unit
from ddpm_dist.sampling.probing import largest_batch

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_BATCH = 128
SNAPSHOTS_KEPT = 2


@dataclass(frozen=True)
class ProbeTask:
    """Asks what this worker is, and how many images it computes at once."""

    snapshot: str
    sampling: str
    """SamplingConfig as JSON."""
    bound: int
    """Most images that the job has use for at once."""

    def __str__(self) -> str:
        return f"probe of {storage.redact(self.snapshot)}"


@dataclass(frozen=True)
class Probe:
    fingerprint: Fingerprint
    batch_size: int


@dataclass(frozen=True)
class _Loaded:
    """A snapshot's network and process."""

    unet: nn.Module
    diffusion: Process
    network: Network
    """The same, recorded where that pays, with answers in float32."""


@dataclass(frozen=True)
class UnitTask:
    """Asks for one unit of a job."""

    out: str
    manifest: str
    """Manifest as JSON."""
    unit: Unit

    def __str__(self) -> str:
        return f"images {self.unit.start}..{self.unit.stop - 1} of {storage.redact(self.out)}"


class SampleWorker:
    """Does ProbeTasks and UnitTasks. Thread-safe: one unit is computed while another one is published."""

    def __init__(self, cluster: ClusterConfig) -> None:
        """cluster: what a worker is given, and how exactly it computes."""
        self.device = devices.select(cluster.gpus_per_worker)
        devices.set_up(self.device, cluster)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.computing = threading.RLock()
        """Held by whoever computes: a process's device does one thing at a time (a recording of a CUDA graph bears
        nobody beside it)."""
        self._loaded: OrderedDict[tuple[str, str], _Loaded] = OrderedDict()
        self.loads = 0
        """Times that a snapshot was read."""

    def __call__(self, task: ProbeTask | UnitTask) -> Any:
        return self.probe(task) if isinstance(task, ProbeTask) else self.unit(task)

    def probe(self, task: ProbeTask) -> Probe:
        """What fixes this worker's images, and the order's batch size, or the largest that its memory allows."""
        settings = SamplingConfig.model_validate_json(task.sampling)
        with self.computing:
            loaded = self._load(task.snapshot, settings.precision)
            check_settings(settings, loaded.diffusion)
            info = snapshot.load_info(task.snapshot)
            guide = self.guide(settings)
            if guide is not None:
                check_guide(guide, loaded.diffusion, info["num_classes"])
            batch_size = settings.batch_size or self._largest_batch(loaded, info, settings, task.bound, guide)
        return Probe(self.fingerprint(), batch_size)

    def unit(self, task: UnitTask) -> Receipt:
        """Publishes the unit's shard and then its receipt."""
        manifest = Manifest.model_validate_json(task.manifest)
        self._refuse_unless_alike(manifest.fingerprint)
        with self.computing:
            images, labels = self.images(manifest, task.unit)
        written = write_shard(task.out, task.unit.shard, _encode(manifest, task.unit, images, labels))
        receipt = Receipt(written, tuple(_digest(image) for image in images))
        storage.publish(storage.join(task.out, task.unit.receipt), receipt.dump())
        return receipt

    def images(self, manifest: Manifest, unit: Unit) -> tuple[Tensor, Tensor | None]:
        """uint8 [N, C, H, W] and labels [N] int64 or None of a unit's images."""
        network, diffusion = self.network(manifest.snapshot, manifest.sampling.precision)
        rule = manifest.label_rule
        parts = []
        for indices in unit.batches(manifest.batch_size):
            x = sample(
                network,
                diffusion,
                manifest.sampling,
                seed=manifest.seed,
                indices=indices,
                shape=manifest.shape,
                labels=rule(indices, manifest.seed),
                null_label=manifest.num_classes,
                device=self.device,
                guide=self.guide(manifest.sampling),
            )
            if not x.isfinite().all():
                raise SamplingError(
                    f"images {int(indices[0])}..{int(indices[-1])} are not finite; is the snapshot of a run that "
                    f"diverged, or sampling.precision: {manifest.sampling.precision} too small for it?"
                )
            parts.append(to_uint8(x).cpu())
        count = unit.stop - unit.start
        return torch.cat(parts)[:count], rule(torch.arange(unit.start, unit.stop), manifest.seed)

    def fingerprint(self) -> Fingerprint:
        """What this worker's images depend on beside the job's settings."""
        return Fingerprint(
            device=device_kind(self.device),
            threads=torch.get_num_threads(),
            torch=str(torch.__version__),
            numerics=devices.fingerprint(self.device) or None,
        )

    def _refuse_unless_alike(self, wanted: Fingerprint) -> None:
        here = self.fingerprint()
        if not here.alike(wanted):
            raise WorkerRefusedError(f"it would make other images: this job is fixed to {wanted}, it has {here}")

    def network(self, url: str, precision: str, differentiable: bool = False) -> tuple[Network, Process]:
        """Network and process of a snapshot, kept for the next unit; computes in the precision, answers in float32.

        differentiable: as to its input, which a recording isn't.
        """
        loaded = self._load(url, precision)
        return _in_float32(loaded.unet) if differentiable else loaded.network, loaded.diffusion

    def guide(self, settings: SamplingConfig) -> Guide | None:
        """The worse network of sampling.guide, kept as the snapshot's own is."""
        if settings.guide is None:
            return None
        network, diffusion = self.network(settings.guide, settings.precision)
        return Guide(network, diffusion, snapshot.load_info(settings.guide)["num_classes"])

    def _load(self, url: str, precision: str) -> _Loaded:
        key = (url, precision)
        if key not in self._loaded:
            while len(self._loaded) >= SNAPSHOTS_KEPT:
                self._loaded.popitem(last=False)
            devices.let_go(self.device)
            unet, diffusion = snapshot.load_snapshot(url)
            unet = unet.to(self.device, DTYPES[precision]).eval().requires_grad_(False)
            self._loaded[key] = _Loaded(unet, diffusion, _in_float32(captured(unet, self.device)))
            self.loads += 1
            log.info("loaded %s (%d. load of this worker)", storage.redact(url), self.loads)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def _largest_batch(
        self, loaded: _Loaded, info: dict[str, Any], settings: SamplingConfig, bound: int, guide: Guide | None
    ) -> int:
        """The largest batch whose first step, made as `images` makes it, leaves enough of the memory free."""
        kinds = [settings]
        if settings.guidance_interval is not None:  # both kinds of step, of which a chain's first is only one
            kinds = [
                settings.model_copy(update={"guidance_interval": None}),
                settings.model_copy(update={"guidance_scale": 1.0, "guide": None}),
            ]

        def attempt(batch: int) -> None:
            # Recordings of its own, which go with it: those of other sizes would keep their memory.
            network = _in_float32(captured(loaded.unet, self.device))
            labels = None if info["num_classes"] is None else torch.zeros(batch, dtype=torch.int64)
            for kind in kinds:
                steps = trajectory(
                    network,
                    loaded.diffusion,
                    kind,
                    seed=0,
                    indices=torch.arange(batch),
                    shape=(info["channels"], info["image_size"], info["image_size"]),
                    labels=labels,
                    null_label=info["num_classes"],
                    device=self.device,
                    guide=guide,
                )
                next(steps)

        return largest_batch(attempt, min(MAX_BATCH, bound, settings.unit_size), self.device)


def _in_float32(call: Network) -> Network:
    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return call(x, t, labels).float()

    return network


def device_kind(device: torch.device) -> str:
    """`cpu AVX512 bf16`, `cuda NVIDIA A100-SXM4-80GB`: what decides which kernels run."""
    if device.type == "cuda":
        return f"cuda {devices.name(device)}"
    extensions = {"bf16": torch.cpu._is_avx512_bf16_supported, "amx": torch.cpu._is_amx_tile_supported}
    return " ".join(
        ["cpu", torch.backends.cpu.get_cpu_capability(), *(n for n, there in extensions.items() if there())]
    )


def _encode(manifest: Manifest, unit: Unit, images: Tensor, labels: Tensor | None) -> list[EncodedSample]:
    raw = manifest.sampling.format == "raw"
    encode = encode_raw if raw else encode_png
    samples = []
    for offset, image in enumerate(images.permute(0, 2, 3, 1).contiguous().numpy()):
        label = None if labels is None else int(labels[offset])
        samples.append(EncodedSample(f"{unit.start + offset:09d}", encode(image), "npy" if raw else "png", label))
    return samples


def _digest(image: Tensor) -> str:
    return hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=8).hexdigest()
