"""What a sampling job is, as pure data: its units of consecutive indices, its labels, and its manifest.

Image i is a function of (snapshot, settings, seed, i) and of the batch size, dtype, threads and kind of device
that its manifest fixes. Nothing here knows how many workers there are.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ddpm_dist import rng
from ddpm_dist.config import SamplingConfig
from ddpm_dist.errors import SamplingError

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Unit:
    """Images start … stop − 1: one shard, published whole."""

    start: int
    stop: int

    @property
    def shard(self) -> str:
        """Name of its shard."""
        return f"samples-{self.start:09d}-{self.stop:09d}.tar"

    @property
    def receipt(self) -> str:
        """Name of the small object, written after the shard, that says how large it is and its SHA-256."""
        return f"receipts/{self.start:09d}-{self.stop:09d}.json"

    def batches(self, batch_size: int) -> list[Tensor]:
        """Indices [batch_size] int64 of each batch; the last is padded with the indices that follow the unit's."""
        return [torch.arange(first, first + batch_size) for first in range(self.start, self.stop, batch_size)]


def cut(num_samples: int, unit_size: int) -> list[Unit]:
    """All units of a job, in order; the last one may be shorter."""
    starts = range(0, num_samples, unit_size)
    return [Unit(start, min(start + unit_size, num_samples)) for start in starts]


@dataclass(frozen=True)
class Labels:
    """Which class image i is of: `none`, `random`, or a list that is repeated, such as `3` or `0,1,2`."""

    spec: str
    num_classes: int | None
    """Classes without the null class; None for an unconditional network."""

    @classmethod
    def parse(cls, spec: str | None, num_classes: int | None, has_null: bool = True) -> "Labels":
        """Of the user's words; by default random classes for a conditional network. Raises SamplingError."""
        if num_classes is None:
            if spec not in (None, "none"):
                raise SamplingError(f"--labels {spec}: this snapshot's network is unconditional; leave --labels out")
            return cls("none", None)
        spec = spec or "random"
        if spec == "none" and not has_null:
            raise SamplingError("--labels none: this snapshot's network has no null class; leave --labels out")
        if spec == "all":
            spec = ",".join(map(str, range(num_classes)))
        if spec not in ("none", "random"):
            _parse_list(spec, num_classes)
        return cls(spec, num_classes)

    def __call__(self, indices: Tensor, seed: int) -> Tensor | None:
        """[B] int64 classes of these images (the null class for `none`); None for an unconditional network."""
        if self.num_classes is None:
            return None
        if self.spec == "none":
            return torch.full_like(indices, self.num_classes)
        if self.spec == "random":
            return rng.integers(seed, rng.Purpose.LABEL, indices, self.num_classes)
        listed = torch.tensor(_parse_list(self.spec, self.num_classes))
        return listed[indices % len(listed)]


def _parse_list(spec: str, num_classes: int) -> list[int]:
    try:
        listed = [int(part) for part in spec.split(",")]
    except ValueError:
        raise SamplingError(f"--labels {spec}: expected random, none, all, or classes such as 3 or 0,1,2") from None
    for label in listed:
        if not 0 <= label < num_classes:
            raise SamplingError(f"--labels {spec}: {label} is not among the classes 0..{num_classes - 1}")
    return listed


class Fingerprint(BaseModel):
    """What the bytes of an image depend on beside settings and indices; all workers of a job share one."""

    model_config = ConfigDict(frozen=True)

    device: str
    """Kind of device, such as `cpu AVX512` or `cuda NVIDIA A100-SXM4-80GB`."""
    threads: int
    torch: str
    numerics: dict[str, Any] | None = Field(default=None, exclude_if=lambda value: value is None)
    """On a GPU: CUDA, cuDNN, and how exactly it computes. Manifests of version 0.1.0 lack it."""

    def alike(self, stored: "Fingerprint") -> bool:
        """Whether a worker with this fingerprint makes the images of a job with the stored one, as far as that says."""
        return self == stored or (stored.numerics is None and self.model_copy(update={"numerics": None}) == stored)


class Manifest(BaseModel):
    """A sampling job, as it stands in its folder."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    format: int = FORMAT
    snapshot: str
    """Where it was read; the id below says what it is."""
    snapshot_id: str
    step: int | None
    images_seen: int | None
    kind: str | None
    """ema or raw; None for a snapshot that doesn't tell."""
    image_size: int
    channels: int
    num_classes: int | None
    seed: int
    num_samples: int
    labels: str
    sampling: SamplingConfig
    """With the batch size that was found."""
    guide_id: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """What sampling.guide is, where there is one."""
    fingerprint: Fingerprint
    versions: dict[str, str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.image_size, self.image_size

    @property
    def units(self) -> list[Unit]:
        """The job's shards, in the order of their indices."""
        return cut(self.num_samples, self.sampling.unit_size)

    @property
    def batch_size(self) -> int:
        """Images in one forward pass, which a manifest always settles."""
        assert self.sampling.batch_size is not None
        return self.sampling.batch_size

    @property
    def label_rule(self) -> Labels:
        """Which class image i has."""
        return Labels(self.labels, self.num_classes)

    def dump(self) -> bytes:
        """JSON; the same manifest gives the same bytes."""
        return (json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n").encode()

    def differences(self, other: "Manifest") -> list[str]:
        """What makes the images of two jobs differ, as `key: mine -> other's`; empty if index i is the same image."""
        free = {"snapshot", "num_samples", "versions"}
        mine, theirs = self.model_dump(mode="json", exclude=free), other.model_dump(mode="json", exclude=free)
        return _compare(mine, theirs, "")


def _compare(mine: dict[str, Any], theirs: dict[str, Any], prefix: str) -> list[str]:
    found = []
    for key, value in mine.items():
        if isinstance(value, dict):
            found += _compare(value, theirs[key], f"{prefix}{key}.")
        elif value != theirs.get(key):
            found.append(f"{prefix}{key}: {value} -> {theirs.get(key)}")
    return found


def settle(stored: Manifest | None, wanted: Manifest, out: str) -> Manifest:
    """The manifest to go on with: the stored one, grown to as many images as are wanted. Raises SamplingError."""
    if stored is None:
        return wanted
    differences = stored.differences(wanted)
    if differences:
        raise SamplingError(
            f"--out {out} holds another job's samples:\n  " + "\n  ".join(differences) + "\nUse another --out."
        )
    if wanted.num_samples < stored.num_samples:
        raise SamplingError(
            f"--num-samples {wanted.num_samples}: {out} belongs to a job of {stored.num_samples} samples; ask for at "
            "least as many, or use another --out"
        )
    unit_size = stored.sampling.unit_size
    if wanted.num_samples > stored.num_samples and stored.num_samples % unit_size:
        raise SamplingError(
            f"--num-samples {wanted.num_samples}: {out} holds a job of {stored.num_samples}, whose last unit is "
            f"shorter than sampling.unit_size: {unit_size}, so it can't grow; use another --out"
        )
    return stored.model_copy(update={"num_samples": wanted.num_samples})
