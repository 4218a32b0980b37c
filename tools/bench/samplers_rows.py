"""What tools/bench/samplers.py draws and prints: ways to sample, rows of the table, and their curves."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddpm_dist.config import SamplingConfig

STOCHASTIC = ("ddpm", "dpmpp_2m_sde")
LIMIT_STEPS = 100
"""Of Heun's method, for the limit of the deterministic samplers."""
NEAR = 1.05
FEW = 50
"""Evaluations up to which nearness is worth a remark."""
METRICS = ("frechet_lite0", "frechet_pixel")


@dataclass(frozen=True)
class Draw:
    """One way to sample."""

    sampler: str
    spacing: str
    steps: int | None
    clip: str = "static"
    seed: int = 0

    @property
    def settings(self) -> SamplingConfig:
        given = {"sampler": self.sampler, "spacing": self.spacing, "steps": self.steps, "clip": self.clip}
        return SamplingConfig.model_validate(given)

    @property
    def key(self) -> str:
        return f"{self.sampler}-{self.spacing}-{self.steps or 'all'}-{self.clip}-seed{self.seed}"

    @property
    def limit(self) -> "Draw":
        """What more and more steps of this sampler lead to."""
        if self.sampler in STOCHASTIC:
            return replace(self, sampler="ddpm", spacing="uniform", steps=None)
        return replace(self, sampler="heun", spacing="log_snr", steps=LIMIT_STEPS)


def steps_for(sampler: str, evaluations: int) -> int:
    """Steps that take at most so many evaluations: Heun's steps take two, but one the last."""
    return (evaluations + 1) // 2 if sampler == "heun" else evaluations


@dataclass(frozen=True)
class Row:
    """One line of the table: medians over seeds, ratios taken seed by seed."""

    draw: Draw
    evaluations: int
    distances: dict[str, float]
    ratios: dict[str, float]

    def line(self) -> str:
        cells = [f"{self.distances[m]:9.4f} {self.ratios[m]:6.3f}" for m in METRICS]
        near = "  within 5 %" if self.evaluations <= FEW and max(self.ratios.values()) <= NEAR else ""
        return f"{self.draw.sampler:13s}{self.draw.spacing:10s}{self.evaluations:5d}  {'   '.join(cells)}{near}"


def first_within(rows: Sequence[Row]) -> dict[str, int | None]:
    """By sampler and spacing: the evaluations from which on all distances stay within 5 % of the limit, or None."""
    return {name: _last_near(curve) for name, curve in curves(rows).items()}


def _last_near(curve: Sequence[Row]) -> int | None:
    near = itertools.takewhile(lambda row: max(row.ratios.values()) <= NEAR, reversed(curve))
    return min((row.evaluations for row in near), default=None)


def curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by "sampler/spacing", evaluations rising."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.evaluations):
        found.setdefault(f"{row.draw.sampler}/{row.draw.spacing}", []).append(row)
    return found
