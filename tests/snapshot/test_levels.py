"""Snapshots of processes in continuous time: there and back, and that diffusers' own pipelines compute the same."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDPMPipeline, DiffusionPipeline

from ddpm_dist import rng
from ddpm_dist.config import SamplingConfig
from ddpm_dist.diffusion.continuous import ContinuousDiffusion
from ddpm_dist.diffusion.samplers import sample
from ddpm_dist.errors import SnapshotError
from ddpm_dist.snapshot import folder as snapshot, levels
from ddpm_dist.snapshot.recipes import keys_of_process
from tests.models.networks import random_unet, tiny_config

STEPS = 5


def save(folder: Path, diffusion: ContinuousDiffusion) -> str:
    unet = random_unet(tiny_config())
    snapshot.save_snapshot(folder.as_uri(), unet, unet.config, diffusion, {})
    return folder.as_uri()


def said(diffusion: ContinuousDiffusion) -> dict:
    return {name: value for name, value in vars(diffusion).items() if name != "path"} | vars(diffusion.path)


@pytest.mark.parametrize(
    "diffusion",
    [
        ContinuousDiffusion("edm"),
        ContinuousDiffusion("edm", variance="fixedsmall", sigma_min=0.01, sigma_max=50.0, sigma_data=0.3),
        ContinuousDiffusion("edm", "x_start"),
        ContinuousDiffusion("flow"),
        ContinuousDiffusion("flow", "edm", "fixedsmall", sigma_data=0.4),
    ],
    ids=lambda d: f"{d.name} {d.prediction} {d.variance}",
)
def test_a_continuous_process_comes_back(diffusion: ContinuousDiffusion, tmp_path: Path) -> None:
    url = save(tmp_path, diffusion)
    _, again = snapshot.load_snapshot(url)
    assert isinstance(again, ContinuousDiffusion)
    assert said(again) == said(diffusion)
    assert keys_of_process(again) == keys_of_process(diffusion)
    own = diffusion.prediction == levels.EXPECTED[diffusion.name]
    info = snapshot.load_info(url)
    assert info["portable"] == own
    assert own or "no prediction of" in info["not_portable_because"]
    assert not snapshot.notes_on(url)


@pytest.mark.parametrize(("name", "pipeline"), [("edm", ConsistencyModelPipeline), ("flow", DDPMPipeline)])
def test_diffusers_pipeline_computes_the_same(name: str, pipeline: type, tmp_path: Path) -> None:
    """Its own scheduler's steps on our noise, from its own grid; and the pipeline itself runs."""
    url = save(tmp_path, ContinuousDiffusion(name))
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe, pipeline)
    unet, diffusion = snapshot.load_snapshot(url)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    settings = SamplingConfig(sampler="euler", steps=STEPS, spacing="rho" if name == "edm" else "uniform", clip="none")
    ours = sample(unet, diffusion, settings, seed=0, indices=torch.arange(2), shape=shape)
    x = rng.normal(0, rng.Purpose.X_T, torch.arange(2), shape) * (80 if name == "edm" else 1)
    pipe.scheduler.set_timesteps(STEPS)
    for t in pipe.scheduler.timesteps:
        scaled = pipe.scheduler.scale_model_input(x, t) if name == "edm" else x
        with torch.no_grad():
            x = pipe.scheduler.step(pipe.unet(scaled, t).sample, t, x).prev_sample
    assert (x.clamp(-1, 1) - ours).abs().max() < 1e-5
    pipe.set_progress_bar_config(disable=True)
    assert pipe(batch_size=2, num_inference_steps=2, output_type="np").images.shape[0] == 2


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("edm", {"prediction_type": "v_prediction"}, "only epsilon, EDM's F, is known"),
        ("edm", {"sigma_data": "half"}, "sigma_data is 'half'; a number is needed"),
        ("edm", {"sigma_max": 0.001}, "0 < sigma_min < sigma_max"),
        ("flow", {"num_train_timesteps": 100}, "the network is told 1000 t here"),
        ("flow", {"_class_name": "FlowMatchLCMScheduler"}, "another process than this program's: flow matching"),
        ("edm", {"_class_name": "DdpmDistScheduler", "process": "vp"}, "'vp' is unknown; choose from ddpm, edm, flow"),
    ],
)
def test_what_is_not_known_is_refused(name: str, changes: dict, message: str, tmp_path: Path) -> None:
    url = save(tmp_path, ContinuousDiffusion(name))
    path = tmp_path / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text()) | changes
    with pytest.raises(SnapshotError, match=message):
        snapshot.from_diffusers(config, "scheduler_config.json")
    assert url


def test_how_a_file_samples_is_said() -> None:
    config = levels.to_diffusers(ContinuousDiffusion("flow")) | {"shift": 3.0, "_diffusers_version": "0.30"}
    assert levels.not_kept(config) == ["its scheduler's shift: 3.0"]
