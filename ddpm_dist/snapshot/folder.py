"""Snapshots: a network and its diffusion process as a folder that diffusers' `DDPMPipeline` opens.

    model_index.json                                  published last: a folder without it is no snapshot
    unet/config.json                                  UNet2DModel's settings, every one spelled out
    unet/diffusion_pytorch_model.safetensors          float32
    scheduler/scheduler_config.json                   betas, prediction, reverse variance
    ddpm_dist.json                                    ours: step, images seen, null class, sizes and hashes, …

What diffusers can't express (x_prev; a variance that is learned without a range) is written the same way but
names classes that it hasn't, so that it refuses instead of computing something else. The bytes are a function
of what is saved.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.diffusion import Process, make_process
from ddpm_dist.errors import NotFoundError, SnapshotError
from ddpm_dist.models import UNet, UNetConfig, current_keys, unknown_keys
from ddpm_dist.snapshot.files import STEM, parse_json, read_weights, what_is_in
from ddpm_dist.snapshot.names import load_into, modern_names
from ddpm_dist.snapshot.recipes import LEARNED, network_of
from ddpm_dist.snapshot.scheduler import from_diffusers, not_kept, pipeline_class, portable, to_diffusers

INDEX = "model_index.json"
OURS = "ddpm_dist.json"
UNET_CONFIG = "unet/config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
FORMAT = 1


def build(cfg: Config) -> tuple[UNet, Process]:
    """The untrained network of a recipe, drawn from run.seed, and its diffusion process.

    model.channels_last and model.compile are left to the engine, as they are about how the network is called.
    """
    unet = UNet(network_of(cfg)).checkpoint(cfg.model.checkpoint_levels).initialize(cfg.run.seed)
    return unet, make_process(cfg.diffusion)


def network_in(url: str) -> UNetConfig:
    """The network of a snapshot, by its config alone."""
    read_index(url)
    name, data = _read_one(url, UNET_CONFIG, "config.json", sums={})
    return UNetConfig.from_diffusers(parse_json(data, f"{storage.redact(url)}/{name}"), f"{storage.redact(url)}/{name}")


def diffusion_in(url: str) -> Process:
    """The diffusion process of a snapshot, without its weights."""
    return from_diffusers(*_scheduler_in(url), network_in(url).learns_variance)


def notes_on(url: str) -> list[str]:
    """What a folder of diffusers says that isn't taken over: how to sample, and settings that are unknown here."""
    name, data = _read_one(url, UNET_CONFIG, "config.json", sums={})
    unknown = unknown_keys(parse_json(data, f"{storage.redact(url)}/{name}"))
    found = [f"its network's {key}: {value}, which is unknown here" for key, value in unknown.items()]
    return not_kept(_scheduler_in(url)[0]) + found


def _scheduler_in(url: str) -> tuple[dict[str, Any], str]:
    read_index(url)
    name, data = _read_one(url, SCHEDULER_CONFIG, "scheduler_config.json", sums={})
    return parse_json(data, f"{storage.redact(url)}/{name}"), f"{storage.redact(url)}/{name}"


def save_snapshot(
    url: str,
    weights: UNet | Mapping[str, Tensor],
    unet_config: UNetConfig,
    diffusion: Process,
    info: Mapping[str, Any],
    may_publish: Callable[[], None] = lambda: None,
) -> None:
    """Publishes a snapshot at a folder's URL; readers see all of it or none.

    weights: the network or its state dict, of any float type; stored as float32.
    info: plain JSON values for `load_info`, such as step, images_seen, kind ("ema" or "raw") and config (YAML).
    may_publish: called before each write; raises if the folder belongs to somebody else by now.
    `null_label` among them names the null class; without it, it is the last row of the class embedding.
    """
    state = weights.state_dict() if isinstance(weights, UNet) else weights
    _check_weights(state, unet_config, url)
    tensors = {name: state[name].detach().to("cpu", torch.float32).contiguous() for name in sorted(state)}
    why_not = portable(diffusion) or unet_config.portable
    files = {
        UNET_CONFIG: _json(unet_config.to_diffusers()),
        WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        SCHEDULER_CONFIG: _json(to_diffusers(diffusion)),
    }
    classes = unet_config.num_class_embeds
    null_label = info.get("null_label", None if classes is None else classes - 1)
    ours = {
        **info,
        "null_label": null_label,
        "num_classes": classes if null_label is None else null_label,
        "image_size": unet_config.sample_size,
        "channels": unet_config.in_channels,
        "portable": why_not is None,
        "not_portable_because": why_not,
        "format": FORMAT,
        "files": {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()},
    }
    pipeline = {
        "_class_name": pipeline_class(diffusion) if why_not is None else "DdpmDistPipeline",
        "scheduler": ["diffusers" if why_not is None else "ddpm_dist", to_diffusers(diffusion)["_class_name"]],
        "unet": ["diffusers", unet_config.to_diffusers()["_class_name"]],
    }
    may_publish()
    _retire(url, ours["files"])
    for name, data in {**files, OURS: _json(ours), INDEX: _json(pipeline)}.items():
        may_publish()
        storage.publish(storage.join(url, name), data)


