"""Sums over features that merge in any order: what every distance is computed from.

A worker fills one `Summary` per task from the shards that it was given; the driver merges them. Nothing here
depends on which worker saw which image: a half is chosen, and a feature is kept, by a counter-based number
of the image itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpm_dist import rng

KEPT = 10_000
"""Features kept of a set, for the metrics that compare single images and for floors."""
_HALVES_SEED, _KEPT_SEED = 1, 2


@dataclass
class Moments:
    """Count, sum and sum of outer products of feature vectors, in float64."""

    count: int
    total: Tensor
    """[D] float64."""
    outer: Tensor
    """[D, D] float64."""

    @classmethod
    def empty(cls, dim: int) -> "Moments":
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Of all rows of [N, D], any float dtype."""
        moments = cls.empty(features.shape[1])
        moments.add(features)
        return moments

    def add(self, features: Tensor) -> None:
        x = features.detach().cpu().double()
        self.count += len(x)
        self.total += x.sum(0)
        self.outer.addmm_(x.T, x)

    def merge(self, other: "Moments") -> None:
        self.count += other.count
        self.total += other.total
        self.outer += other.outer

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: "Moments") -> "Moments":
        """Of the vectors without those of a part."""
        return Moments(self.count - other.count, self.total - other.total, self.outer - other.outer)

    @property
    def mean(self) -> Tensor:
        """[D] float64."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """[D, D] float64, unbiased (divided by N - 1)."""
        mean = self.mean
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


@dataclass
class Kept:
    """A uniform sample, without replacement, of at most `limit` feature vectors: those with the smallest priority.

    The priority of an image is a number drawn for its index, so the sample of a union is a function of the
    samples of its parts, in any order (bottom-k sampling).
    """

    limit: int
    priorities: Tensor
    """[K] float64, ascending."""
    features: Tensor
    """[K, D] float32."""

    @classmethod
    def empty(cls, limit: int, dim: int) -> "Kept":
        return cls(limit, torch.empty(0, dtype=torch.float64), torch.empty(0, dim))

    def add(self, features: Tensor, indices: Tensor) -> None:
        """features: [N, D]; indices: [N] int64, one for each image of the set."""
        self._take(rng.uniform(_KEPT_SEED, 0, indices), features.detach().cpu().float())

    def merge(self, other: "Kept") -> None:
        self._take(other.priorities, other.features)

    def _take(self, priorities: Tensor, features: Tensor) -> None:
        priorities = torch.cat((self.priorities, priorities))
        order = torch.argsort(priorities, stable=True)[: self.limit]
        self.priorities, self.features = priorities[order], torch.cat((self.features, features))[order]


@dataclass
class ScoreSums:
    """Sums for the Inception Score, in `splits` parts that an image belongs to by its index."""

    counts: Tensor
    """[S] float64."""
    probabilities: Tensor
    """[S, classes] float64: sums of p(y|x)."""
    neg_entropies: Tensor
    """[S] float64: sums of Σ_y p(y|x) log p(y|x)."""

    @classmethod
    def empty(cls, splits: int, classes: int) -> "ScoreSums":
        zeros = torch.zeros
        return cls(
            zeros(splits, dtype=torch.float64),
            zeros(splits, classes, dtype=torch.float64),
            zeros(splits, dtype=torch.float64),
        )

    def add(self, logits: Tensor, indices: Tensor) -> None:
        """logits: [N, classes]; indices: [N] int64."""
        log_p = torch.log_softmax(logits.detach().cpu().double(), dim=1)
        split = indices % len(self.counts)
        self.counts.index_add_(0, split, torch.ones(len(split), dtype=torch.float64))
        self.probabilities.index_add_(0, split, log_p.exp())
        self.neg_entropies.index_add_(0, split, (log_p.exp() * log_p).sum(1))

    def merge(self, other: "ScoreSums") -> None:
        self.counts += other.counts
        self.probabilities += other.probabilities
        self.neg_entropies += other.neg_entropies


@dataclass
class Summary:
    """All that the metrics want to know of one set of images under one feature network."""

    parts: tuple[Moments, ...]
    """Two disjoint halves of a reference, whose distance is its floor; all of a set of samples."""
    kept: Kept
    score: ScoreSums | None = None
    spatial: Moments | None = None
    """Of the spatial features of sFID, where the network has them."""
    floor: float | None = None
    """Fréchet distance of two disjoint parts of a reference (`apart`), once it has been computed."""

    floor_counts: tuple[int, int] | None = None
    """Images on its both sides."""

    @classmethod
    def empty(
        cls, dim: int, parts: int = 1, keep: int = 0, classes: int = 0, splits: int = 10, spatial_dim: int = 0
    ) -> "Summary":
        return cls(
            tuple(Moments.empty(dim) for _ in range(parts)),
            Kept.empty(keep, dim),
            ScoreSums.empty(splits, classes) if classes else None,
            Moments.empty(spatial_dim) if spatial_dim else None,
        )

    @property
    def moments(self) -> Moments:
        """Of the whole set."""
        whole = self.parts[0]
        for part in self.parts[1:]:
            whole = whole + part
        return whole

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    def apart(self, count: int) -> tuple[Moments, Moments]:
        """Two disjoint parts of a reference: so many images and all others, or its halves where that can't be.

        What the distance between them is for, the floor of a distance of so many samples, depends on their number.
        """
        if count > min(len(self.kept.features), self.count // 2) or count < 2:
            return self.parts[0], self.parts[1]
        chosen = Moments.of(self.kept.features[:count])
        return chosen, self.moments - chosen

    def add(self, features: Tensor, first: int, logits: Tensor | None = None, spatial: Tensor | None = None) -> None:
        """Images first, first + 1, … of the set."""
        indices = torch.arange(first, first + len(features))
        if len(self.parts) == 1:
            self.parts[0].add(features)
        else:
            in_first = in_first_half(indices)
            self.parts[0].add(features[in_first])
            self.parts[1].add(features[~in_first])
        if self.kept.limit:
            self.kept.add(features, indices)
        if self.score is not None and logits is not None:
            self.score.add(logits, indices)
        if self.spatial is not None and spatial is not None:
            self.spatial.add(spatial)

    def merge(self, other: "Summary") -> None:
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.merge(theirs)
        self.kept.merge(other.kept)
        if self.score is not None and other.score is not None:
            self.score.merge(other.score)
        if self.spatial is not None and other.spatial is not None:
            self.spatial.merge(other.spatial)


def in_first_half(indices: Tensor) -> Tensor:
    """[N] bool: which of the images [N] int64 of a set belong to its first half.

    Of each pair (2j, 2j+1) one, by a number drawn for j: both halves have the same count, and neither a sorted
    nor an alternating set leaves a trace in them.
    """
    coin = rng.uniform(_HALVES_SEED, 0, indices // 2) < 0.5
    return (indices % 2 == 0) ^ coin


def to_arrays(summary: Summary) -> dict[str, np.ndarray]:
    """Arrays for an .npz file; `from_arrays` gives the summary back."""
    arrays = {
        "counts": np.array([part.count for part in summary.parts]),
        "totals": torch.stack([part.total for part in summary.parts]).numpy(),
        "outers": torch.stack([part.outer for part in summary.parts]).numpy(),
        "kept_limit": np.array(summary.kept.limit),
        "kept_priorities": summary.kept.priorities.numpy(),
        "kept_features": summary.kept.features.numpy(),
    }
    if summary.score is not None:
        arrays |= {f"score_{name}": getattr(summary.score, name).numpy() for name in _SCORE_FIELDS}
    if summary.spatial is not None:
        arrays |= {
            "spatial_count": np.array(summary.spatial.count),
            "spatial_total": summary.spatial.total.numpy(),
            "spatial_outer": summary.spatial.outer.numpy(),
        }
    return arrays


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Summary:
    """The summary that `to_arrays` took apart."""
    tensors = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}
    sums = zip(tensors["counts"].tolist(), tensors["totals"], tensors["outers"], strict=True)
    return Summary(
        tuple(Moments(*part) for part in sums),
        Kept(int(tensors["kept_limit"]), tensors["kept_priorities"], tensors["kept_features"]),
        ScoreSums(*(tensors[f"score_{name}"] for name in _SCORE_FIELDS)) if "score_counts" in tensors else None,
        Moments(int(tensors["spatial_count"]), tensors["spatial_total"], tensors["spatial_outer"])
        if "spatial_count" in tensors
        else None,
    )


_SCORE_FIELDS = ("counts", "probabilities", "neg_entropies")
