"""Weights of other programs: what a file or a folder holds, what it doesn't tell, and the network that it is of."""

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from ddpm_dist import storage
from ddpm_dist.diffusion import GaussianDiffusion, Process
from ddpm_dist.errors import ConfigError, NotFoundError, SnapshotError
from ddpm_dist.models import UNet, UNetConfig
from ddpm_dist.snapshot.files import parse_file, parse_json, read_weights, what_is_in
from ddpm_dist.snapshot.folder import empty
from ddpm_dist.snapshot.layouts import LAYOUTS, OTHERS, PESSER, PROCESS, Layout, split_heads, structure
from ddpm_dist.snapshot.names import from_official, load_into, modern_names
from ddpm_dist.snapshot.recipes import keys_of_network, network_of
from ddpm_dist.snapshot.scheduler import from_diffusers
from ddpm_dist.snapshot.told import Told

FEW = 8
"""Tensors that the smallest state dict of a network has; less is a buffer or a setting."""


@dataclass(frozen=True)
class Foreign:
    """A network and its process out of a foreign file."""

    unet: UNet
    diffusion: Process
    kind: str | None
    """ema, raw, or none where neither file nor user says."""
    layout: str


def read_file(url: str, told: Told) -> Foreign:
    """Recognises a file of weights (torch.save's, or .safetensors) and builds its network.

    Raises SnapshotError for files of other networks, and ConfigError naming all that the file doesn't tell.
    """
    place = storage.redact(url)
    layout, weights, kind = _choose(parse_file(storage.read(url), place), told.weights, place)
    try:
        ours = layout.rename(weights)
        facts = {**layout.tells_more(weights), **structure(ours), **layout.tells}
    except SnapshotError as error:
        raise SnapshotError(f"{place}: by its names of {layout.name}, but {error}") from None
    except (LookupError, ValueError) as error:
        raise SnapshotError(f"{place}: by its names of {layout.name}, but some are missing ({error})") from None
    cfg = told.config_of(facts, layout.asks, any(".to_qkv." in name for name in ours), url)
    network = network_of(cfg)
    rows = ours.get("class_embedding.weight")
    network = replace(network, num_class_embeds=None if rows is None else rows.shape[0]).checked()
    if any(".to_qkv." in name for name in ours):
        heads = {
            channels: network.attention_heads or channels // (network.attention_head_dim or channels)
            for channels in network.attention_channels
        }
        ours = split_heads(ours, heads, told.qkv != "apart")
    unet = empty(network)
    load_into(unet, ours, place)
    return Foreign(unet.eval(), GaussianDiffusion.from_config(cfg.diffusion), kind, layout.name)


def read_folder(url: str, told: Told) -> Foreign:
    """A network of diffusers without a pipeline around it: `unet/` or `unet_ema/` of a checkpoint, or three files.

    The process is that of a scheduler_config.json, if there is one, else what was told.
    """
    names, place = storage.list_names(url), storage.redact(url)
    folders = [folder for folder in ("unet_ema", "unet") if folder in names]
    if told.weights and len(folders) == 2:
        folders = ["unet_ema" if told.weights == "ema" else "unet"]
    folder = f"{folders[0]}/" if folders else ""

    def read(name: str) -> bytes:
        return storage.read(storage.join(url, name))

    try:
        config = parse_json(read(f"{folder}config.json"), f"{place}/{folder}config.json")
    except NotFoundError:
        raise SnapshotError(
            f"{place}: no {folder}config.json, so it isn't known what the weights compute; {what_is_in(url)}"
        ) from None
    network = UNetConfig.from_diffusers(config, f"{place}/{folder}config.json")
    diffusion = _process_in(url, told, network, read)
    name, weights = read_weights(url, (folder,), read)
    unet = empty(network)
    load_into(unet, modern_names(weights), f"{place}/{name}")
    kind = "ema" if "optimization_step" in config else "raw" if "unet_ema" in names else told.weights
    if told.weights not in (None, kind):
        raise SnapshotError(f"{place}/{folder}: --weights {told.weights}: it holds {kind} weights")
    return Foreign(unet.eval(), diffusion, kind, f"diffusers' {folder or 'network alone'}")


def _process_in(url: str, told: Told, network: UNetConfig, read: Callable[[str], bytes]) -> Process:
    for name in ("scheduler/scheduler_config.json", "scheduler_config.json"):
        source = f"{storage.redact(url)}/{name}"
        try:
            config = parse_json(read(name), source)
        except NotFoundError:
            continue
        if told.recipe or told.overrides:
            raise ConfigError(f"--config and overrides: {source} says itself what the process is; leave them out")
        return from_diffusers(config, source, network.learns_variance)
    facts = {"data.image_size": network.sample_size, **keys_of_network(network, network.sample_size)}
    facts |= {"diffusion.variance": "learned_range"} if network.learns_variance else {}
    return GaussianDiffusion.from_config(told.config_of(facts, PROCESS, False, url).diffusion)


