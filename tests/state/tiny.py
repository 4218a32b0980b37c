"""A state store of one process, with an engine whose values tell what they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.engine.pieces import Piece
from ddpm_dist.engine.world import World
from ddpm_dist.state.store import StateStore

ALONE = World(0, 1, 0, torch.device("cpu"), "gloo")
SHAPES = {"a.weight": torch.Size([5, 7]), "a.bias": torch.Size([11]), "b.weight": torch.Size([3, 4, 5])}


class Fake:
    """An engine and its averages, with values that tell what they are."""

    def __init__(self, value: float = 0.0) -> None:
        self.shapes = dict(SHAPES)
        self._pieces = [
            Piece(name, shape, 0, *(torch.empty(shape.numel()) for _ in range(3))) for name, shape in SHAPES.items()
        ]
        self.averages = {"ema": [torch.empty(shape.numel()) for shape in SHAPES.values()]}
        self.steps = 0
        self.synced = 0
        self.fill(value)

    def fill(self, value: float) -> None:
        for i, tensor in enumerate(self.tensors()):
            tensor.copy_(torch.arange(tensor.numel()) * 0.37 + i + 1000 * value)
        self.steps = int(value)

    def tensors(self) -> list[Tensor]:
        moments = [t for p in self._pieces for t in (p.weights, p.exp_avg, p.exp_avg_sq)]
        return moments + self.averages["ema"]

    def pieces(self) -> list[Piece]:
        return self._pieces

    def scalars(self) -> dict[str, Any]:
        return {"optimizer_steps": self.steps}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        self.steps = scalars["optimizer_steps"]

    def sync_weights(self) -> None:
        self.synced += 1

    def fingerprint(self) -> dict[str, Any]:
        return {"world_size": 1}


def attempt(cfg: Config) -> tuple[StateStore, str | None]:
    store = StateStore(cfg, ALONE)
    return store, store.claim()


def save(store: StateStore, *steps: int) -> None:
    for step in steps:
        store.save(step, Fake(step), fake_averages(step), {"step": step})
        store.finish()


def fake_averages(step: int) -> Fake:
    return Fake(step)


def resume(cfg: Config) -> tuple[int, Fake]:
    """(step, what was loaded) of a new attempt."""
    store, state = attempt(cfg)
    assert state is not None
    fake = Fake(-1)
    meta = store.load(state, fake, fake)
    return meta["step"], fake


def assert_is(fake: Fake, step: int) -> None:
    expected = Fake(step)
    assert all(torch.equal(a, b) for a, b in zip(fake.tensors(), expected.tensors(), strict=True))
    assert fake.steps == step
    assert fake.synced == 1


def folder(cfg: Config) -> Path:
    return Path(cfg.run.url.removeprefix("file://")) / "checkpoints"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-33])


class Dead(BaseException):
    """The process is gone: whatever it would still do doesn't happen."""


def die_at(k: int, after: bool, patch: pytest.MonkeyPatch) -> None:
    """From the k-th operation that changes the store on, nothing happens any more (but that one, if `after`)."""
    done = [0]

    def wrap(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            number, done[0] = done[0], done[0] + 1
            if number < k:
                return operation(*arguments)
            if after and number == k:
                operation(*arguments)
            raise Dead

        return wrapped

    for name in ("publish", "create", "delete", "delete_tree"):
        patch.setattr(storage, name, wrap(getattr(storage, name)))
