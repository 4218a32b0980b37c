"""run.init_from: a new run that starts from what another one learnt (fine-tuning, branching).

From a snapshot come the EMA weights; from a training state come weights, moments, averages with their clock, and the
optimizer's step count, so that a branch goes on as its origin would. Either way the new run counts its own steps from
0. Where the new run's task is another one (`fit`), a state gives its average alone, as a snapshot does.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_dist import snapshot, storage
from ddpm_dist.config import Config
from ddpm_dist.diffusion import make_process
from ddpm_dist.engine import Engine, World, broadcast_object
from ddpm_dist.errors import ConfigError
from ddpm_dist.models import UNet, UNetConfig
from ddpm_dist.recipe import parse_config
from ddpm_dist.snapshot import Task
from ddpm_dist.state import MANIFEST, Manifest, newest_state, read_full, read_manifest, read_state
from ddpm_dist.training.ema import MAIN, Ema, power_label
from ddpm_dist.training.run_folder import newest_snapshot
from ddpm_dist.training.saved import binding_config, saved_config, with_streams

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """What run.init_from names, without its weights."""

    url: str
    task: Task
    dropout: float
    manifest: Manifest | None
    """Of a training state; none for a snapshot."""

    @property
    def place(self) -> str:
        return storage.redact(self.url)


def resolve(cfg: Config) -> Config:
    """The recipe with what it leaves open: data.streams as the run in its folder has it, or the default's number; of
    model and diffusion what run.init_from has.

    Before any worker starts. Raises ConfigError for an origin that is none, and for each difference that isn't meant.
    A run that has a state of its own goes on without its origin.
    """
    storage.check_access(cfg.run.url, "run.url")
    cfg = _like_origin(cfg)
    return with_streams(cfg, binding_config(cfg.run.url)) if cfg.data.streams is None else cfg


def _like_origin(cfg: Config) -> Config:
    if cfg.run.init_from is None:
        if cfg.run.init_changes:
            raise ConfigError("run.init_changes: names differences from run.init_from, which isn't given")
        return cfg
    if newest_state(cfg.run.url) is not None:
        saved = saved_config(cfg.run.url)
        assert saved is not None, "a state holds its configuration"
        return snapshot.open_keys_of(cfg, saved)
    origin = _read(find_origin(cfg.run.init_from), cfg)
    snapshot.check_describable(origin.task.network, origin.place)
    told = snapshot.keys_of_network(origin.task.network, cfg.data.image_size)
    told |= snapshot.keys_of_process(origin.task.diffusion)
    if origin.task.classes is not None and "num_classes" not in cfg.model.model_fields_set:
        told["model.num_classes"] = origin.task.classes
    unknown = sorted({*cfg.run.init_changes} - told.keys())
    if unknown:
        raise ConfigError(f"run.init_changes: {unknown[0]} is not among what is compared: {', '.join(sorted(told))}")
    if origin.manifest is None:
        for note in snapshot.notes_on(origin.url):
            log.info("run.init_from: not kept: %s", note)
    resolved = snapshot.reconcile(cfg, told, origin.place, cfg.run.init_changes)
    changes = snapshot.changes(origin.task, task_of(resolved))
    for change in changes:
        log.info("run.init_from: %s", change)
    snapshot.fit(_shapes(origin.task.network), origin.task, task_of(resolved))
    if origin.manifest is not None and changes:
        log.info("run.init_from: the task is another one, so the state's average is taken, and moments begin anew")
    elif origin.manifest is not None:
        _check_averages(origin, origin.manifest, resolved)
    if origin.dropout != resolved.model.dropout:
        log.info("run.init_from: model.dropout: %s there, %s here", origin.dropout, resolved.model.dropout)
    return resolved


def find_origin(url: str) -> str:
    """URL of the state or snapshot that `run.init_from` means: itself, or the newest one of a run's folder.

    Of a run that has both, the state is taken. Raises ConfigError if there is neither.
    """
    snapshot.check_folder(url)
    if any(storage.exists(storage.join(url, name)) for name in (MANIFEST, snapshot.INDEX)):
        return url
    found = newest_state(url) or newest_snapshot(url)
    if found is None:
        raise ConfigError(
            f"run.init_from: {storage.redact(url)} is neither a snapshot, nor a training state, nor the folder of a "
            "run that has one of them; weights of other programs become a snapshot by ddpm-convert"
        )
    return found


def init_from(url: str, cfg: Config, world: World, engine: Engine, ema: Ema) -> None:
    """Fills masters and averages (and moments, from a state) in place; all ranks call it."""
    # The first rank reads: while a run that goes on is the origin, its newest state isn't the same for all.
    origin = broadcast_object(world, _read(find_origin(url), cfg) if world.is_first else None)
    ours = task_of(cfg)
    if origin.manifest is not None and not snapshot.changes(origin.task, ours):
        read_state(origin.url, origin.manifest, engine, ema)
        engine.load_scalars(origin.manifest.scalars)
        ema.clock = origin.manifest.meta["step"] + origin.manifest.meta.get("ema_clock", 0)
    else:
        weights = snapshot.fit(_weights(origin), origin.task, ours)
        for piece in engine.pieces():
            flat = weights[piece.name].detach().reshape(-1)
            piece.weights.copy_(flat[piece.offset : piece.offset + piece.numel])
        ema.reset()
    engine.sync_weights()
    log.info("run.init_from: weights of %s", origin.place)


def task_of(cfg: Config) -> Task:
    """What the network of a recipe does."""
    return Task(snapshot.network_of(cfg), make_process(cfg.diffusion), cfg.model.num_classes)


def _read(url: str, cfg: Config) -> Origin:
    if storage.exists(storage.join(url, MANIFEST)):
        manifest = read_manifest(url)
        theirs = parse_config(manifest.meta["config"], source=url)
        return Origin(url, task_of(theirs), theirs.model.dropout, manifest)
    network, null_label = snapshot.network_in(url), snapshot.load_info(url)["null_label"]
    rows = network.num_class_embeds
    if null_label is None and rows is not None and cfg.model.num_classes == rows - 1:
        null_label = rows - 1
        log.info("run.init_from: of the %d rows for classes of %s, the last is taken for no class", rows, url)
    return Origin(url, Task(network, snapshot.diffusion_in(url), null_label), network.dropout, None)


def _check_averages(origin: Origin, manifest: Manifest, cfg: Config) -> None:
    """ConfigError for averages that the state hasn't: one with a power profile can't begin in the middle."""
    missing = [std for std in cfg.ema.power if power_label(std) not in manifest.kinds]
    if missing:
        kept = [kind.removeprefix("power-") for kind in manifest.kinds if kind.startswith("power-")]
        raise ConfigError(
            f"ema.power: {list(cfg.ema.power)}: the state {origin.place} keeps averages of the widths "
            f"[{', '.join(kept)}], not of {missing}, and such an average can't begin in the middle; use "
            f"ema.power=[{', '.join(kept)}], or begin from a snapshot of that run"
        )


def _weights(origin: Origin) -> dict[str, Tensor]:
    if origin.manifest is not None:
        return dict(read_full(origin.url, origin.manifest, MAIN))
    return dict(snapshot.load_snapshot(origin.url)[0].named_parameters())


def _shapes(network: UNetConfig) -> dict[str, Tensor]:
    """Parameters without memory."""
    with torch.device("meta"):
        return dict(UNet(network).named_parameters())
