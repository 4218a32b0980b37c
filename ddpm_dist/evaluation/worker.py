"""The worker of an evaluation: sums of features over a part of a set, bits/dim of a part, nearest neighbours.

It does a sampling job's tasks as well, so that one pool serves both.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_dist import rng, snapshot, storage
from ddpm_dist.config import ClusterConfig
from ddpm_dist.data import iterate, load_index, share_of
from ddpm_dist.diffusion import GaussianDiffusion, Network, Process, bits_per_dim, log_likelihood
from ddpm_dist.errors import EvaluationError
from ddpm_dist.evaluation.distances import nearest
from ddpm_dist.evaluation.features import FeatureNetwork, Output, open_network
from ddpm_dist.evaluation.moments import Summary
from ddpm_dist.sampling import SampleWorker

BLOCK = 256
"""Images in memory at once."""
LIKELIHOOD_BATCH = 64


@dataclass(frozen=True)
class SetPart:
    """Part k of n equal ones of a data set, at the size that is compared."""

    url: str
    part: tuple[int, int]
    image_size: int
    channels: int
    at: str | None = None
    """Folder of the set's index, if it isn't with the shards."""

    def __str__(self) -> str:
        return f"part {self.part[0] + 1} of {self.part[1]} of {self.url}"


@dataclass(frozen=True)
class SummaryTask:
    """Asks for {network: Summary} of a part."""

    images: SetPart
    networks: tuple[str, ...]
    """As `open_network` reads them."""
    halves: bool
    """Whether the set is a reference, summed in two halves."""
    keep: int
    """Features to keep of each network."""
    limit: int
    """Images of the whole set to use, from its start."""

    def __str__(self) -> str:
        return f"features of {self.images}"


@dataclass(frozen=True)
class LikelihoodTask:
    """Asks for the sums of bits/dim of a part: (images, total, prior, decoder)."""

    images: SetPart
    snapshot: str
    seed: int
    limit: int

    def __str__(self) -> str:
        return f"bits/dim of {self.images}"


@dataclass(frozen=True)
class NearestTask:
    """Asks for the images of a part nearest to some queries in one network's features."""

    images: SetPart
    network: str
    queries: NDArray[np.float32] = field(compare=False)
    """[Q, D] features."""

    def __str__(self) -> str:
        return f"nearest images in {self.images}"


