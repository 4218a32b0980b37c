"""What a training state holds of a rank: the tensors of its engine and averages, and how to read them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ddpm_dist import storage
from ddpm_dist.engine import Piece
from ddpm_dist.state import format as fmt, reader


class Trained(Protocol):
    """What a state needs of an engine."""

    shapes: dict[str, torch.Size]

    def pieces(self) -> list[Piece]: ...
    def scalars(self) -> dict[str, Any]: ...
    def load_scalars(self, scalars: dict[str, Any]) -> None: ...
    def sync_weights(self) -> None: ...
    def fingerprint(self) -> dict[str, Any]: ...


class Averaged(Protocol):
    """What a state needs of the moving averages."""

    @property
    def averages(self) -> Mapping[str, Sequence[Tensor]]: ...


def tensors_of(pieces: Sequence[Piece], averages: Averaged) -> dict[str, Sequence[Tensor]]:
    """All that a state holds of this rank: kind -> 1-D tensors aligned with the pieces."""
    return {
        fmt.WEIGHTS: [piece.weights for piece in pieces],
        "exp_avg": [piece.exp_avg for piece in pieces],
        "exp_avg_sq": [piece.exp_avg_sq for piece in pieces],
        **averages.averages,
    }


def shapes_of(engine: Trained) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in engine.shapes.items()}


def read_state(url: str, manifest: fmt.Manifest, engine: Trained, averages: Averaged) -> int:
    """Fills this rank's pieces and averages from the state at a URL, whose manifest this is; bytes read.

    Raises DamagedStateError, or StateError if it is of another network.
    """
    targets = []
    for i, piece in enumerate(engine.pieces()):
        tensors = {fmt.WEIGHTS: piece.weights, "exp_avg": piece.exp_avg, "exp_avg_sq": piece.exp_avg_sq}
        tensors |= {label: average[i] for label, average in averages.averages.items()}
        targets += [reader.Target(kind, piece.name, piece.offset, tensor) for kind, tensor in tensors.items()]
    kinds = [fmt.WEIGHTS, "exp_avg", "exp_avg_sq", *averages.averages]
    reader.check_fits(manifest, engine.shapes, kinds, storage.redact(url))
    return reader.read_into(url, manifest, targets)
