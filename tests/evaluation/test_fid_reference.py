"""FID's network against torch-fidelity, with the same random weights (`make test-fid`).

torch-fidelity needs torchvision, which doesn't load beside every build of torch: it runs in an environment of its own.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_dist.evaluation import inception

pytestmark = pytest.mark.fid

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("FID_PYTHON", str(ROOT / ".venv-fid/bin/python"))


@pytest.fixture(scope="module")
def network() -> inception.FidInception:
    """Ours, with random weights that keep activations alive."""
    generator = torch.Generator().manual_seed(0)
    network = inception.FidInception().eval()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("conv.weight"):
                fan = value[0].numel()
                value.copy_(torch.randn(value.shape, generator=generator) * (2 / fan) ** 0.5)
            elif name.endswith(("running_var", "bn.weight")):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.is_floating_point():
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return network


@pytest.mark.parametrize("size", [32, 64, 299])
def test_features_and_logits_are_torch_fidelitys(network: inception.FidInception, size: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=generator)
    torch.save(network.state_dict(), tmp_path / "random.pth")
    np.save(tmp_path / "images.npy", images.numpy())
    script = str(Path(__file__).with_name("fid_reference.py"))
    files = [str(tmp_path / name) for name in ("random.pth", "images.npy", "theirs.npz")]
    subprocess.run([PYTHON, script, *files], check=True, timeout=300)
    theirs = np.load(tmp_path / "theirs.npz")
    with torch.no_grad():
        features, logits, _ = network((inception.resize_like_tensorflow(images.float()) - 128) / 128)
    assert theirs["features"].std() > 0.01
    torch.testing.assert_close(features, torch.from_numpy(theirs["features"]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits, torch.from_numpy(theirs["logits"]), rtol=1e-3, atol=1e-3)