def load_snapshot(url: str) -> tuple[UNet, Process]:
    """Network (float32, in evaluation mode) and diffusion process of a folder that we or diffusers wrote.

    Raises SnapshotError if it isn't a snapshot, if a file is damaged, or if config and weights don't fit.
    """
    read_index(url)
    place = storage.redact(url)
    sums = load_info(url)["files"]
    config_name, config_bytes = _read_one(url, UNET_CONFIG, "config.json", sums=sums)
    weights_name, weights = read_weights(url, ("unet/", ""), lambda name: _read(url, name, sums))
    scheduler_name, scheduler_bytes = _read_one(url, SCHEDULER_CONFIG, "scheduler_config.json", sums=sums)
    config = UNetConfig.from_diffusers(parse_json(config_bytes, f"{place}/{config_name}"), f"{place}/{config_name}")
    scheduler = parse_json(scheduler_bytes, f"{place}/{scheduler_name}")
    diffusion = from_diffusers(scheduler, f"{place}/{scheduler_name}", config.learns_variance)
    outputs = config.in_channels * (2 if diffusion.variance in LEARNED else 1)
    if config.out_channels != outputs:
        raise SnapshotError(
            f"{place}/{config_name}: out_channels is {config.out_channels}, but {scheduler_name} has a variance "
            f"({diffusion.variance}) for which the network gives {outputs}"
        )
    unet = empty(config)
    load_into(unet, modern_names(weights), f"{place}/{weights_name}")
    return unet.eval(), diffusion


def empty(config: UNetConfig) -> UNet:
    """The network without weights: what is in its memory."""
    with torch.device("meta"):
        unet = UNet(config)
    return unet.to_empty(device="cpu")


def load_info(url: str) -> dict[str, Any]:
    """What is known of a snapshot: step, images_seen, kind, config, image_size, channels, num_classes, null_label,
    portable, files.

    num_classes: without the null class; None for an unconditional network. For a folder of diffusers, which knows none
    of these but shape and classes, they are None (and files is empty).
    """
    read_index(url)
    unknown = dict.fromkeys(("step", "images_seen", "kind", "config", "null_label"))
    try:
        ours = parse_json(storage.read(storage.join(url, OURS)), storage.redact(storage.join(url, OURS)))
    except NotFoundError:
        return {**unknown, **_info_of_diffusers(url), "portable": True, "not_portable_because": None, "files": {}}
    if ours.get("format") != FORMAT:
        raise SnapshotError(
            f"{storage.redact(url)}/{OURS}: format {ours.get('format')!r}; this version reads {FORMAT}, a newer one may"
        )
    missing = [key for key in ("image_size", "channels", "files") if key not in ours]
    if missing:
        raise SnapshotError(f"{storage.redact(url)}/{OURS}: damaged, it has no {missing[0]}")
    return {**unknown, "num_classes": ours.get("null_label"), **ours}


def _info_of_diffusers(url: str) -> dict[str, Any]:
    name, data = _read_one(url, UNET_CONFIG, "config.json", sums={})
    theirs = current_keys(parse_json(data, f"{storage.redact(url)}/{name}"))
    found = {"image_size": theirs.get("sample_size"), "channels": theirs.get("in_channels")}
    if not all(isinstance(value, int) for value in found.values()):
        raise SnapshotError(
            f"{storage.redact(url)}/{name}: sample_size is {found['image_size']!r} and in_channels "
            f"{found['channels']!r}; images are square, both are whole numbers"
        )
    return {**found, "num_classes": theirs.get("num_class_embeds")}


