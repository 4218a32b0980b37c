"""Imports point down only, rooms meet by their public names, and each outside system has its place.

Read from the source: nothing is imported.
"""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

from ddpm_dist.packages import PIP_NAMES

ROOT = Path(__file__).resolve().parents[1]

LAYERS: list[tuple[str, ...]] = [
    ("packages", "lazy", "config", "configs", "recipe", "cli", "errors", "interrupt"),
    ("storage", "kernels", "rng", "device", "allocator", "host_memory", "temporary", "progress"),
    ("data", "diffusion", "models"),
    ("engine", "snapshot"),
    ("state", "cluster"),
    ("training",),
    ("sampling",),
    ("evaluation",),
    ("planning",),
    ("doctor",),
    ("commands", "preload"),
    ("launch", "tools"),
]
"""From the bottom up: rooms (folders) and modules of ddpm_dist, then the folders beside it."""

UNAWARE = [{"data", "diffusion", "models"}, {"engine", "snapshot"}, {"state", "cluster"}]
"""Neighbours that don't know of each other."""

PLACES = {
    "deepspeed": ["ddpm_dist/engine/"],
    "ray": ["ddpm_dist/cluster/"],
    "webdataset": ["ddpm_dist/data/tar.py"],
    "fsspec": ["ddpm_dist/storage/"],
    "s3fs": ["ddpm_dist/storage/"],
    "aiobotocore": ["ddpm_dist/storage/"],
    "botocore": ["ddpm_dist/storage/", "tools/local/s3_server.py"],
    "triton": ["ddpm_dist/kernels/"],
    "tensorboard": ["ddpm_dist/training/events.py"],
    "torch.utils.tensorboard": ["ddpm_dist/training/events.py"],
}
"""The only folders or files that import these; tools/bench/ may import the peers that it measures."""

MOST_LINES = 300
LONGER: dict[str, str] = {}
"""Modules that are longer, and why; the reason stands in the module, too."""


