"""Statistics of a data set: computed once, stored under the set's content id and the network's hash, used again."""

import io
import logging
import zipfile
from collections.abc import Mapping

import numpy as np
import torch

from ddpm_dist import storage
from ddpm_dist.errors import EvaluationError, NotFoundError, StorageError
from ddpm_dist.evaluation.features import FeatureNetwork
from ddpm_dist.evaluation.metrics import Given, Reference
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
    """What `save` stored; None if there is nothing (or something that can't be read, which is said)."""
    try:
        return from_arrays(_arrays(storage.read(url)))
    except NotFoundError:
        return None
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s can't be read (%s) and is made anew", storage.redact(url), error)
        return None


def save(url: str, summary: Summary) -> None:
    """Stores a reference's summary; where the store refuses, the statistics are only not kept."""
    buffer = io.BytesIO()
    np.savez(buffer, **to_arrays(summary))  # type: ignore[arg-type]
    try:
        storage.publish(url, buffer.getvalue())
    except StorageError as error:
        log.warning("the statistics are not kept for the next time: %s", error)


def load_given(url: str, image_size: int) -> Reference:
    """Statistics from a file that the user names: ours, or `mu` and `sigma` as pytorch-fid and ADM write them."""
    place = storage.redact(url)
    try:
        arrays = _arrays(storage.read(url))
    except NotFoundError:
        raise EvaluationError(f"--reference {place}: not found") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        raise EvaluationError(f"--reference {place}: not an .npz file; give one with mu and sigma") from None
    if "outers" in arrays:
        if f"-{image_size}px-" not in url:
            raise EvaluationError(
                f"--reference {place}: statistics of images of another size; the samples have {image_size} px"
            )
        return from_arrays(arrays)
    if not {"mu", "sigma"} <= arrays.keys():
        raise EvaluationError(f"--reference {place}: has no mu and sigma; it holds {', '.join(arrays) or 'nothing'}")
    mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise EvaluationError(
            f"--reference {place}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} don't fit each other"
        )
    return Given(mean, covariance)


def _arrays(data: bytes) -> Mapping[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        if not hasattr(file, "files"):
            raise ValueError("a single array")
        return {name: file[name] for name in file.files if name != "arr_0"}
