"""The formulas of a step's traffic, beside what DeepSpeed really sends between two ranks."""

import pytest

from ddpm_dist.planning.cards import CARDS
from ddpm_dist.planning.traffic import Traffic, seconds, traffic_of
from tests.planning.counted_ranks import counted

GATHERS = ("all_gather", "all_gather_into_tensor", "_all_gather_base")


@pytest.mark.full
@pytest.mark.parametrize(
    ("stage", "precision", "accumulation"),
    [(0, "fp32", 1), (1, "fp32", 2), (1, "bf16", 1), (1, "bf16", 2), (2, "bf16", 2), (3, "bf16", 1), (3, "bf16", 2)],
)
def test_a_step_sends_what_the_formula_says(stage: int, precision: str, accumulation: int) -> None:
    numels, sent = counted(stage, precision, accumulation)
    traffic = traffic_of(numels, stage, precision, accumulation)
    gathered = sum(sent.get(name, 0) for name in GATHERS)
    reduced = sum(sent.values()) - gathered
    assert reduced == pytest.approx(traffic.all_reduced + traffic.reduce_scattered, rel=0.02)
    assert gathered == pytest.approx(traffic.gathered, rel=0.02)


def test_a_ring_sends_what_it_has_to() -> None:
    """Patarasu and Yuan 2009: 2 (W - 1) / W of the tensor for a sum, half of it to scatter or to gather."""
    whole = Traffic(all_reduced=1000, reduce_scattered=0, gathered=0, collectives=1)
    assert [whole.sent(ranks) for ranks in (1, 2, 4)] == [0, 1000, 1500]
    assert Traffic(0, 1000, 0, 1).sent(4) == Traffic(0, 0, 1000, 1).sent(4) == 750


def test_the_slower_way_decides() -> None:
    card = CARDS["h100"]
    traffic = Traffic(all_reduced=4.5e9, reduce_scattered=0, gathered=0, collectives=0)
    assert seconds(traffic, 1, 1, card, 1e9) == 0
    assert seconds(traffic, 2, 1, card, 1e9) == pytest.approx(4.5e9 / card.link)
    assert seconds(traffic, 2, 2, card, 1e9) == pytest.approx(4.5)
    assert seconds(traffic, 16, 2, card, 50e9) == pytest.approx(2 * 4.5e9 * 15 / 16 / 50e9)
    assert seconds(Traffic(0, 0, 0, 100), 64, 8, card, 50e9) > 0
