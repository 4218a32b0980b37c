"""The samples that are evaluated: a folder of shards, and whether all of it is there."""

from ddpm_dist import storage
from ddpm_dist.data import DataIndex, load_index
from ddpm_dist.errors import EvaluationError, NotFoundError
from ddpm_dist.evaluation.order import Order
from ddpm_dist.sampling import Manifest, job as sampling_job

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def sample_index(url: str) -> DataIndex:
    """The index of a folder of samples; EvaluationError if there is none, or if a shard was lost or cut since."""
    place = storage.redact(url)
    try:
        index = load_index(url)
    except NotFoundError:
        storage.check_access(url, "--samples")
        if sampling_job.load_manifest(url) is not None:
            raise EvaluationError(
                f"--samples {place}: its sampling job has not finished; start ddpm-sample with the same arguments "
                "again, it does what is missing"
            ) from None
        raise EvaluationError(f"--samples {place}: no samples are there{instead(url)}") from None
    there = storage.list_objects(url)
    lost = [shard.name for shard in index.shards if there.get(shard.name) != shard.bytes]
    if lost:
        ours = sampling_job.load_manifest(url) is not None
        remedy = "start ddpm-sample with the same arguments again, it makes them anew" if ours else "restore them"
        raise EvaluationError(
            f"--samples {place}: {len(lost)} of {len(index.shards)} shards are missing or cut, the first is {lost[0]}; "
            f"{remedy}"
        )
    return index


def instead(url: str) -> str:
    """What to do with what is there instead of a folder of sample shards."""
    if url.endswith((".npz", ".zip", ".tar")):
        kind = url.rpartition(".")[2]
        return f"; ddpm-shards make {kind} FILE URL makes a set of them, for --samples"
    names = storage.list_names(url)
    if any(name.lower().endswith(_PICTURES) for name in names):
        return " but image files; ddpm-shards make folder FOLDER URL makes a set of them, for --samples"
    return "; ddpm-sample draws them, and ddpm-shards index indexes shards of another program"


def shape_of(index: DataIndex, manifest: Manifest | None, samples: str) -> tuple[int, int]:
    """(size, channels) of the samples."""
    if manifest is not None:
        return manifest.image_size, manifest.channels
    sides = {*index.schema.min_size, *index.schema.max_size}
    if len(sides) != 1:
        raise EvaluationError(
            f"--samples {storage.redact(samples)}: images of {min(sides)} to {max(sides)} px; one is needed"
        )
    return sides.pop(), 3


def count_of(order: Order, index: DataIndex) -> int:
    """How many of them are used."""
    count = order.num_samples or index.num_samples
    if count > index.num_samples:
        raise EvaluationError(f"--num-samples {count}: {storage.redact(index.url)} has {index.num_samples}; draw more")
    return count
