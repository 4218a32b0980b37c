"""Devices to plan for: what each can, and whether that was measured here or stands in a data sheet."""

from dataclasses import dataclass
from types import MappingProxyType

from ddpm_dist.errors import ConfigError

GB, TFLOPS = 1e9, 1e12


@dataclass(frozen=True)
class Card:
    """One device, as a rank has it."""

    name: str
    memory: float
    """Bytes."""
    peak: MappingProxyType[str, float]
    """FLOP/s in dense products by precision: fp32, tf32 (cluster.tf32), bf16, fp16."""
    share: float
    """Of the peak that training this family of networks reaches, convolutions and all."""
    link: float
    """Bytes/s in each direction from GPU to GPU within a node."""
    per_node: int
    """Devices of a usual node."""
    source: str
    """Of memory, peak and link."""
    share_source: str


MEASURED = 'measured here: NOTES.md, "The network, on a processor with fast bf16"'
MLPERF = "published: 26 % on 8 H100 (MLPerf 4.0, Stable Diffusion 2); not measured by us"
MOSAIC = "published: 24 % on A100 (MosaicML, Stable Diffusion 2); not measured by us"
ASSUMED = "assumed, as of A100"
SHEET = "data sheet"


def _card(name: str, gib: float, fp32: float, tf32: float, half: float, link: float, share: float, said: str) -> Card:
    """tf32: 0 for a card that has neither TF32 nor bf16."""
    peaks = {"fp32": fp32 * TFLOPS, "fp16": half * TFLOPS}
    if tf32:
        peaks |= {"tf32": tf32 * TFLOPS, "bf16": half * TFLOPS}
    return Card(name, gib * 2**30, MappingProxyType(peaks), share, link * GB, 8, SHEET, said)


CARDS: dict[str, Card] = {
    "v100": _card("V100 SXM2 32 GB", 32, 15.7, 0, 125, 150, 0.24, ASSUMED),
    "a100-40": _card("A100 SXM4 40 GB", 40, 19.5, 156, 312, 300, 0.24, MOSAIC),
    "a100": _card("A100 SXM4 80 GB", 80, 19.5, 156, 312, 300, 0.24, MOSAIC),
    "l40s": _card("L40S 48 GB (PCIe)", 48, 91.6, 183, 362, 32, 0.24, ASSUMED),
    "rtx4090": _card("RTX 4090 24 GB (PCIe)", 24, 82.6, 82.6, 165, 32, 0.24, ASSUMED),
    "h100": _card("H100 SXM5 80 GB", 80, 67, 494, 989, 450, 0.26, MLPERF),
    "h200": _card("H200 SXM 141 GB", 141, 67, 494, 989, 450, 0.26, MLPERF),
    "b200": _card("B200 SXM 180 GB", 180, 80, 1125, 2250, 900, 0.26, ASSUMED),
    "cpu-zen4": Card(
        "AMD Zen 4, 2 cores (AVX512_BF16)", 24 * 2**30, MappingProxyType({"bf16": 0.423 * TFLOPS}),
        0.805, 5 * GB, 1, MEASURED, MEASURED,
    ),
}  # fmt: skip
"""By the name that --card takes. A share of fp32's peak on a GPU is the same assumption."""


def peak_of(card: Card, precision: str) -> float:
    """FLOP/s of a card in a precision; ConfigError where it has none, or where we don't know it."""
    if precision not in card.peak:
        known = " or ".join(name for name in card.peak if name != "tf32")
        raise ConfigError(f"--card: {card.name}: no peak is known in {precision}; set precision={known}")
    return card.peak[precision]


def card_named(name: str) -> Card:
    """A card of the table; ConfigError with the names for another."""
    if name not in CARDS:
        raise ConfigError(f"--card {name}: known are {', '.join(CARDS)}")
    return CARDS[name]
