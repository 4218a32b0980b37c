"""Contract 1 for the pure functions: what is read never depends on who reads, and costs the same everywhere."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from ddpm_dist.data.order import Order, SetOrder, share_of, split_by_weight
from ddpm_dist.data.permutation import key_of, permute
from ddpm_dist.errors import ConfigError

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda c: sum(c) >= 24)


def order_of(counts: list[int], batch: int = 24, **changes: object) -> Order:
    arguments = {"seed": 3, "global_batch": batch, "streams": 6, "shuffle_block": 8} | changes
    return Order([counts], **arguments)  # type: ignore[arg-type]


def pairs(order: Order, step: int, first: int = 0, last: int | None = None) -> list[tuple[int, int, int]]:
    found = order.at(step, first, last)
    return list(zip(found.set.tolist(), found.shard.tolist(), found.sample.tolist(), strict=True))


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_of_huge_domains_stays_inside_and_distinct() -> None:
    n = 10**15 + 37
    found = permute(np.arange(n - 5000, n), n, 9)
    assert len(set(found.tolist())) == 5000
    assert found.min() >= 0
    assert found.max() < n


@pytest.mark.parametrize("n", [4, 300])
def test_permute_has_no_preferred_places(n: int) -> None:
    """χ² of how often i goes to j, over many keys: near its (n−1)² degrees of freedom."""
    keys = 60 * n
    table = np.zeros((n, n))
    for key in range(keys):
        table[np.arange(n), permute(np.arange(n), n, key_of(key))] += 1
    expected = keys / n
    freedom = (n - 1) ** 2
    assert abs(((table - expected) ** 2 / expected).sum() - freedom) < 5 * (2 * freedom) ** 0.5


def test_all_orders_of_a_few_are_equally_likely() -> None:
    seen = collections.Counter(tuple(permute(np.arange(4), 4, key_of(key)).tolist()) for key in range(4800))
    assert len(seen) == 24
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 60  # 23 degrees of freedom


@settings(max_examples=60, deadline=None)
@given(
    counts=COUNTS,
    world=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]),
    step=st.integers(0, 200),
    streams=st.sampled_from([1, 2, 3, 6, 24]),
    block=st.integers(1, 50),
)
def test_ranks_cut_the_same_batch(counts: list[int], world: int, step: int, streams: int, block: int) -> None:
    order = order_of(counts, streams=streams, shuffle_block=block)
    shares = [pairs(order, step, *share_of(rank, world, 24)) for rank in range(world)]
    assert {len(share) for share in shares} == {24 // world}
    assert list(itertools.chain(*shares)) == pairs(order, step)


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, streams=st.integers(1, 24), block=st.integers(1, 60), epoch=st.integers(0, 3))
def test_an_epoch_sees_each_sample_at_most_once_and_drops_the_tail(
    counts: list[int], streams: int, block: int, epoch: int
) -> None:
    order = order_of(counts, streams=streams, shuffle_block=block)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    seen = [pair for step in steps for pair in pairs(order, step)]
    assert len(seen) == len(set(seen)) == sum(counts) - sum(counts) % 24
    assert all(sample < counts[shard] for _, shard, sample in seen)


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, streams=st.integers(1, 24), block=st.integers(1, 60), start=st.integers(0, 100))
def test_blocks_hold_what_places_say(counts: list[int], streams: int, block: int, start: int) -> None:
    """The two views of the order, by place and by block, agree: blocks deal exactly the samples of the places."""
    order = order_of(counts, streams=streams, shuffle_block=block)
    one = order.sets[0]
    blocks = order.blocks(0, 24, start)
    dealt: dict[tuple[int, int, int], tuple[int, int]] = {}
    while (found := next(blocks)).first_step < start + 3:
        samples = [(e.shard, e.first + i) for e in one.extents(found) for i in range(e.count)]
        for i, j in enumerate(one.deal(found).tolist()):
            dealt[found.epoch, found.stream, found.start + i] = samples[j]
    for step in range(start, start + 3):
        epoch, t = divmod(step, one.steps_per_epoch)
        by_blocks = [
            dealt[epoch, stream, t * one.width(stream) + i]
            for _, stream, low, high in order.runs(0, 24)
            for i in range(low, high)
        ]
        assert by_blocks == [(shard, sample) for _, shard, sample in pairs(order, step)]


def test_epochs_differ_and_so_do_seeds() -> None:
    order = order_of([100, 100])
    epochs = [[pairs(order, e * order.steps_per_epoch + s) for s in range(order.steps_per_epoch)] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert pairs(order, 0) != pairs(order_of([100, 100], seed=4), 0)


def test_the_dropped_tail_changes() -> None:
    order = order_of([60, 60, 13])
    dropped = []
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        seen = {pair for step in steps for pair in pairs(order, step)}
        dropped.append({(0, s, i) for s, n in enumerate([60, 60, 13]) for i in range(n)} - seen)
    assert [len(d) for d in dropped] == [13, 13, 13]
    assert dropped[0] != dropped[1]


def test_a_huge_run_on_16384_ranks() -> None:
    """10⁹ samples in 10⁶ shards: shares are disjoint, balanced, and nobody touches more streams than its cut."""
    world, batch = 16384, 16384 * 4
    order = Order([np.full(10**6, 1000)], seed=1, global_batch=batch, streams=16384, shuffle_block=4096)
    step = order.steps_per_epoch * 3 + 1234
    everything = pairs(order, step)
    assert len(set(everything)) == batch
    for rank in (0, 1, 8191, 16383):
        first, last = share_of(rank, world, batch)
        assert pairs(order, step, first, last) == everything[first:last]
        assert len(order.runs(first, last)) == 1
        block = next(order.blocks(first, last, step))
        assert sum(extent.count for extent in order.sets[0].extents(block)) == block.count <= 4096
        assert len(order.sets[0].extents(block)) <= 6


@pytest.mark.parametrize(("world", "batch", "streams"), [(3, 96, 32), (6, 96, 32), (8, 96, 6), (5, 40, 8)])
def test_a_rank_shares_streams_with_neighbours_only(world: int, batch: int, streams: int) -> None:
    order = order_of([1000] * 5, batch, streams=streams)
    owners = collections.Counter()
    for rank in range(world):
        runs = order.runs(*share_of(rank, world, batch))
        assert len(runs) <= -(-streams // world) + 1
        owners.update(stream for _, stream, _, _ in runs)
    width = batch // streams
    assert max(owners.values()) <= -(-width // (batch // world)) + 1


def test_shuffle_spreads_neighbours() -> None:
    """Where two samples that lie beside each other in a shard come out: beside a full shuffle and a buffer of the
    same memory (WebDataset's), as mean distance in fractions of the epoch."""
    counts, block, streams, batch = [500] * 20, 64, 16, 32
    order = order_of(counts, batch, streams=streams, shuffle_block=block)
    place = {}
    for step in range(order.steps_per_epoch):
        for i, pair in enumerate(pairs(order, step)):
            place[pair[1:]] = step * batch + i
    near = [
        abs(place[s, i] - place[s, i + 1]) for s in range(20) for i in range(499) if {(s, i), (s, i + 1)} <= set(place)
    ]
    n = order.steps_per_epoch * batch
    rng = np.random.default_rng(0)
    full = np.abs(np.diff(rng.permutation(n))).mean()
    buffered = np.empty(n)
    buffer: list[int] = []
    out = 0
    for i in range(n + block * streams):
        if i < n:
            buffer.append(i)
        if i >= block * streams or i >= n:
            buffered[buffer.pop(int(rng.integers(len(buffer))))] = out
            out += 1
    web = np.abs(np.diff(buffered)).mean()
    mean = float(np.mean(near))
    print(
        f"mean distance of neighbours: {mean / n:.3f} of the epoch; buffer {web / n:.3f}; full shuffle {full / n:.3f}"
    )
    # A block of a stream is dealt over block·streams places: as a buffer of that size, not as a full shuffle.
    assert 0.2 * block * streams < mean < block * streams
    shards_in_a_batch = np.mean([len({s for _, s, _ in pairs(order, step)}) for step in range(50)])
    assert shards_in_a_batch > 10


def test_mixing_keeps_the_weights_in_every_batch() -> None:
    order = Order([[100], [50, 50, 300]], seed=0, global_batch=24, streams=6, shuffle_block=8, weights=(1.0, 2.0))
    for step in range(40):
        assert collections.Counter(d for d, _, _ in pairs(order, step)) == {0: 8, 1: 16}
    small = [pair for step in range(12) for pair in pairs(order, step) if pair[0] == 0]
    assert len(small) == len(set(small)) == 96  # its own epoch: 12 steps of 8
    assert sorted(order.at(12).epoch.tolist()) == [0] * 16 + [1] * 8
    parts = [pairs(order, 7, *share_of(rank, 8, 24)) for rank in range(8)]
    assert list(itertools.chain(*parts)) == pairs(order, 7)


@given(places=st.integers(4, 300), weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=4))
def test_split_by_weight_is_near_the_weights(places: int, weights: list[float]) -> None:
    try:
        split = split_by_weight(places, weights)
    except ConfigError:
        assert min(weights) / sum(weights) * places < 1  # less than half a place, or none is left for it
        return
    assert sum(split) == places
    for n, weight in zip(split, weights, strict=True):
        assert n == max(1, n)
        assert abs(n - places * weight / sum(weights)) < 1
        assert n <= 2 * places * weight / sum(weights) + 1e-9


def test_a_weight_that_would_become_another_is_refused() -> None:
    message = r"the weight 0\.001 of 1\.001 is 0\.024 places in a batch of 24; use a train\.global_batch of 501 or more"
    with pytest.raises(ConfigError, match=message):
        split_by_weight(24, [1.0, 0.001])
    assert split_by_weight(501, [1.0, 0.001]) == [500, 1]


def test_a_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"takes 24 samples of a data set that has 23"):
        order_of([23])


def test_a_step_far_away_costs_no_replay() -> None:
    """Nothing but the ring of the step's own epoch is made."""
    order = SetOrder(np.full(1000, 10), seed=1, places=20, streams=4, shuffle_block=8)
    made = []
    original = order._make_ring
    order._ring = lambda epoch: made.append(epoch) or original(epoch)  # type: ignore[assignment,func-returns-value]
    order.at(10**9, 0, 20)
    assert made == [10**9 // order.steps_per_epoch]
