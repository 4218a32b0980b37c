"""What an evaluation is asked for, and whether that can be done."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ddpm_dist.config import SamplingConfig
from ddpm_dist.data import DataIndex, load_index
from ddpm_dist.errors import EvaluationError
from ddpm_dist.evaluation import metrics

BITS_PER_DIM = "bits_per_dim"
BUILT_IN = ("pixel", "lite0")


@dataclass(frozen=True)
class Order:
    """What to evaluate. One of samples and snapshot, and one of data and reference, must be given."""

    samples: str | None = None
    """Folder of sample shards."""
    snapshot: str | None = None
    """Snapshot to draw samples from; they are deleted afterwards."""
    data: str | None = None
    """Data set to compare with."""
    data_index: str | None = None
    """Folder of its index, if it isn't with the shards."""
    reference: str | None = None
    """Statistics file (.npz) to compare with, instead of a data set."""
    held_out: str | None = None
    """Data set for bits_per_dim; default: data."""
    held_out_index: str | None = None
    """Folder of its index, if it isn't with the shards."""
    metrics: tuple[str, ...] = ("frechet_pixel", "frechet_lite0")
    networks: Mapping[str, str] = field(default_factory=dict)
    """{name: URL} of feature networks beside pixel and lite0."""
    num_samples: int | None = None
    """Samples to use, from the first; default: all that are there, or 10,000 from a snapshot."""
    seed: int = 0
    labels: str | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    out: str | None = None
    """Evaluation folder for the result, as of a run."""
    nearest: int = 0
    """First samples to find the nearest images of the data set for: is the network copying?"""

    def for_snapshot(self, url: str, out: str) -> "Order":
        """The same question about a snapshot, its result in a folder."""
        return replace(self, samples=None, snapshot=url, out=out)

    def data_set(self) -> DataIndex | None:
        """The index of what is compared with, None where that is a file of statistics."""
        return None if self.data is None else load_index(self.data, "--data", self.data_index)

    def likelihood_set(self) -> DataIndex | None:
        """The index of what bits_per_dim is the mean over."""
        if self.held_out is None:
            return self.data_set()
        return load_index(self.held_out, "--held-out", self.held_out_index)


def check(order: Order) -> None:
    """Raises EvaluationError for orders that can't be carried out."""
    if (order.samples is None) == (order.snapshot is None):
        raise EvaluationError("give one of --samples and --snapshot: what is to be evaluated")
    if (order.data is None) == (order.reference is None):
        raise EvaluationError("give one of --data and --reference: what it is compared with")
    for name, folder, url in (
        ("data", order.data_index, order.data),
        ("held-out", order.held_out_index, order.held_out),
    ):
        if folder is not None and url is None:
            raise EvaluationError(f"--{name}-index {folder}: of which set? Give --{name}")
    check_metrics(order.metrics, order.networks)
    if BITS_PER_DIM in order.metrics and order.held_out is None and order.data is None:
        raise EvaluationError(f"{BITS_PER_DIM}: of which images? Give --held-out (or --data)")


def check_metrics(names: Sequence[str], networks: Mapping[str, str]) -> None:
    """EvaluationError for unknown metrics, and for networks without weights."""
    if not names:
        raise EvaluationError("evaluation.metrics: empty; name at least one, such as frechet_lite0")
    network_specs(metrics.parse(name for name in names if name != BITS_PER_DIM), networks)


def check_used(given: Iterable[str], names: Sequence[str]) -> None:
    """EvaluationError for a network that was given and that none of the metrics uses: a word without effect."""
    used = {metric.network for metric in metrics.parse(name for name in names if name != BITS_PER_DIM)}
    for network in given:
        if network not in used:
            raise EvaluationError(
                f"--network {network}: no metric uses it; they are {', '.join(names)}. Name it in --metrics, such as "
                f"frechet_{network}"
            )


def network_specs(wanted: Sequence[metrics.Metric], urls: Mapping[str, str]) -> dict[str, str]:
    """{network name: what `open_network` reads}; EvaluationError if a network's weights are not named."""
    for name in BUILT_IN:
        if name in urls:
            raise EvaluationError(f"evaluation.networks.{name}: {name} is built in, and takes no weights; leave it out")
    specs = {}
    for metric in wanted:
        name = metric.network
        if name not in BUILT_IN and name not in urls:
            raise EvaluationError(
                f"evaluation.metrics: {metric.kind}_{name}: where are the weights of {name}? Give --network "
                f"{name}=URL or evaluation.networks.{name}=URL (known without one: pixel, lite0)"
            )
        specs[name] = f"{name}={urls[name]}" if name in urls else name
    return specs
