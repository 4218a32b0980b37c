"""FID's network against torch-fidelity, with the same random weights (`make test-fid`: it needs torchvision)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpm_dist.evaluation import inception

pytestmark = pytest.mark.fid


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, inception.FidInception]:
    """torch-fidelity's extractor and ours, with random weights that keep activations alive."""
    reference = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    generator = torch.Generator().manual_seed(0)
    ours = inception.FidInception().eval()
    with torch.no_grad():
        for name, value in ours.state_dict().items():
            if name.endswith("conv.weight"):
                fan = value[0].numel()
                value.copy_(torch.randn(value.shape, generator=generator) * (2 / fan) ** 0.5)
            elif name.endswith(("running_var", "bn.weight")):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.is_floating_point():
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    path: Path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(ours.state_dict(), path)
    names = ["2048", "logits_unbiased"]
    theirs = reference.FeatureExtractorInceptionV3("inception-v3-compat", names, str(path)).eval()
    return theirs, ours


@pytest.mark.parametrize("size", [32, 64, 299])
def test_features_and_logits_are_torch_fidelitys(
    pair: tuple[torch.nn.Module, inception.FidInception], size: int
) -> None:
    theirs, ours = pair
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected: tuple[Tensor, Tensor] = theirs(images)
        resized = inception.resize_like_tensorflow(images.float())
        features, logits, _ = ours((resized - 128) / 128)
    assert expected[0].std() > 0.01
    torch.testing.assert_close(features, expected[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits, expected[1], rtol=1e-3, atol=1e-3)