class EvaluationWorker:
    """Does the tasks above, and those of a SampleWorker."""

    def __init__(self, cluster: ClusterConfig) -> None:
        """cluster: what a worker is given, and how exactly it computes."""
        self._sampler = SampleWorker(cluster)
        self._device = self._sampler.device
        self._networks: dict[tuple[Any, ...], FeatureNetwork] = {}
        self._computing = self._sampler.computing

    def __call__(self, task: Any) -> Any:
        if isinstance(task, SummaryTask):
            return self.summarise(task)
        if isinstance(task, LikelihoodTask):
            return self.likelihood(task)
        if isinstance(task, NearestTask):
            return self.find_nearest(task)
        return self._sampler(task)

    def summarise(self, task: SummaryTask) -> dict[str, Summary]:
        networks = {spec: self._network(spec, task.images) for spec in task.networks}
        summaries = {
            spec: Summary.empty(
                network.dim,
                parts=2 if task.halves else 1,
                keep=task.keep,
                classes=network.classes,
                spatial_dim=network.spatial_dim,
            )
            for spec, network in networks.items()
        }
        for first, images, _ in _blocks(task.images, BLOCK, task.limit):
            for spec, network in networks.items():
                with self._computing:
                    output = network(images)
                _check_finite(output, network.name, task.images, first)
                summaries[spec].add(output.features, first, output.logits, output.spatial)
        return summaries

    def likelihood(self, task: LikelihoodTask) -> tuple[int, float, float, float]:
        """(images, sums of bits/dim: all, the prior's, the decoder's): the bound of Ho et al. 2020, equation 5.

        The decoder's part, L_0, is what section 4.3 calls distortion; the rest is the rate. Of a continuous process it
        is the probability-flow ODE's likelihood instead, in all; its parts are nan.
        """
        by_ode = not snapshot.diffusion_in(task.snapshot).discrete
        with self._computing:
            network, diffusion = self._sampler.network(task.snapshot, "fp32", differentiable=by_ode)
        info = snapshot.load_info(task.snapshot)
        count, total, prior, decoder = 0, 0.0, 0.0, 0.0
        for first, images, labels in _blocks(task.images, LIKELIHOOD_BATCH, task.limit):
            x_start = (images.to(self._device).float() / 127.5) - 1
            indices = torch.arange(first, first + len(images), device=self._device)
            classes = self._classes(labels, len(images), task, info)
            count += len(images)
            with self._computing:
                if not isinstance(diffusion, GaussianDiffusion):
                    whole = _ode_bits(network, diffusion, x_start, task.seed, indices, classes)
                    sums = [float(whole.sum()), math.nan, math.nan]
                else:
                    bits = bits_per_dim(network, diffusion, x_start, seed=task.seed, indices=indices, labels=classes)
                    sums = [float(values.sum()) for values in (bits.total, bits.prior, bits.terms[:, 0])]
            total, prior, decoder = total + sums[0], prior + sums[1], decoder + sums[2]
        return count, total, prior, decoder

    def _classes(self, labels: Tensor | None, count: int, task: LikelihoodTask, info: dict[str, Any]) -> Tensor | None:
        """The classes that a network is asked with: the images' own, the null class for images without."""
        classes, url = info["num_classes"], storage.redact(task.images.url)
        if classes is None:
            return None
        if labels is None:
            if info["null_label"] is None:
                raise EvaluationError(f"bits_per_dim: {url} has no labels, and the network has no null class")
            return torch.full((count,), info["null_label"], device=self._device)
        if int(labels.max()) >= classes:
            raise EvaluationError(f"bits_per_dim: {url} has class {int(labels.max())}, the network 0..{classes - 1}")
        return labels.to(self._device)

    def find_nearest(self, task: NearestTask) -> tuple[Tensor, Tensor, Tensor]:
        """Distances [Q], indices in the set [Q] and images [Q, C, H, W] of the nearest of this part."""
        network = self._network(task.network, task.images)
        queries = torch.from_numpy(task.queries.copy())
        best = torch.full((len(queries),), math.inf, dtype=torch.float64)
        rows = torch.zeros(len(queries), dtype=torch.long)
        shape = (task.images.channels, task.images.image_size, task.images.image_size)
        pictures = torch.zeros(len(queries), *shape, dtype=torch.uint8)
        for first, images, _ in _blocks(task.images, BLOCK, 2**62):
            with self._computing:
                output = network(images)
            _check_finite(output, network.name, task.images, first)
            features = output.features
            distances, found = nearest(queries, features, 1)
            closer = distances[:, 0] < best
            best[closer], rows[closer] = distances[closer, 0], first + found[closer, 0]
            pictures[closer] = images[found[closer, 0]]
        return best, rows, pictures

    def _network(self, spec: str, images: SetPart) -> FeatureNetwork:
        shape = (images.channels, images.image_size, images.image_size)
        key = (spec, shape if spec == "pixel" else None)
        with self._computing:
            if key not in self._networks:
                self._networks[key] = open_network(spec, shape, self._device)
        return self._networks[key]


def _ode_bits(
    network: Network, diffusion: Process, x_start: Tensor, seed: int, indices: Tensor, labels: Tensor | None
) -> Tensor:
    """Bits/dim [B] of pixels: of their values with a grey level's uniform noise (Theis et al. 2016, section 3.1)."""
    noise = rng.uniform(seed, rng.Purpose.LIKELIHOOD, indices, x_start.shape[1:], rng.MAX_STEP) - 0.5
    nats = log_likelihood(network, diffusion, x_start + noise / 127.5, seed=seed, indices=indices, labels=labels)
    return math.log2(127.5) - nats / (x_start[0].numel() * math.log(2))


def _check_finite(output: Output, name: str, images: SetPart, first: int) -> None:
    """EvaluationError naming the first image whose features are no numbers: sums and distances would hide them."""
    for values in (output.features, output.logits, output.spatial):
        if values is not None and not values.isfinite().all():
            row = int((~values.isfinite()).any(1).nonzero()[0])
            raise EvaluationError(
                f"{storage.redact(images.url)}: the features of image {first + row} are not finite in {name}; are its "
                "weights whole?"
            )


def _blocks(images: SetPart, size: int, limit: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(index of the first, uint8 [n, C, H, W], labels [n] or None) of a part, in order, no image beyond `limit`."""
    first, _ = share_of(*images.part, load_index(images.url, at=images.at).num_samples)
    samples = iterate(images.url, images.part, images.image_size, images.channels, images.at)
    samples = itertools.islice(samples, max(0, limit - first))
    while block := list(itertools.islice(samples, size)):
        labels = [sample.label for sample in block]
        pixels = torch.from_numpy(np.stack([sample.image for sample in block]))
        yield first, pixels, None if None in labels else torch.tensor(labels)
        first += len(block)
