"""Quantisation, the .npz and the grid, each read back by somebody else's code."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_dist.sampling.images import NpzWriter, grid_png, to_uint8


def test_every_grey_level_survives() -> None:
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))


def test_rounds_to_the_nearest_and_clamps() -> None:
    x = torch.tensor([-3.0, -1.0, -0.9999, 0.0, 0.9999, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 255, 255]


def read_as_adm(path: Path, name: str) -> np.ndarray:
    """openai/guided-diffusion's evaluator: `open_npz_array` and `NpzArrayReader`, read in batches of 3."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert not fortran
        batches = []
        for start in range(0, shape[0], 3):
            count = min(3, shape[0] - start)
            size = count * int(np.prod(shape[1:])) * dtype.itemsize
            batches.append(np.frombuffer(file.read(size), dtype).reshape([count, *shape[1:]]))
        return np.concatenate(batches)


@pytest.mark.parametrize("labels", [None, [3, 1, 2, 0]])
def test_npz_as_adm_reads_it(tmp_path: Path, labels: list[int] | None) -> None:
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    for name in ("one", "two"):
        writer = NpzWriter(f"file://{tmp_path}/{name}.npz", 4, (3, 5, 6))
        for i, image in enumerate(images):
            writer.add(image.numpy(), labels[i] if labels else None)
        writer.close()
    path = tmp_path / "one.npz"
    assert path.read_bytes() == (tmp_path / "two.npz").read_bytes()
    array = read_as_adm(path, "arr_0")
    assert array.dtype == np.uint8
    assert np.array_equal(array, images.permute(0, 2, 3, 1).numpy())
    with np.load(path) as loaded:
        assert np.array_equal(loaded["arr_0"], array)
        assert ("arr_1" in loaded) == (labels is not None)
        if labels:
            assert loaded["arr_1"].tolist() == labels


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_the_images_in_rows(channels: int) -> None:
    images = torch.stack([torch.full((channels, 4, 4), 20 * i, dtype=torch.uint8) for i in range(6)])
    picture = np.asarray(Image.open(io.BytesIO(grid_png(images, columns=3, at_least=15))))
    assert picture.shape[:2] == (10, 15)
    assert [int(picture[y, x].max()) for y in (0, 5) for x in (0, 5, 10)] == [0, 20, 40, 60, 80, 100]
