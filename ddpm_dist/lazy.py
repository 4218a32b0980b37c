"""Rooms hand out their public names lazily (PEP 562): who takes one name imports its module, and no other."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ddpm_dist.packages import absent

Hooks = tuple[Callable[..., Any], Callable[[], list[str]]]
"""A module's `__getattr__` and `__dir__`."""


def lazily(room: str, *, modules: str = "", **names: str) -> tuple[list[str], Hooks]:
    """What a room's `__init__` needs: its `__all__`, and its `__getattr__` and `__dir__`.

    room: the package's `__name__`. names: module of the room -> the names that it gives, with spaces between them.
    modules: modules of the room that are public as a whole.

    A name is looked up in its module each time, so that whoever replaces it there is seen by everybody. Where its
    module needs a package that isn't installed, the ModuleNotFoundError says how to get it.
    """
    homes = {name: module for module, given in names.items() for name in given.split()}

    def get(name: str) -> Any:
        if name in homes:
            return getattr(_load(f"{room}.{homes[name]}"), name)
        if name in modules.split():
            return _load(f"{room}.{name}")
        raise AttributeError(f"module {room!r} has no attribute {name!r}")

    public = sorted([*homes, *modules.split()])
    return public, (get, lambda: public)


def _load(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        explained = absent(error)
        if explained is None or explained == str(error):
            raise
        raise ModuleNotFoundError(explained, name=error.name) from error
