"""Finished samples as other programs want them: one .npz as ADM's evaluator reads it, or a folder of PNG files."""

import itertools
from concurrent.futures import ThreadPoolExecutor

from ddpm_dist import storage
from ddpm_dist.data import encode_png
from ddpm_dist.sampling.folder import images_of, load_manifest
from ddpm_dist.sampling.images import NpzWriter

_THREADS = 16


def export_npz(out: str, url: str) -> None:
    """Writes finished samples as one .npz (arr_0 uint8 [N, H, W, C]; arr_1 labels), as ADM's evaluator reads it."""
    manifest = load_manifest(out)
    assert manifest is not None
    writer = NpzWriter(url, manifest.num_samples, manifest.shape)
    for sample in images_of(out):
        writer.add(sample.image, sample.label)
    writer.close()


def export_png(out: str, url: str) -> None:
    """Writes finished samples as a folder of PNG files, `<label>/<index>.png` or `<index>.png`."""
    samples = images_of(out)
    with ThreadPoolExecutor(_THREADS) as writers:
        while block := list(itertools.islice(samples, 16 * _THREADS)):
            names = [f"{s.key}.png" if s.label is None else f"{s.label}/{s.key}.png" for s in block]
            files = [encode_png(sample.image.transpose(1, 2, 0)) for sample in block]
            list(writers.map(storage.publish, [storage.join(url, name) for name in names], files))
