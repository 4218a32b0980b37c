"""Weights of others -> a snapshot of ours: diffusers' folders, and files of torch.save, .safetensors and .npz.

    ddpm-convert file:///data/ddpm-cifar10-32 s3://bucket/weights/cifar10
    ddpm-convert file:///data/ema_diffusion_cifar10_model/model-790000.ckpt s3://bucket/weights/cifar10 --config cifar10
    ddpm-convert file:///data/256x256_diffusion_uncond.pt s3://bucket/weights/adm256 data.image_size=256 \\
        diffusion.timesteps=1000 diffusion.schedule=linear diffusion.prediction=eps model.head_channels=64 \\
        --qkv together

A pipeline of diffusers says itself what network it is. A file is recognised by its parameters' names, and what it
doesn't tell is asked for: as a recipe, or as single keys. docs/weights.md lists what is read.

The official TensorFlow checkpoints become an .npz where TensorFlow is installed:

    r = tf.train.load_checkpoint(path); np.savez(out, **{n: r.get_tensor(n) for n in r.get_variable_to_shape_map()})

What was written is read back and checked: the names and shapes of all weights, and the network's output on a
fixed input, of which four numbers are printed and saved. Compare them with a peer's by --checksum.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ddpm_dist import cli, rng, storage
from ddpm_dist.errors import ConfigError, SnapshotError
from ddpm_dist.models import UNet
from ddpm_dist.snapshot import (
    INDEX,
    Foreign,
    Told,
    in_cache,
    load_info,
    load_snapshot,
    notes_on,
    read_file,
    read_folder,
    read_npz,
    save_snapshot,
)

CHECKSUM_RTOL = 1e-3
"""Agreement asked of --checksum: float32 on another machine differs by about 1e-5."""


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the snapshot; ConfigError for a source that isn't understood, before anything is written."""
    args = _parser().parse_intermixed_args(argv)
    if args.source.rstrip("/") == args.destination.rstrip("/"):
        raise ConfigError(f"{args.destination}: source and destination are the same; give another folder")
    if storage.exists(storage.join(args.destination, INDEX)):
        raise ConfigError(
            f"{args.destination}: holds a snapshot already; give another folder, or delete that one first"
        )
    told = Told(args.config, tuple(args.overrides), args.weights, args.qkv)
    found, info = read(args.source, told)
    unet, diffusion = found.unet, found.diffusion
    timesteps = int(diffusion.path.last) + 1 if diffusion.discrete else 1000  # any will do, on either side
    expected = output_checksum(unet, timesteps)
    if not np.isfinite(expected).all():
        raise SnapshotError(f"{args.source}: the network's output on a fixed input is not finite; are its weights?")
    if args.checksum and not np.allclose(args.checksum, expected, rtol=CHECKSUM_RTOL, atol=1e-6):
        raise SnapshotError(f"{args.source}: output checksum {_show(expected)}; --checksum is {_show(args.checksum)}")
    info |= {"converted_from": storage.redact(args.source), "output_checksum": expected}
    save_snapshot(args.destination, unet, unet.config, diffusion, info)
    if output_checksum(load_snapshot(args.destination)[0], timesteps) != expected:
        raise SnapshotError(f"{args.destination}: what was written computes something else than what was read")
    count = sum(parameter.numel() for parameter in unet.parameters())
    print(f"{storage.redact(args.destination)}: {count:,} parameters, output checksum {_show(expected)}")


def read(source: str, told: Told) -> tuple[Foreign, dict[str, Any]]:
    """What a source holds, and what is known of it beside the weights; prints what isn't taken over."""
    source = in_cache(source)
    names = storage.list_names(source)  # of a folder
    if INDEX not in names:
        if names:
            found = read_folder(source, told)
        elif source.endswith(".npz"):
            found = read_npz(source, told)
        elif storage.exists(source):
            found = read_file(source, told)
        else:
            raise SnapshotError(f"{storage.redact(source)}: not a snapshot, and no file of weights: there is nothing")
        print(f"{storage.redact(source)}: {found.layout}, {found.kind or 'raw or averaged, it does not say'}")
        return found, {"kind": found.kind, "null_label": None}
    if told != Told():
        raise ConfigError(
            "--config, --weights, --qkv and overrides are for files that don't tell all; a snapshot or pipeline says "
            "itself what it holds"
        )
    for note in notes_on(source):
        print(f"not kept: {note}; here how to sample belongs to a job (`sampling.…`)")
    unet, diffusion = load_snapshot(source)
    info = load_info(source)
    kept = {key: info[key] for key in ("kind", "null_label", "config")}
    return Foreign(unet, diffusion, info["kind"], "diffusers' pipeline"), kept


@torch.no_grad()
def output_checksum(unet: UNet, timesteps: int) -> list[float]:
    """Mean, root mean square and two projections of the output on a fixed input of four images.

    Four numbers and not a hash, since the last bits of float32 differ between machines.
    """
    config, images = unet.config, 4
    indices = torch.arange(images)
    shape = (config.in_channels, config.sample_size, config.sample_size)
    x = rng.normal(0, rng.Purpose.X_T, indices, shape)
    t = torch.linspace(0, timesteps - 1, images).long()
    labels = None if config.num_class_embeds is None else indices % config.num_class_embeds
    out = unet.eval()(x, t, labels).double()
    along = rng.normal(0, rng.Purpose.REVERSE, indices, (2, *out.shape[1:])).double()
    projections = torch.einsum("bchw,bkchw->k", out, along) / out.numel() ** 0.5
    return [float(value) for value in (out.mean(), out.square().mean().sqrt(), *projections)]


def _show(checksum: Sequence[float]) -> str:
    return " ".join(f"{value:.5g}" for value in checksum)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="URL of a folder of diffusers, or of a file of weights")
    parser.add_argument("destination", help="URL of the snapshot's folder")
    cli.config_option(parser, "that says what a file doesn't tell")
    parser.add_argument("--weights", choices=("ema", "raw"), help="which of the weights; ema if there are both")
    parser.add_argument(
        "--qkv", choices=("together", "apart"), help="whether a head's q, k and v lie together (OpenAI)"
    )
    parser.add_argument("--checksum", type=float, nargs=4, metavar="NUMBER", help="what the output must give")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="the same, as single keys")
    return parser
