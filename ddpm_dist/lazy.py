"""Rooms hand out their public names lazily (PEP 562): who takes one name imports its module, and no other."""

import importlib
from collections.abc import Callable
from typing import Any


def lazily(room: str, *, modules: str = "", **names: str) -> tuple[list[str], Callable[[str], Any]]:
    """What a room's `__init__` needs: its `__all__` and its `__getattr__`.

    room: the package's `__name__`. names: module of the room -> the names that it gives, with spaces between them.
    modules: modules of the room that are public as a whole.

    A name is looked up in its module each time, so that whoever replaces it there is seen by everybody.
    """
    homes = {name: module for module, given in names.items() for name in given.split()}

    def get(name: str) -> Any:
        if name in homes:
            return getattr(importlib.import_module(f"{room}.{homes[name]}"), name)
        if name in modules.split():
            return importlib.import_module(f"{room}.{name}")
        raise AttributeError(f"module {room!r} has no attribute {name!r}")

    return sorted([*homes, *modules.split()]), get
