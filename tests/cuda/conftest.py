"""The tests that need a GPU: `pytest -m cuda tests/cuda`, from the folder, with neither Ray nor a bucket.

`--device cpu` rehearses them: the same bodies on the CPU. What only a GPU has (memory of its own, streams, graphs) is
left out of a body there, and `make test-full` leaves out the compiled cases, whose C++ takes minutes to build.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.cuda.ranks import Ranks

NEEDED = (
    "deepspeed", "hjson", "cpuinfo", "pydantic", "webdataset", "braceexpand", "simplejpeg", "pyspng", "safetensors",
    "psutil", "yaml", "fsspec", "tensorboard", "PIL", "numpy", "hypothesis", "pytest_timeout",
)  # fmt: skip
"""What file:// needs of other packages, beside torch; neither Ray nor S3's."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal on the CPU")


def lacking(device: str) -> str | None:
    """One line about what these tests need and this machine hasn't."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return f"tests/cuda need {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed here"
    if device == "cuda" and not torch.cuda.is_available():
        build = "a build for CPUs" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        return (
            f"tests/cuda need a GPU, and torch {torch.__version__} ({build}) sees none here; "
            "`python -m pytest -m cuda tests/cuda --device cpu` rehearses them on the CPU"
        )
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if "cuda" in str(config.getoption("-m")).replace("not cuda", "").split():
        lack = lacking(config.getoption("--device", "cuda"))
        if lack is not None:
            pytest.exit(lack, returncode=1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            item.add_marker(pytest.mark.timeout(60 if config.getoption("--device", "cuda") == "cuda" else 1200))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """`cuda`, or `cpu` in a rehearsal."""
    return str(request.config.getoption("--device", "cuda"))


@pytest.fixture(scope="session")
def alone(device: str) -> "Iterator[Ranks]":
    """A process on one GPU."""
    from tests.cuda.ranks import Ranks

    ranks = Ranks(device)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def another(device: str) -> "Iterator[Ranks]":
    """One more, on the same GPU, that knows nothing of the first."""
    from tests.cuda.ranks import Ranks

    ranks = Ranks(device)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def pair(device: str) -> "Iterator[Ranks]":
    """Two ranks on two GPUs; a test that asks for them is left out where there is one."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, and there is {torch.cuda.device_count()}")
    from tests.cuda.ranks import Ranks

    ranks = Ranks(device, 2)
    yield ranks
    ranks.close()
