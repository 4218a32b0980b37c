"""Moving averages of the float32 master weights, each rank on its own pieces, without communication.

Averages of any number of profiles run side by side; each costs 4 bytes per parameter, divided by the number of
ranks, and one fused pass over the weights a step. Call `update` after each step that was applied.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ddpm_dist.config import Config, EmaConfig
from ddpm_dist.engine import Engine, Piece, World, gather_full

Decay = Callable[[int, int], float]
"""(step from 0, images in a step) -> share that the old average keeps."""
MAIN = "ema"
"""Label of the average that snapshots are made of."""
EXCHANGED = 1 << 24
"""Elements of average and weights that change places at once: 64 MiB are in flight."""


class Ema:
    """Averages of the weights of `pieces`, which start as these weights.

    averages: label -> 1-D float32 tensors aligned with the pieces, as training states hold them. The label `ema`
    is the average of ema.decay or ema.halflife_Mimg; `power-0.050` has the profile of that relative width.
    """

    def __init__(self, pieces: Sequence[Piece], cfg: Config) -> None:
        self._pieces = pieces
        self._decays: dict[str, Decay] = {MAIN: _main_decay(cfg.ema)}
        for std in cfg.ema.power:
            self._decays[power_label(std)] = partial(_power_decay, power_exponent(std))
        self._weights = _runs([piece.weights for piece in pieces])
        self._runs = {label: [torch.empty_like(run) for run in self._weights] for label in self._decays}
        numels = [piece.numel for piece in pieces]
        self.averages = {label: _split(runs, numels) for label, runs in self._runs.items()}
        self.clock = 0
        """Steps that the averages had seen before this run's step 0: a branch of a state goes on with them."""
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Sets every average to the weights; for a start from other weights."""
        for runs in self._runs.values():
            torch._foreach_copy_(runs, self._weights)

    @torch.no_grad()
    def update(self, step: int, batch: int) -> None:
        """Takes the weights into every average, after this run's step `step` (from 0) of `batch` images was applied."""
        for label, decay in self._decays.items():
            torch._foreach_lerp_(self._runs[label], self._weights, 1.0 - decay(self.clock + step, batch))

    def gather(
        self, world: World, shapes: Mapping[str, torch.Size], label: str = MAIN, everywhere: bool = True
    ) -> dict[str, Tensor]:
        """The whole average by parameter name, float32 in host memory; empty but on rank 0 unless `everywhere`.

        A collective. shapes: of all parameters.
        """
        addresses = [piece.address for piece in self._pieces]
        return dict(gather_full(self.averages[label], addresses, shapes, world, everywhere))

    @contextmanager
    def computing(self, engine: Engine, label: str = MAIN) -> Iterator[None]:
        """Inside, the engine computes with this average, which needs no room for another network; a collective.

        Average and weights change places, element by element, and back: both are then what they were, bit for bit. An
        error inside leaves them exchanged: it ends the attempt, and nothing is saved of that.
        """
        self._exchange(label)
        engine.sync_weights()
        yield
        self._exchange(label)
        engine.sync_weights()

    @torch.no_grad()
    def _exchange(self, label: str) -> None:
        for run, weights in zip(self._runs[label], self._weights, strict=True):
            for average, weight in zip(run.split(EXCHANGED), weights.split(EXCHANGED), strict=True):
                kept = weight.clone()
                weight.copy_(average)
                average.copy_(kept)


def power_label(std: float) -> str:
    """Name of a power average in states and folders; widths are told by 3 decimals."""
    return f"power-{std:.3f}"


def power_exponent(std: float) -> float:
    """γ of the power function t^γ whose relative standard deviation (EDM2's σ_rel) is `std`, 0 < std < 0.28.

    Algorithm 2 of Karras et al. 2024 (arXiv 2312.02696): the real root of
    γ³ + 7γ² + (16 − σ⁻²)γ + (12 − σ⁻²) = 0.
    """
    roots = np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2])
    return float(roots.real.max())


def _main_decay(cfg: EmaConfig) -> Decay:
    if cfg.halflife_Mimg is not None:
        decay: Decay = partial(_halflife_decay, cfg.halflife_Mimg * 1e6)
    else:
        assert cfg.decay is not None, "the configuration asks for one of both"
        decay = partial(_constant_decay, cfg.decay)
    return partial(_warmed_up, decay) if cfg.warmup else decay


def _constant_decay(decay: float, step: int, batch: int) -> float:
    """Ho et al. 2020, appendix B: 0.9999 at every step."""
    return decay


def _halflife_decay(halflife_images: float, step: int, batch: int) -> float:
    """A weight counts half after `halflife_images` more images."""
    return float(0.5 ** (batch / halflife_images))


def _warmed_up(decay: Decay, step: int, batch: int) -> float:
    """min(decay, (1 + step) / (10 + step)), as TensorFlow's ExponentialMovingAverage with num_updates."""
    return min(decay(step, batch), (1 + step) / (10 + step))


def _power_decay(gamma: float, step: int, batch: int) -> float:
    """β(t) = (1 − 1/t)^(γ+1) with t from 1, equation 4 of Karras et al. 2024; 0 at the first step."""
    return float((1.0 - 1.0 / (step + 1)) ** (gamma + 1.0))


def _runs(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same elements in as few 1-D views as memory allows: neighbours in one storage become one view."""
    runs: list[Tensor] = []
    for tensor in tensors:
        last = runs[-1] if runs else None
        if (
            last is not None
            and last.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            and last.storage_offset() + last.numel() == tensor.storage_offset()
        ):
            runs[-1] = last.as_strided((last.numel() + tensor.numel(),), (1,), last.storage_offset())
        else:
            runs.append(tensor)
    return runs


def _split(runs: Sequence[Tensor], numels: Sequence[int]) -> list[Tensor]:
    """Views of consecutive elements of the runs, of the given lengths."""
    views: list[Tensor] = []
    remaining = list(numels)
    for run in runs:
        start = 0
        while start < run.numel():
            views.append(run[start : start + remaining[0]])
            start += remaining.pop(0)
    return views
