"""What a result says of the weights: the run's EMA, another average, raw ones, and unknown ones are told apart."""

import inspect

import pytest

from ddpm_dist.evaluation import result
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
    given = {"manifest": Manifest.model_construct(kind=kind), "count": 50_000, "data": None, "networks": {}, "size": 8}
    wanted = inspect.signature(result.warnings).parameters
    found = [text for text in result.warnings(**{name: given[name] for name in wanted}) if "weights" in text]
    assert (found == []) if said is None else (said in found[0])