OFFICIAL = {key: value for key, value in PESSER.tells.items() if key != "model.norm_groups"}
"""What the official code's network always is: the one that pesser's is, but for groups, which small ones vary."""


def read_npz(url: str, told: Told) -> Foreign:
    """The official code's variables as an .npz; what they don't tell comes from the recipe."""
    place = storage.redact(url)
    if told.recipe is None:
        raise ConfigError(f"--config: {place} doesn't say what network it is; give its recipe, such as cifar10")
    cfg = told.config_of(OFFICIAL, (), False, url)
    network, kind = network_of(cfg), told.weights or "ema"
    unet = empty(network)
    try:
        with np.load(io.BytesIO(storage.read(url)), allow_pickle=False) as arrays:
            variables = {name: arrays[name] for name in arrays.files}
        weights = from_official(variables, network, kind == "ema")
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile):
        raise SnapshotError(f"{place}: not an .npz of plain arrays of numbers, by name") from None
    load_into(unet, weights, place)
    return Foreign(unet.eval(), GaussianDiffusion.from_config(cfg.diffusion), kind, "the official code's variables")


def in_cache(url: str) -> str:
    """The folder itself, or of a Hugging Face cache (models--OWNER--NAME) the snapshot that its `main` names."""
    if not {"refs", "snapshots"} <= {*storage.list_names(url)}:
        return url
    try:
        return storage.join(url, "snapshots", storage.read(storage.join(url, "refs", "main")).decode().strip())
    except NotFoundError:
        raise SnapshotError(
            f"{storage.redact(url)}: a Hugging Face cache without refs/main; give one of its snapshots: "
            + ", ".join(storage.list_names(storage.join(url, "snapshots")))
        ) from None


def _choose(found: Any, wanted: str | None, place: str) -> tuple[Layout, dict[str, Tensor], str | None]:
    """The state dict that is meant, by its layout's names, and whether it is an average."""
    candidates: list[tuple[str, Layout, dict[str, Tensor], str | None]] = []
    for path, tensors in _state_dicts(found):
        for layout in LAYOUTS:
            for name in tensors:
                if name != layout.marker and not name.endswith(f".{layout.marker}"):
                    continue
                prefix = name.removesuffix(layout.marker)
                inside = {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}
                where = f"{path}{prefix}".rstrip(".")
                candidates.append((where, layout, inside, "ema" if _is_average(where) else None))
    if not candidates:
        raise SnapshotError(_unknown(found, place))
    if len(candidates) == 1:
        where, layout, tensors, kind = candidates[0]
        if kind is not None and wanted not in (None, kind):
            raise SnapshotError(f"{place}: --weights {wanted}: it holds {kind} weights alone ({where})")
        return layout, tensors, kind or wanted
    chosen = [one for one in candidates if (one[3] or "raw") == (wanted or "ema")]
    if len(chosen) != 1:
        listed = ", ".join(f"{where or 'itself'} ({kind or 'raw'})" for where, _, _, kind in candidates)
        raise SnapshotError(
            f"{place}: it holds several networks, and not one that is --weights {wanted or 'ema'}: {listed}; give "
            "--weights raw or ema, or save the one that is meant alone"
        )
    _, layout, tensors, kind = chosen[0]
    return layout, tensors, kind or "raw"


def _is_average(where: str) -> bool:
    return any(word in where.lower() for word in ("ema", "shadow", "average"))


def _state_dicts(found: Any, path: str = "", depth: int = 3) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(path with its dot, tensors by name) of each state dict in nested dicts and lists; optimizers have none."""
    items: list[tuple[Any, Any]] = []
    if isinstance(found, (Mapping, list)):
        items = list(found.items() if isinstance(found, Mapping) else enumerate(found))
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
    if len(tensors) >= FEW:
        yield path, tensors
    if depth:
        for name, value in items:
            # ermongroup/ddim saves [model, optimizer, epoch, step, average].
            label = "ema" if isinstance(found, list) and name == 4 else str(name)
            yield from _state_dicts(value, f"{path}{label}.", depth - 1)


def _unknown(found: Any, place: str) -> str:
    names = [name for _, tensors in _state_dicts(found) for name in tensors]
    for marker, whose in OTHERS.items():
        if any(name == marker or name.endswith(f".{marker}") for name in names):
            return f"{place}: of another network than this program's: {whose}; it can't be converted"
    if not names:
        return f"{place}: holds no state dict (tensors by name)"
    return (
        f"{place}: of a network that isn't known here; its first parameters are {', '.join(names[:3])}. Known are "
        + ", ".join(layout.name for layout in LAYOUTS)
    )
