"""What other rooms and people may call says what it takes and gives; read from the source, nothing is imported."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layering import ROOT, handed_out, rooms

PACKAGE = ROOT / "ddpm_dist"
Public = ast.FunctionDef | ast.ClassDef

SHAPE = re.compile(r"\[[A-Za-z.][^\]]*\]|scalar|shape|as of `sample`")
"""[B, C, H, W], [T], [...]; in words; or by another's docstring that says it."""


def _public_in(path: Path, names: set[str] | None) -> Iterator[tuple[str, Public]]:
    """(name, its node): functions and classes of a module, and their public methods; all names if `names` is None."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, Public) or (node.name.startswith("_") if names is None else node.name not in names):
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def public() -> dict[str, Public]:
    """What the rooms hand out, what commands have, and what modules have that are alone, by its place."""
    places: list[tuple[Path, set[str] | None]] = [(path, None) for path in PACKAGE.glob("*.py")]
    for room in rooms():
        names, modules = handed_out(room)
        if room in ("commands", "diffusion", "models"):
            modules = {path.stem for path in (PACKAGE / room).glob("*.py")}
        for module in modules | set(names.values()):
            path = PACKAGE / room / f"{module}.py"
            given = None if module in modules else {name for name, home in names.items() if home == module}
            places.append((path if path.exists() else path.with_suffix("") / "__init__.py", given))
    return {
        f"{path.relative_to(ROOT)}: {name}": node for path, names in places for name, node in _public_in(path, names)
    }


def _tensors(node: Public) -> list[str]:
    """Arguments that are tensors."""
    if isinstance(node, ast.ClassDef):
        return []
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [arg.arg for arg in arguments if arg.annotation and "Tensor" in ast.unparse(arg.annotation)]


def _is_sampler(node: Public) -> bool:
    """sampler(chain, x): they share one signature, and one docstring for it, their module's."""
    return isinstance(node, ast.FunctionDef) and [arg.arg for arg in node.args.args[:2]] == ["chain", "x"]


def test_what_is_public_says_what_it_does() -> None:
    assert not [place for place, node in public().items() if not ast.get_docstring(node)]


@pytest.mark.parametrize("where", ["ddpm_dist/diffusion/", "ddpm_dist/models/", "ddpm_dist/rng.py"])
def test_what_takes_tensors_says_their_shapes(where: str) -> None:
    mute = [
        place
        for place, node in public().items()
        if place.startswith(where) and _tensors(node) and not _is_sampler(node)
        if not SHAPE.search(ast.get_docstring(node) or "")
    ]
    assert not mute
