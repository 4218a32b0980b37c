"""Statistics from a file that the user names, as `--reference`: ours, or of the programs that others compare with.

    ours          sums of a data set under one network; the file says which network, size and data they are of
    mu, sigma     pytorch-fid, TTUR, ADM (with mu_s and sigma_s for sFID); they don't say of which network they are
    pool_3        features [N, D] of score_sde: mean, covariance and single images

Nothing in a file is executed: pickled files are refused, with the lines that save them anew.
"""

import io
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_dist import storage
from ddpm_dist.errors import EvaluationError, NotFoundError
from ddpm_dist.evaluation.features import FeatureNetwork
from ddpm_dist.evaluation.moments import KEPT, Summary, from_arrays

UNREADABLE = (ValueError, KeyError, TypeError, OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile)
"""What numpy, zipfile and torch raise on bytes that are no .npz of ours."""
_OLD_NAME = re.compile(
    r"/(?P<network>[^/]+)-(?P<hash>[0-9a-f]{12})-(?P<image_size>\d+)px-(?P<channels>\d)ch[^/]*\.npz$"
)
"""How version 0.1.0 named its statistics, which say nothing inside."""
_PICKLED = (
    'it is pickled, and reading it would execute what it holds. Save it anew: python -c "import pickle, numpy; '
    "d = pickle.load(open('FILE', 'rb')); numpy.savez('FILE.npz', mu=d['mu'], sigma=d['sigma'])\" "
    "(EDM2's: d = d['fid'])"
)


@dataclass(frozen=True)
class Given:
    """Mean and covariance from somebody's statistics file, whose images are not there."""

    mean: Tensor
    covariance: Tensor
    count: int = 2**31
    """Unknown in those files; large, since they describe whole data sets."""
    spatial: "Given | None" = None
    """Of sFID's features."""


def load_given(
    url: str, shape: tuple[int, int], networks: Mapping[str, FeatureNetwork]
) -> "tuple[Summary | Given, bool]":
    """(statistics, whether they say of which network they are). EvaluationError for what can't be used as it is.

    shape: (size, channels) of the samples. networks: those that they are compared in.
    """
    place = f"--reference {storage.redact(url)}"
    try:
        arrays = _read(storage.read(url), url)
    except NotFoundError:
        raise EvaluationError(f"{place}: not found") from None
    except EvaluationError as error:
        raise EvaluationError(f"{place}: {error}") from None
    except UNREADABLE:
        raise EvaluationError(f"{place}: not an .npz file, or damaged; give one with mu and sigma") from None
    for name, array in arrays.items():
        if name != "about" and not (np.issubdtype(array.dtype, np.number) and np.isfinite(array).all()):
            what = "NaN or infinities" if np.issubdtype(array.dtype, np.number) else f"{array.dtype}, not numbers"
            raise EvaluationError(f"{place}: its {name} holds {what}")
    if len(networks) > 1:
        raise EvaluationError(
            f"{place}: statistics are of one network, the metrics use {', '.join(networks)}; ask for them one by one"
        )
    if "outers" in arrays:
        return _own(arrays, url, place, shape, networks), True
    if "pool_3" in arrays:
        return _of_features(arrays["pool_3"], place), False
    if not {"mu", "sigma"} <= arrays.keys():
        raise EvaluationError(
            f"{place}: has no mu and sigma; it holds {', '.join(arrays) or 'nothing'}. If these are images, "
            f"{_as_data(url)}"
        )
    spatial = _gaussian(arrays, "mu_s", "sigma_s", place) if {"mu_s", "sigma_s"} <= arrays.keys() else None
    found = _gaussian(arrays, "mu", "sigma", place)
    return Given(found.mean, found.covariance, spatial=spatial), False


def about(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any] | None:
    """What statistics of ours say of themselves; None before that was written."""
    return dict(json.loads(arrays["about"].tobytes())) if "about" in arrays else None


def read_arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """All arrays of an .npz but arr_0, which holds images where there is one."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name != "arr_0"}


def _as_data(url: str) -> str:
    return f"make a data set of them by `ddpm-shards make npz {storage.redact(url)} URL`, and give it as --data URL"


def _read(data: bytes, url: str) -> dict[str, NDArray[Any]]:
    if data.startswith(b"\x80"):
        raise EvaluationError(_PICKLED)
    if data.startswith(b"\x93NUMPY"):
        pickled = b"'|O'" in data[:200]
        raise EvaluationError(_PICKLED if pickled else "a single array; give an .npz with mu and sigma")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
    if "arr_0.npy" in names and len(names) <= 2:
        raise EvaluationError(f"it holds images (arr_0) and no statistics: {_as_data(url)}")
    return read_arrays(data)


def _own(
    arrays: Mapping[str, NDArray[Any]],
    url: str,
    place: str,
    shape: tuple[int, int],
    networks: Mapping[str, FeatureNetwork],
) -> Summary:
    said: Any
    try:
        said = about(arrays)
        summary = from_arrays(arrays)
    except UNREADABLE as error:
        raise EvaluationError(f"{place}: damaged: {error}") from None
    if said is None:
        old = _OLD_NAME.search(url)
        if old is None:
            raise EvaluationError(
                f"{place}: it doesn't say which network and size it is of, and was renamed since; give --data, which "
                "makes it anew"
            )
        said = {**old.groupdict(), "image_size": int(old["image_size"]), "channels": int(old["channels"])}
    if (said.get("image_size"), said.get("channels")) != shape:
        raise EvaluationError(
            f"{place}: statistics of images of another size: {said.get('image_size')} px, {said.get('channels')} "
            f"channels; the samples have {shape[0]} px, {shape[1]} channels"
        )
    for network in networks.values():
        if network.hash != said.get("hash"):
            raise EvaluationError(
                f"{place}: statistics of the network {said.get('network')} ({said.get('hash')}); the metric asks for "
                f"{network.name} ({network.hash})"
            )
    return summary


def _of_features(features: NDArray[Any], place: str) -> Summary:
    if features.ndim != 2 or len(features) < 2:
        raise EvaluationError(f"{place}: pool_3 {features.shape} is not [images, features]")
    summary = Summary.empty(features.shape[1], parts=2, keep=KEPT)
    summary.add(torch.from_numpy(np.ascontiguousarray(features, np.float32)), 0)
    return summary


def _gaussian(arrays: Mapping[str, NDArray[Any]], mu: str, sigma: str, place: str) -> Given:
    mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in (mu, sigma))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise EvaluationError(
            f"{place}: {mu} {tuple(mean.shape)} and {sigma} {tuple(covariance.shape)} don't fit each other"
        )
    if not torch.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * float(covariance.abs().max())):
        raise EvaluationError(f"{place}: {sigma} is not symmetric, so it is no covariance")
    return Given(mean, covariance)
