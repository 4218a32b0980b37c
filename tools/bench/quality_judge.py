"""What bench/quality.py prints of a set of samples: distances to the real images, each beside its floor, and copies."""

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_dist.evaluation.distances import frechet_of_features, kid, nearest
from ddpm_dist.evaluation.features import Pixel, lite0


class Judge:
    """Fréchet distance and KID in each feature space of uint8 images [N, C, H, W] to the whole real set, and copies.

    KID is unbiased: at 1,797 samples most of a Fréchet distance is its floor, which hides what separates the arms.
    copies: the share of samples that lie nearer to a real image, in pixels, than that image's nearest neighbour in the
    real set does: memorising would lower the distances as well.
    """

    def __init__(self, real: Tensor) -> None:
        _, channels, height, width = real.shape
        self._networks: dict[str, Callable[[Tensor], Tensor]] = {
            "lite0": lite0,
            "pixel": lambda images: Pixel((channels, height, width))(images).features,
        }
        self._real = {name: network(real) for name, network in self._networks.items()}
        pixels = self._real["pixel"].float()
        self._apart = nearest(pixels, pixels, 2)[0][:, 1]

    def __call__(self, images: Tensor) -> dict[str, float]:
        """{frechet_lite0, kid_lite0, kid_lite0_deviation, …, copies} of samples."""
        features = {name: network(images) for name, network in self._networks.items()}
        found = self._distances(features, self._real)
        distance, index = nearest(features["pixel"].float(), self._real["pixel"].float(), 1)
        return {**found, "copies": float((distance[:, 0] < self._apart[index[:, 0]]).double().mean())}

    def floor(self) -> dict[str, float]:
        """Between two random halves of the real images, so at half the count."""
        order = torch.randperm(len(self._real["pixel"]), generator=torch.Generator().manual_seed(0))
        a, b = order.chunk(2)
        halves = [{name: f[half] for name, f in self._real.items()} for half in (a, b)]
        return {name: round(value, 4) for name, value in self._distances(*halves).items()}

    @staticmethod
    def _distances(features: dict[str, Tensor], real: dict[str, Tensor]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, values in features.items():
            mean, deviation = kid(values, real[name])
            found |= {f"frechet_{name}": frechet_of_features(values, real[name]), f"kid_{name}": mean,
                      f"kid_{name}_deviation": deviation}  # fmt: skip
        return found