def sources() -> list[Path]:
    return sorted(path for folder in ("ddpm_dist", "launch", "tools") for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def home_of(module: str) -> str:
    """The room of a module, or the module itself where it is alone; "" of the package, and of what isn't ours."""
    first, _, rest = module.partition(".")
    return first if first in ("launch", "tools") else rest.partition(".")[0] if first == "ddpm_dist" else ""


@cache
def imports(path: Path) -> list[tuple[str, str, int]]:
    """(module, name taken from it or "", line) of all imports, also those inside functions and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "", node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            # `from ddpm_dist import storage` imports a module, `from ddpm_dist.storage import read` a name.
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                found.append(
                    (deeper, "", node.lineno) if _is_module(deeper) else (node.module, alias.name, node.lineno)
                )
    return found


@cache
def _is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


@cache
def handed_out(room: str) -> tuple[dict[str, str], set[str]]:
    """What a room's `__init__` gives: {name: module that has it}, and the modules that are public as a whole."""
    tree = ast.parse((ROOT / "ddpm_dist" / room / "__init__.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "lazily":
            given = {word.arg: ast.literal_eval(word.value).split() for word in node.keywords if word.arg}
            modules = set(given.pop("modules", []))
            return {name: module for module, names in given.items() for name in names}, modules
    return {}, set()


def rooms() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "ddpm_dist").glob("*/__init__.py"))


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    numbers = {home: number for number, layer in enumerate(LAYERS) for home in layer}
    if module == "ddpm_dist":
        assert not imports(path), "the package itself imports nothing"
        return
    mine = home_of(module)
    assert mine in numbers, f"{module}: say in LAYERS where it belongs"
    for imported, _, line in imports(path):
        theirs = home_of(imported)
        if theirs in ("", mine):
            continue
        where = f"{path.relative_to(ROOT)}:{line}: {module} imports {imported}"
        assert theirs in numbers, f"{where}, which is not in LAYERS"
        assert numbers[theirs] <= numbers[mine], f"{where}, which lies above it"
        assert not any({mine, theirs} <= group for group in UNAWARE), f"{where}; they are not to know of each other"


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_rooms_meet_by_their_public_names(path: Path) -> None:
    """Another room's names come from its `__init__`, or from a module that the `__init__` names as public."""
    where, mine = path.relative_to(ROOT), home_of(module_name(path))
    if str(where).startswith("tools/bench/"):
        return
    for imported, name, line in imports(path):
        theirs = home_of(imported)
        if theirs in ("", mine) or theirs not in rooms() or theirs == "commands":
            continue
        names, modules = handed_out(theirs)
        inner = imported.removeprefix(f"ddpm_dist.{theirs}").lstrip(".")
        public = inner in modules if inner else not name or name in names
        assert public, f"{where}:{line}: {imported} {name}: not what ddpm_dist/{theirs}/__init__.py hands out"
        assert not name.startswith("_"), f"{where}:{line}: {name} is private"


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_attributes_of_rooms_are_public(path: Path) -> None:
    """`from ddpm_dist import storage` and then `storage.read`."""
    tree = ast.parse(path.read_text())
    held = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "ddpm_dist"
        for alias in node.names
        if alias.name in rooms()
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in held:
            names, modules = handed_out(held[node.value.id])
            assert node.attr in names or node.attr in modules, (
                f"{path.relative_to(ROOT)}:{node.lineno}: {held[node.value.id]}.{node.attr} is not handed out"
            )


@pytest.mark.parametrize("room", rooms())
def test_a_room_says_what_it_keeps_and_hands_out_what_it_has(room: str) -> None:
    path = ROOT / "ddpm_dist" / room / "__init__.py"
    tree = ast.parse(path.read_text())
    assert len((ast.get_docstring(tree) or "").split(". ")) >= 2, f"{room}: what it keeps, and what it never does"
    names, modules = handed_out(room)
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"ddpm_dist.{room}.")
        for alias in node.names
    }
    if names:
        assert typed == {name: f"ddpm_dist.{room}.{module}" for name, module in names.items()}, (
            "the types and the lazy names of a room are one list"
        )
    assert not {name for name in names if _is_module(f"ddpm_dist.{room}.{name}")}, "a name hides a module"
    assert all(_is_module(f"ddpm_dist.{room}.{module}") for module in modules)


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_outside_systems_have_their_place(path: Path) -> None:
    where = str(path.relative_to(ROOT))
    if where.startswith("tools/bench/"):
        return
    for imported, _, line in imports(path):
        for system, places in PLACES.items():
            if imported == system or imported.startswith(system + "."):
                assert any(where.startswith(place) for place in places), (
                    f"{where}:{line}: {system} is imported in {places or 'no module'} only"
                )


def test_no_cycles() -> None:
    ours = {module_name(path): path for path in sources()}
    graph = {name: {imported for imported, _, _ in imports(path) if imported in ours} for name, path in ours.items()}
    # A name taken from a room comes from its module.
    for name, path in ours.items():
        for imported, taken, _ in imports(path):
            home = home_of(imported)
            if taken and imported == f"ddpm_dist.{home}" and home in rooms() and name != imported:
                graph[name].discard(imported)
                inner = handed_out(home)[0].get(taken)
                graph[name] |= {f"{imported}.{inner}"} & set(ours) if inner else {imported}
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
    for home in (home for layer in LAYERS for home in layer):
        assert _is_module(f"ddpm_dist.{home}") or _is_module(home), f"LAYERS names {home}, which is not there"


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_modules_fit_in_a_head(path: Path) -> None:
    where, lines = str(path.relative_to(ROOT)), len(path.read_text().splitlines())
    assert lines <= MOST_LINES or where in LONGER, f"{where}: {lines} lines; where one idea has become two, cut it"
    assert where not in LONGER or lines > MOST_LINES, f"{where}: is no longer long; take it out of LONGER"


def test_what_is_imported_is_declared() -> None:
    """Every outside package that we import is in setup.py, under the name that pip knows."""
    declared = (ROOT / "setup.py").read_text()
    missing = set()
    for path in sources():
        if "tools/bench" not in str(path):
            for imported, _, _ in imports(path):
                top = imported.split(".")[0]
                ours = top in ("ddpm_dist", "tools", "launch", "tests")
                if not ours and top not in sys.stdlib_module_names and f'"{PIP_NAMES.get(top, top)}' not in declared:
                    missing.add(f"{path.relative_to(ROOT)}: {top}")
    assert not missing
