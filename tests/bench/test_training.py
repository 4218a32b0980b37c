"""What a rank holds in memory is what tools/bench/training.py's formula says, at every stage."""

import pytest

from tools.bench.training_states import bench_memory


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_ranks_memory_is_that_of_the_formula() -> None:
    found = bench_memory(channels=32)
    assert len(found) == 7
    for name, ratio in found.items():
        assert ratio == pytest.approx(1.0, abs=0.01), name
