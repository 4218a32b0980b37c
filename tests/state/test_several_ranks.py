"""States of several ranks: parts, groups, the rule by which they are cut, and reading any range of them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpm_dist import storage
from ddpm_dist.errors import StateError, UnreachableError
from ddpm_dist.state import format as fmt, parts
from ddpm_dist.state.cut import Cut, cut_of
from ddpm_dist.state.reader import Target, read_full, read_into, read_manifest
from ddpm_dist.state.writer import StateWriter
from tests.state.tiny import SHAPES

pytestmark = pytest.mark.usefixtures("small_files")


@pytest.fixture
def two_ranks(tmp_path: Path) -> tuple[str, dict[str, Tensor]]:
    """(URL of a state written by two ranks that cut parameters in odd places, the whole weights)."""
    full = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    url = f"file://{tmp_path}/states"
    cuts = {"a.weight": 13, "a.bias": 11, "b.weight": 1}
    published: list[fmt.StateId] = []
    writers = [StateWriter(url, rank, 2, published.append, lambda: None) for rank in range(2)]
    shapes = {name: list(shape) for name, shape in SHAPES.items()}
    for rank, writer in enumerate(writers):
        pieces, tensors = [], []
        for name, cut in cuts.items():
            low, high = (0, cut) if rank == 0 else (cut, SHAPES[name].numel())
            if low < high:
                pieces.append((name, low, high - low))
                tensors.append(full[name].view(-1)[low:high])
        doubled = [2 * tensor for tensor in tensors]
        writer.save(fmt.StateId(5, 1), {"weights": tensors, "ema": doubled}, pieces, shapes, {}, {})
    for writer in reversed(writers):
        writer.wait()
    assert published == [fmt.StateId(5, 1)]
    return storage.join(url, "000000005-0001"), full


def test_ranges_of_a_state_of_two_ranks(two_ranks: tuple[str, dict[str, Tensor]]) -> None:
    url, full = two_ranks
    manifest = read_manifest(url)
    for name, whole in full.items():
        for low, high in [(0, whole.numel()), (3, 4), (1, whole.numel() - 1)]:
            target = torch.zeros(high - low)
            fetched = read_into(url, manifest, [Target("ema", name, low, target)])
            assert torch.equal(target, 2 * whole.view(-1)[low:high])
            assert fetched <= 4 * (high - low) + 4 * fmt.BLOCK_BYTES, "no more than the blocks that are touched"
    for name, tensor in read_full(url, manifest, "weights"):
        assert torch.equal(tensor, full[name])
    with pytest.raises(StateError, match=r"has no 'power-0\.050'; it has weights, ema"):
        list(read_full(url, manifest, "power-0.050"))


def test_without_every_part_there_is_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PARTS_PATIENCE_S", 0.3)
    writer = StateWriter(f"file://{tmp_path}", 0, 2, lambda state: None, lambda: None)
    writer.save(fmt.StateId(5, 1), {"weights": [torch.zeros(4)]}, [("w", 0, 4)], {"w": [8]}, {}, {})
    with pytest.raises(UnreachableError):
        writer.wait()
    assert not list(tmp_path.glob("*/manifest.json"))


def write_cut(url: str, cut: Cut, full: dict[str, Tensor], odd: int | None = None) -> str:
    """URL of a state that as many ranks wrote; the pieces of rank `odd` are not what the rule says."""
    writers = [StateWriter(url, rank, cut.ranks, lambda state: None, lambda: None) for rank in range(cut.ranks)]
    shapes = {name: list(tensor.shape) for name, tensor in full.items()}
    for rank, writer in enumerate(writers):
        pieces = cut.pieces(rank)[:: -1 if rank == odd else 1]
        tensors = [full[name].view(-1)[offset : offset + numel] for name, offset, numel in pieces]
        writer.save(
            fmt.StateId(5, 1), {"weights": tensors, "ema": [2 * t for t in tensors]}, pieces, shapes, {}, {}, cut
        )
    for writer in reversed(writers):
        writer.wait()
    return storage.join(url, "000000005-0001")


@pytest.mark.parametrize("odd", [None, 3])
def test_many_ranks_hand_in_by_groups_and_by_rule(
    odd: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "GROUP", 4)
    full = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    url = write_cut(f"file://{tmp_path}", cut_of(3, 10, SHAPES), full, odd)
    names = {path.name for path in tmp_path.glob("*/part*")}
    assert names == {f"part-{r:05d}.json" for r in (1, 2, 3, 5, 6, 7, 9)} | {"parts-00004.json", "parts-00008.json"}
    manifest = read_manifest(url)
    assert (manifest.cut is None) == (odd is not None)
    assert b'"pieces"' not in storage.read(f"{url}/parts-00004.json")
    assert (b'"pieces"' in storage.read(f"{url}/manifest.json")) == (odd is not None)
    for kind, factor in (("weights", 1), ("ema", 2)):
        for name, tensor in read_full(url, manifest, kind):
            assert torch.equal(tensor, factor * full[name])
