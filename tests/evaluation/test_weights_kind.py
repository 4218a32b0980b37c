"""What a result says of the weights: the run's EMA, another average, raw ones, and unknown ones are told apart."""

import pytest

from ddpm_dist.evaluation import warnings
from ddpm_dist.sampling.plan import Manifest


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("ema", None),
        ("raw", "the weights are raw, not EMA"),
        ("power-0.050", "another average, power-0.050, not the run's EMA"),
        ("power-0.080 after the run", "another average, power-0.080 after the run"),
        (None, "it isn't known whether the weights are an average"),
    ],
)
def test_kinds_of_weights_are_told_apart(kind, said):
    result = {"num_samples": 50_000, "duplicates": 0}
    found = list(warnings._of_samples(result, Manifest.model_construct(kind=kind)))
    assert (found == []) if said is None else (said in found[0])
