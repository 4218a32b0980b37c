"""Statistics of a data set: computed once, stored under the set's content id and the network's hash, used again."""

import io
import json
import logging
import math

import numpy as np

from ddpm_dist import storage
from ddpm_dist.errors import NotFoundError, StorageError
from ddpm_dist.evaluation.distances import frechet
from ddpm_dist.evaluation.features import FeatureNetwork
from ddpm_dist.evaluation.given import UNREADABLE, read_arrays
from ddpm_dist.evaluation.moments import Summary, from_arrays, to_arrays

log = logging.getLogger(__name__)


def statistics_url(
    data_url: str, content_id: str, image_size: int, channels: int, network: FeatureNetwork, keep: int
) -> str:
    """Where they are stored: below the data set, in a folder of its content id."""
    kept = f"-kept{keep}" if keep else ""
    name = f"{network.name}-{network.hash}-{image_size}px-{channels}ch{kept}.npz"
    return storage.join(data_url, "statistics", content_id, name)


def load(url: str) -> Summary | None:
    """What `save` stored; None if there is nothing (or something that can't be used, which is said)."""
    try:
        arrays = read_arrays(storage.read(url))
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("it holds NaN or infinities")
        return from_arrays(arrays)
    except NotFoundError:
        return None
    except UNREADABLE as error:
        log.warning("%s can't be read (%s) and is made anew", storage.redact(url), error)
        return None


def save(url: str, summary: Summary, network: FeatureNetwork, shape: tuple[int, int], content_id: str) -> None:
    """Stores a reference's summary and what it is of; where the store refuses, it is only not kept."""
    said = {
        "network": network.name,
        "hash": network.hash,
        "resize": network.resize,
        "image_size": shape[0],
        "channels": shape[1],
        "content_id": content_id,
        "num_samples": summary.count,
    }
    buffer = io.BytesIO()
    about = np.frombuffer(json.dumps(said).encode(), np.uint8)
    np.savez(buffer, about=about, **to_arrays(summary))  # type: ignore[arg-type]
    _keep(url, buffer.getvalue())


def floor_of(url: str, summary: Summary, count: int) -> tuple[float, tuple[int, int]]:
    """Fréchet distance of `Summary.apart`, and the images on both sides; stored, as it takes as long as a distance."""
    a, b = summary.apart(count)
    place = f"{url.removesuffix('.npz')}-floor-{a.count}-{b.count}.json"
    try:
        value = json.loads(storage.read(place))["frechet"]
        if math.isfinite(value):
            return float(value), (a.count, b.count)
    except NotFoundError:
        pass
    except UNREADABLE as error:
        log.warning("%s can't be read (%s) and is made anew", storage.redact(place), error)
    value = frechet(a, b)
    _keep(place, json.dumps({"frechet": value}).encode())
    return value, (a.count, b.count)


def _keep(url: str, data: bytes) -> None:
    try:
        storage.publish(url, data)
    except StorageError as error:
        log.warning("the statistics are not kept for the next time: %s", error)