def snapshot_id(url: str) -> str:
    """SHA-256 (hex) of what samples depend on: network, weights, process and null class; not where or when.

    Ours is computed from the recorded hashes, which `load_snapshot` checks; of a foreign folder, all is read.
    """
    info = load_info(url)
    sums = {name: entry["sha256"] for name, entry in info["files"].items()}
    if not sums:
        relevant = ("config.json", ".safetensors", ".bin")
        names = [name for name in storage.list_objects(url) if name.endswith(relevant)]
        sums = {name: _sha256(storage.read(storage.join(url, name))) for name in names}
    return _sha256(_json({"files": sums, "null_label": info["null_label"]}))


FILES = (".bin", ".ckpt", ".npz", ".pt", ".pth", ".safetensors")
"""Endings of files of weights."""


def check_folder(url: str) -> str:
    """The URL itself; SnapshotError if it is that of a file of weights."""
    if url.lower().endswith(FILES):
        raise SnapshotError(f"{storage.redact(url)}: a file and no snapshot; ddpm-convert makes one of it")
    return url


def read_index(url: str) -> dict[str, Any]:
    """model_index.json; SnapshotError if there is none, as then the folder is not a (whole) snapshot."""
    check_folder(url)
    try:
        data = storage.read(storage.join(url, INDEX))
    except NotFoundError:
        raise SnapshotError(
            f"{storage.redact(url)}: not a snapshot, it has no {INDEX} (which is written last); {_instead(url)}"
        ) from None
    return parse_json(data, f"{storage.redact(url)}/{INDEX}")


def _check_weights(state: Mapping[str, Tensor], config: UNetConfig, url: str) -> None:
    """What is written can be read again: SnapshotError if the weights aren't those of the network."""
    with torch.device("meta"):
        wanted = {name: parameter.shape for name, parameter in UNet(config).state_dict().items()}
    wrong = sorted(n for n in wanted.keys() | state.keys() if n not in state or wanted.get(n) != state[n].shape)
    if wrong:
        raise SnapshotError(
            f"{storage.redact(url)}: not written: the weights are not those of the network that is described; "
            f"{len(wrong)} differ, the first is {wrong[0]}"
        )


def _retire(url: str, files: Mapping[str, Any]) -> None:
    """Withdraws the index of a snapshot with other contents, so that nobody reads a mixture of both.

    One with the same contents stays in force while a resumed run publishes it again.
    """
    try:
        unchanged = load_info(url)["files"] == files
    except SnapshotError:
        unchanged = False
    if not unchanged:
        storage.delete(storage.join(url, INDEX))


def _instead(url: str) -> str:
    """What to give where a folder isn't a snapshot, by what is in it."""
    names = storage.list_names(url)
    if {"refs", "snapshots"} <= {*names}:
        inner = storage.list_names(storage.join(url, "snapshots"))
        return f"it is a Hugging Face cache: give {storage.redact(storage.join(url, 'snapshots', (inner or ['…'])[0]))}"
    if any(name in ("unet", "unet_ema", "config.json") or name.startswith(STEM) for name in names):
        return f"{what_is_in(url)}; ddpm-convert makes a snapshot of it"
    return "give a folder such as <run.url>/snapshots/<name>"


def _read(url: str, name: str, sums: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A file's bytes; its hash is checked if one is recorded."""
    data = storage.read(storage.join(url, name))
    if name in sums and sums[name]["sha256"] != _sha256(data):
        raise SnapshotError(f"{storage.redact(url)}/{name}: damaged, its SHA-256 is not the one in {OURS}")
    return data


def _read_one(url: str, *names: str, sums: Mapping[str, Mapping[str, Any]]) -> tuple[str, bytes]:
    """(name, bytes) of the first of these files that exists."""
    for name in names:
        try:
            return name, _read(url, name, sums)
        except NotFoundError:
            continue
    raise SnapshotError(f"{storage.redact(url)}: has neither of {', '.join(names)}; {what_is_in(url)}")


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
