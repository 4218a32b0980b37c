"""run.init_from: a new run that starts from what another one learnt (fine-tuning, branching).

From a snapshot come the EMA weights; from a training state come weights, moments, averages and the optimizer's
step count, so that a branch goes on as its origin would. Either way the new run counts its own steps from 0.
"""

import logging

import numpy as np
import torch

from ddpm_dist import snapshot, storage
from ddpm_dist.config import Config
from ddpm_dist.diffusion import GaussianDiffusion
from ddpm_dist.engine import Engine
from ddpm_dist.errors import ConfigError
from ddpm_dist.models import UNet, UNetConfig
from ddpm_dist.recipe import parse_config
from ddpm_dist.state import MANIFEST, newest_state, read_manifest, read_state
from ddpm_dist.training.ema import Ema
from ddpm_dist.training.run_folder import newest_snapshot

log = logging.getLogger(__name__)


def find_origin(url: str) -> str:
    """URL of the state or snapshot that `run.init_from` means: itself, or the newest one of a run's folder.

    Of a run that has both, the state is taken. Raises ConfigError if there is neither.
    """
    if any(storage.exists(storage.join(url, name)) for name in (MANIFEST, snapshot.INDEX)):
        return url
    found = newest_state(url) or newest_snapshot(url)
    if found is None:
        raise ConfigError(
            f"run.init_from: {storage.redact(url)} is neither a snapshot, nor a training state, nor the folder of a "
            "run that has one of them"
        )
    return found


def check_origin(cfg: Config) -> None:
    """Raises before any worker starts if run.init_from can't be what this run starts from."""
    if cfg.run.init_from is None:
        return
    origin = find_origin(cfg.run.init_from)
    if storage.exists(storage.join(origin, MANIFEST)):
        manifest = read_manifest(origin)
        theirs = {name: tuple(shape) for name, shape in manifest.shapes.items()}
        process = GaussianDiffusion.from_config(parse_config(manifest.meta["config"], source=origin).diffusion)
    else:
        theirs = _shapes(snapshot.network_in(origin))
        process = snapshot.diffusion_in(origin)
    ours = _shapes(snapshot.network_of(cfg))
    differing = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if differing:
        first = differing[0]
        raise ConfigError(
            f"run.init_from: the network of {storage.redact(origin)} is another one than model.* describes: "
            f"{len(differing)} parameters differ, the first is {first} "
            f"({theirs.get(first, 'absent')} there, {ours.get(first, 'absent')} here)"
        )
    _compare(process, GaussianDiffusion.from_config(cfg.diffusion))


def _compare(theirs: GaussianDiffusion, ours: GaussianDiffusion) -> None:
    """Says what the weights were trained for, if it isn't what they are going to be trained for."""
    if theirs.prediction != ours.prediction:
        log.warning("run.init_from: the weights predict %s, this run trains %s", theirs.prediction, ours.prediction)
    if theirs.variance != ours.variance:
        log.warning("run.init_from: the weights' variance is %s, this run's %s", theirs.variance, ours.variance)
    if theirs.timesteps != ours.timesteps or not np.allclose(theirs.betas, ours.betas, rtol=1e-6):
        log.warning("run.init_from: the weights were trained with another noise schedule than diffusion.* describes")


def init_from(url: str, engine: Engine, ema: Ema) -> None:
    """Fills masters and averages (and moments, from a state) in place; all ranks call it."""
    origin = find_origin(url)
    if storage.exists(storage.join(origin, MANIFEST)):
        manifest, _ = read_state(origin, engine, ema)
        engine.load_scalars(manifest.scalars)
    else:
        _from_snapshot(origin, engine)
        ema.reset()
    engine.sync_weights()
    log.info("run.init_from: weights of %s", storage.redact(origin))


def _from_snapshot(url: str, engine: Engine) -> None:
    network, _ = snapshot.load_snapshot(url)
    weights = dict(network.named_parameters())
    for piece in engine.pieces():
        flat = weights[piece.name].detach().view(-1)
        piece.weights.copy_(flat[piece.offset : piece.offset + piece.numel])


def _shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in UNet(config).named_parameters()}
