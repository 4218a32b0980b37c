"""Weights of others -> a snapshot of ours: diffusers folders, and the official code's variables as an .npz.

    ddpm-convert file:///data/ddpm-cifar10-32 s3://bucket/weights/cifar10
    ddpm-convert file:///data/cifar10.npz s3://bucket/weights/cifar10 --config cifar10

A folder of diffusers says itself what network it is. An .npz doesn't: give the recipe it was trained with.
To make one from the official TensorFlow checkpoint, where TensorFlow is installed:

    r = tf.train.load_checkpoint(path); np.savez(out, **{n: r.get_tensor(n) for n in r.get_variable_to_shape_map()})

What was written is read back and checked: the names and shapes of all weights, and the network's output on a
fixed input, of which four numbers are printed and saved. Compare them with a peer's by --checksum.
"""

import argparse
import io
import zipfile
from collections.abc import Sequence

import numpy as np
import torch

from ddpm_dist import cli, rng, storage
from ddpm_dist.diffusion import GaussianDiffusion
from ddpm_dist.errors import ConfigError, SnapshotError
from ddpm_dist.models import UNet
from ddpm_dist.recipe import load_config
from ddpm_dist.snapshot import (
    INDEX,
    build,
    from_official,
    load_info,
    load_into,
    load_snapshot,
    not_kept_in,
    save_snapshot,
)

CHECKSUM_RTOL = 1e-3
"""Agreement asked of --checksum: float32 on another machine differs by about 1e-5."""


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_intermixed_args(argv)
    if args.source.rstrip("/") == args.destination.rstrip("/"):
        raise ConfigError(f"{args.destination}: source and destination are the same; give another folder")
    if storage.exists(storage.join(args.destination, INDEX)):
        raise ConfigError(
            f"{args.destination}: holds a snapshot already; give another folder, or delete that one first"
        )
    if args.source.endswith(".npz"):
        kind = args.weights or "ema"
        unet, diffusion = read_npz(args.source, args.config, args.overrides, kind == "ema")
        info = {"kind": kind, "null_label": None}
    else:
        if args.config or args.weights or args.overrides:
            raise ConfigError("--config, --weights and overrides are for an .npz; a folder says itself what it holds")
        unet, diffusion = load_snapshot(args.source)
        for name, value in not_kept_in(args.source).items():
            print(f"not kept: its scheduler's {name}: {value}; here how to sample belongs to a job (`sampling.…`)")
        info = {key: value for key, value in load_info(args.source).items() if key in ("kind", "null_label", "config")}
    expected = output_checksum(unet, diffusion.timesteps)
    if not np.isfinite(expected).all():
        raise SnapshotError(f"{args.source}: the network's output on a fixed input is not finite; are its weights?")
    if args.checksum and not np.allclose(args.checksum, expected, rtol=CHECKSUM_RTOL, atol=1e-6):
        raise SnapshotError(f"{args.source}: output checksum {_show(expected)}; --checksum is {_show(args.checksum)}")
    info |= {"converted_from": storage.redact(args.source), "output_checksum": expected}
    save_snapshot(args.destination, unet, unet.config, diffusion, info)
    if output_checksum(load_snapshot(args.destination)[0], diffusion.timesteps) != expected:
        raise SnapshotError(f"{args.destination}: what was written computes something else than what was read")
    count = sum(parameter.numel() for parameter in unet.parameters())
    print(f"{storage.redact(args.destination)}: {count:,} parameters, output checksum {_show(expected)}")


def read_npz(url: str, recipe: str | None, overrides: Sequence[str], ema: bool) -> tuple[UNet, GaussianDiffusion]:
    """Network and process of the official code's variables; what they don't tell comes from the recipe."""
    if recipe is None:
        raise ConfigError(f"--config: {url} doesn't say what network it is; give its recipe, such as cifar10")
    unet, diffusion = build(load_config(recipe, overrides))
    try:
        with np.load(io.BytesIO(storage.read(url)), allow_pickle=False) as arrays:
            variables = {name: arrays[name] for name in arrays.files}
        weights = from_official(variables, unet.config, ema)
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile):
        raise SnapshotError(f"{storage.redact(url)}: not an .npz of plain arrays of numbers, by name") from None
    load_into(unet, weights, storage.redact(url))
    return unet.eval(), diffusion


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
    parser.add_argument("source", help="URL of a diffusers folder or of an .npz")
    parser.add_argument("destination", help="URL of the snapshot's folder")
    cli.config_option(parser, "of an .npz")
    parser.add_argument("--weights", choices=("ema", "raw"), help="which variables of an .npz; ema if not given")
    parser.add_argument("--checksum", type=float, nargs=4, metavar="NUMBER", help="what the output must give")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of --config")
    return parser
