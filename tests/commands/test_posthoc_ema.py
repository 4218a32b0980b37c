"""tools/posthoc_ema.py: the average that it makes of a run's stored ones is the one taken directly."""

from pathlib import Path

import pytest
import torch

from ddpm_dist import storage
from ddpm_dist.commands.posthoc_ema import main
from ddpm_dist.engine.pieces import Piece
from ddpm_dist.errors import ConfigError, SnapshotError
from ddpm_dist.recipe import validate
from ddpm_dist.snapshot import build, load_info, load_snapshot, save_snapshot
from ddpm_dist.training.ema import Ema, power_label

STEPS, EVERY, WANTED = 300, 50, 0.08
BATCH = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, torch.Tensor]]:
    """(URL of a run that stored averages of widths 0.05 and 0.1, the average of width 0.08 taken in it)."""
    url = f"file://{tmp_path_factory.mktemp('run')}"
    model = {"channels": 8, "channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": [], "norm_groups": 4}
    sections = {
        "run": {"url": url},
        "data": {"url": "memory://data", "image_size": 8},
        "model": model,
        "train": {"steps": STEPS, "global_batch": BATCH},
        "ema": {"power": [0.05, 0.1, WANTED]},
    }
    cfg = validate(sections, "test")
    network, diffusion = build(cfg)
    weights = {name: p.detach() for name, p in network.named_parameters()}
    pieces = [
        Piece(name, p.shape, 0, p.view(-1), torch.zeros(p.numel()), torch.zeros(p.numel()))
        for name, p in weights.items()
    ]
    ema = Ema(pieces, cfg)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for weight in weights.values():
            weight += torch.randn(weight.shape, generator=generator) / (1 + step) ** 0.5
        ema.update(step, BATCH)
        if (step + 1) % EVERY == 0:
            for std in (0.05, 0.1):
                folder = storage.join(url, "averages", power_label(std), f"{step + 1:09d}")
                info = {"step": step + 1, "images_seen": (step + 1) * BATCH, "kind": power_label(std)}
                save_snapshot(folder, averages(ema, std, weights), network.config, diffusion, info)
    return url, averages(ema, WANTED, weights)


def averages(ema: Ema, std: float, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = ema.averages[power_label(std)]
    return {name: flat.view(w.shape).clone() for (name, w), flat in zip(weights.items(), found, strict=True)}


def test_the_average_made_is_near_the_average_taken(
    run: tuple[str, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, taken = run
    out = f"file://{tmp_path}/out"
    main([url, str(WANTED), out])
    made, _ = load_snapshot(out)
    nearest, _ = load_snapshot(storage.join(url, "averages", "power-0.100", f"{STEPS:09d}"))

    def error(network: torch.nn.Module) -> float:
        state = network.state_dict()
        return sum(float((state[name] - taken[name]).square().sum()) for name in taken) ** 0.5

    assert error(made) < 0.2 * error(nearest)
    info = load_info(out)
    assert (info["step"], info["images_seen"]) == (STEPS, STEPS * BATCH)
    assert info["kind"] == "power-0.080 after the run"
    assert "std 0.08 at step 300" in capsys.readouterr().out


def test_an_average_may_end_earlier_but_not_later_than_what_is_stored(
    run: tuple[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    out = f"file://{tmp_path}/out"
    main([run[0], "0.1", out, "--step", "200"])
    made, _ = load_snapshot(out)
    stored, _ = load_snapshot(storage.join(run[0], "averages", "power-0.100", "000000200"))
    expected = stored.state_dict()
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="--step 400: the run's last stored average is of step 300"):
        main([run[0], "0.1", out, "--step", "400"])
    with pytest.raises(ConfigError, match=r"std: 0\.5"):
        main([run[0], "0.5", out])
    for step in ("0", "-5"):
        with pytest.raises(SystemExit):
            main([run[0], "0.1", out, f"--step={step}"])


def test_a_run_without_power_averages_is_told_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"no power averages; set ema\.power"):
        main([f"file://{tmp_path}", "0.1", f"file://{tmp_path}/out"])
