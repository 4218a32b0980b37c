"""An environment of a few packages alone, as a researcher has it who uses the mathematics and the snapshots."""

import re
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

FEW = ("torch", "numpy", "safetensors", "pydantic", "PyYAML", "fsspec")
"""All that `ddpm_dist.diffusion`, `.models` and `.snapshot` need."""


def closure(names: Iterable[str]) -> dict[str, Distribution]:
    """{name: distribution} of installed packages and of all that they need here, without extras."""
    found: dict[str, Distribution] = {}
    pending = list(names)
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in found:
            continue
        found[name] = distribution(name)
        needed = [Requirement(text) for text in found[name].requires or []]
        pending += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def make(folder: Path, names: Iterable[str] = FEW, extra: Iterable[Path] = ()) -> Path:
    """A virtual environment with those distributions of this one, and its python; extra: further entries of its site.

    Its site directory holds links, so it takes no time and no room. What isn't named can't be imported.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    entries = {
        Path(str(one.locate_file(Path(str(file)).parts[0])))
        for one in closure(names).values()
        for file in one.files or []
        if Path(str(file)).parts[0] not in ("..", "__pycache__")
    }
    for entry in {*entries, *extra}:
        (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


MATHEMATICS = """
import sys, torch
from ddpm_dist.diffusion import GaussianDiffusion, bits_per_dim, editing, make_betas, sample, training_losses
from ddpm_dist.models import UNet, UNetConfig
from ddpm_dist.recipe import load_config
from ddpm_dist.snapshot import build, load_snapshot, save_snapshot

urls = ["run.url=file:///run", "data.url=file:///data"]
cfg = load_config("digits", [*urls, "model.num_res_blocks=1", "sampling.steps=3"])
unet, diffusion = build(cfg)
save_snapshot(sys.argv[1], unet, unet.config, diffusion, {})
unet, diffusion = load_snapshot(sys.argv[1])
images = sample(unet, diffusion, cfg.sampling, seed=0, indices=torch.arange(2), shape=(1, 8, 8))
print(tuple(images.shape), bool(torch.isfinite(images).all()))
for name in ("ray", "deepspeed", "webdataset", "s3fs", "botocore", "tensorboard", "scipy", "PIL", "tqdm", "psutil"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    print(name, "is there")
"""
"""Writes and reads a snapshot at argv[1] and samples from it."""
