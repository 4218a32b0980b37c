"""Shows the samples of one global batch: what to look at behind a loss spike.

    ddpm-inspect batch s3://bucket/digits --seed 0 --global-batch 128 --world 2 --step 1234

prints {"step": 1234, "epoch": 88, "ranks": [[key, …], …]}. Nothing is replayed. A sample that can't be decoded is
named on stderr, and the key of the one that the training took instead stands at its place. --streams,
--shuffle-block, --exclude and --index are the run's data.streams, data.shuffle_block, data.exclude_shards and
data.index; of a mix, give each URL=WEIGHT.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_dist import cli
from ddpm_dist.config import DataConfig
from ddpm_dist.data import BatchView, Pixels, share_of
from ddpm_dist.errors import ConfigError

GAP = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the batch's samples, and writes the picture where one is asked for."""
    args = parse(argv)
    if args.picture and not args.picture.absolute().parent.is_dir():
        raise ConfigError(f"--picture {args.picture}: there is no folder {args.picture.parent}; create it")
    if args.picture and args.picture.suffix.lower() != ".png":
        raise ConfigError(f"--picture {args.picture}: it is written as PNG; name it {args.picture.with_suffix('.png')}")
    for name, number in (("--world", args.world), ("--streams", args.streams or 1)):
        if args.global_batch % number:
            raise ConfigError(f"{name} {number} doesn't divide --global-batch {args.global_batch}")
    urls = dict(map(_weighted, args.urls))
    view = BatchView(
        urls,
        seed=args.seed,
        global_batch=args.global_batch,
        streams=args.streams,
        shuffle_block=args.shuffle_block,
        exclude=args.exclude,
        indexes=dict(_index_of(text, list(urls)) for text in args.index),
    )
    samples = view.samples(args.step)
    keys = [key for key, _ in samples]
    if args.picture:
        draw([image for _, image in samples], args.world, args.picture)
    shares = [share_of(rank, args.world, args.global_batch) for rank in range(args.world)]
    ranks = [keys[first:last] for first, last in shares]
    print(json.dumps({"step": args.step, "epoch": view.epoch(args.step), "ranks": ranks}))


def parse(argv: Sequence[str] | None) -> Any:
    """The arguments, checked one by one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("urls", nargs="+", metavar="DATA_URL")
    parser.add_argument("--seed", type=cli.seed, default=0, help="run.seed (default: %(default)s)")
    parser.add_argument("--global-batch", type=cli.positive, required=True, metavar="B", help="train.global_batch")
    parser.add_argument(
        "--streams", type=cli.positive, metavar="S", help="default: that of a new run; a run's config.yaml says its own"
    )
    parser.add_argument(
        "--shuffle-block",
        type=cli.positive,
        metavar="K",
        default=DataConfig.model_fields["shuffle_block"].default,
        help="default: %(default)s",
    )
    parser.add_argument("--exclude", nargs="*", default=(), metavar="SHARD", help="shards that the run leaves out")
    parser.add_argument(
        "--index",
        action="append",
        default=[],
        metavar="FOLDER",
        help="folder of the index, where it isn't with the shards; of a mix, DATA_URL=FOLDER for each such set",
    )
    parser.add_argument("--world", type=cli.positive, default=1, metavar="W", help="ranks (default: %(default)s)")
    parser.add_argument("--step", type=cli.count, required=True, metavar="N", help="the first is 0")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the batch, one row or more a rank")
    return parser.parse_intermixed_args(argv)


def draw(images: Sequence[Pixels], world: int, path: Path) -> None:
    """A picture of a batch of [H, W, 3] images: a block of rows for each rank."""
    side = max(max(image.shape[:2]) for image in images)
    share = len(images) // world
    columns = min(share, 16)
    rows = -(-share // columns)
    cell = side + GAP
    canvas = np.full((world * (rows * cell + 4 * GAP), columns * cell, 3), 255, np.uint8)
    for place, image in enumerate(images):
        rank, i = divmod(place, share)
        top = rank * (rows * cell + 4 * GAP) + i // columns * cell
        left = i % columns * cell
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    Image.fromarray(canvas).save(path, "PNG")


def _weighted(text: str) -> tuple[str, float]:
    """URL=WEIGHT, or a URL with weight 1."""
    url, equals, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not equals:
        return text, 1.0
    if not 0 < weight < math.inf:
        raise ConfigError(f"{text}: a weight above 0 is wanted")
    return url, weight


def _index_of(text: str, urls: Sequence[str]) -> tuple[str, str]:
    """(set, folder of its index) of FOLDER for the only set, or of DATA_URL=FOLDER."""
    url = next((url for url in urls if text.startswith(f"{url}=")), None)
    if url is not None:
        return url, text.removeprefix(f"{url}=")
    if len(urls) > 1:
        raise ConfigError(f"--index {text}: of which of {len(urls)} sets? Write DATA_URL=FOLDER")
    return urls[0], text
