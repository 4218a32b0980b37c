"""tools/inspect_checkpoint.py on real states: what it says of whole, damaged, void and differing ones."""

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ddpm_dist.commands.inspect_checkpoint import main
from ddpm_dist.errors import DamagedStateError, StateError
from ddpm_dist.state import format as fmt, history
from ddpm_dist.state.writer import StateWriter

SHAPES = {"conv.weight": [4, 3, 2], "conv.bias": [5]}


def write(run: Path, step: int, attempt: int, ranks: int = 1, change: float = 0.0) -> dict[str, torch.Tensor]:
    """A state by ranks that each hold an equal part of every parameter; the full weights."""
    full = {name: torch.arange(math.prod(shape)).float() + step for name, shape in SHAPES.items()}
    full["conv.bias"][2] += change
    folder = f"file://{run}/checkpoints"
    writers = [StateWriter(folder, rank, ranks, lambda state: None, lambda: None) for rank in range(ranks)]
    for rank, writer in enumerate(writers):
        pieces, tensors = [], []
        for name, tensor in full.items():
            low, high = rank * tensor.numel() // ranks, (rank + 1) * tensor.numel() // ranks
            pieces.append((name, low, high - low))
            tensors.append(tensor[low:high])
        kinds = {"weights": tensors, "ema": [tensor / 2 for tensor in tensors]}
        writer.save(fmt.StateId(step, attempt), kinds, pieces, SHAPES, {"optimizer_steps": step}, {"step": step})
    for writer in reversed(writers):
        writer.wait()
    return {name: tensor.view(SHAPES[name]) for name, tensor in full.items()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two attempts: states of steps 10 and 20 by the first, a void one of 30, and 30 by the second."""
    folder = f"file://{tmp_path}/checkpoints"
    history.claim(folder, 1, [])
    for step in (10, 20, 30):
        write(tmp_path, step, 1)
    history.claim(folder, 2, [fmt.StateId(20, 1)])
    write(tmp_path, 30, 2, ranks=2)
    return tmp_path


def state(run: Path, name: str) -> str:
    return f"file://{run}/checkpoints/{name}"


def test_list_tells_what_became_of_each(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints/000000040-0002").mkdir()
    (run / "checkpoints/000000040-0002/00000-000.f32").write_bytes(b"half")
    main(["list", f"file://{run}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "000000040-0002", "000000030-0002", "000000030-0001", "000000020-0001", "000000010-0001",
    ]  # fmt: skip
    endings = ("no manifest", "the next attempt continues it", "had been succeeded", "valid", "valid")
    assert all(line.endswith(ending) for line, ending in zip(lines, endings, strict=True))


def test_a_run_stands_for_its_newest_valid_state(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", f"file://{run}"])
    assert "000000030-0002: whole; 2 files" in capsys.readouterr().out
    main(["show", f"file://{run}"])
    shown = capsys.readouterr().out
    assert "29 parameters in 2 tensors" in shown
    assert '"optimizer_steps": 30' in shown


def test_verify_names_the_damaged_file(run: Path) -> None:
    path = run / "checkpoints/000000030-0002/00001-000.f32"
    data = bytearray(path.read_bytes())
    data[7] ^= 16
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedStateError, match=r"000000030-0002/00001-000\.f32"):
        main(["verify", f"file://{run}"])
    path.unlink()
    with pytest.raises(DamagedStateError, match=r"00001-000\.f32: missing"):
        main(["verify", f"file://{run}"])


def test_compare_sees_through_the_cut_and_finds_one_changed_element(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", state(run, "000000030-0001"), state(run, "000000030-0002")])
    assert "equal, bit for bit" in capsys.readouterr().out
    write(run / "other", 30, 1, ranks=3, change=0.25)
    with pytest.raises(StateError, match="2 differences"):
        main(["compare", state(run, "000000030-0001"), state(run / "other", "000000030-0001")])
    assert capsys.readouterr().out.splitlines() == [
        "weights of conv.bias: differ by up to 0.25",
        "ema of conv.bias: differ by up to 0.125",
    ]


def test_extract_writes_full_tensors(run: Path, tmp_path: Path) -> None:
    full = write(run / "third", 50, 1, ranks=3)
    out = tmp_path / "weights.safetensors"
    main(["extract", state(run / "third", "000000050-0001"), str(out)])
    tensors = safetensors.torch.load_file(out)
    assert set(tensors) == set(full)
    assert all(torch.equal(tensors[name], full[name] / 2) for name in full)
    with pytest.raises(StateError, match="has no 'exp_avg'; it has weights, ema"):
        main(["extract", state(run / "third", "000000050-0001"), str(out), "--kind", "exp_avg"])


def test_a_folder_that_is_neither_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"neither a state .* nor a run"):
        main(["show", f"file://{tmp_path}"])
    with pytest.raises(StateError, match="no training states"):
        main(["list", f"file://{tmp_path}"])
