"""The formulas of a step's traffic, beside what DeepSpeed really sends between two ranks."""

import pytest

from ddpm_dist.planning.cards import CARDS
from ddpm_dist.planning.traffic import Traffic, seconds, traffic_of
from tests.planning.counted_ranks import Case, counted

GATHERS = ("all_gather", "all_gather_into_tensor", "_all_gather_base")


CASES: list[Case] = [
    (0, "fp32", 1), (1, "fp32", 2), (1, "bf16", 1), (1, "bf16", 2), (2, "bf16", 2), (3, "bf16", 1), (3, "bf16", 2),
]  # fmt: skip


@pytest.mark.full
def test_a_step_sends_what_the_formula_says() -> None:
    for (stage, precision, accumulation), (numels, sent) in zip(CASES, counted(CASES), strict=True):
        traffic = traffic_of(numels, stage, precision, accumulation)
        gathered = sum(sent.get(name, 0) for name in GATHERS)
        reduced = sum(sent.values()) - gathered
        case = f"ZeRO-{stage}, {precision}, {accumulation} passes"
        assert reduced == pytest.approx(traffic.all_reduced + traffic.reduce_scattered, rel=0.02), case
        assert gathered == pytest.approx(traffic.gathered, rel=0.02), case


def test_stage_3_gathers_a_large_network_twice() -> None:
    """Below 500 million elements DeepSpeed keeps the weights from the forward to the backward pass."""
    small, large = [4 * 10**7] * 10, [4 * 10**7] * 20
    assert traffic_of(small, 3, "bf16", 1).gathered == 2 * sum(small)
    assert traffic_of(large, 3, "bf16", 1).gathered == 2 * 2 * sum(large)
    assert traffic_of(large, 3, "bf16", 3).reduce_scattered == 3 * 4 * sum(large)


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
