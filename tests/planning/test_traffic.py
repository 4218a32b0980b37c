"""What the ranks send one another in a step, and how long that takes."""

import pytest

from ddpm_dist.planning.cards import CARDS
from ddpm_dist.planning.traffic import Traffic, seconds, traffic_of


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
