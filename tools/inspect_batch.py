"""Shows the samples of one global batch: what to look at behind a loss spike.

    tools/inspect_batch.py s3://bucket/digits --seed 0 --global-batch 128 --world 2 --step 1234

prints {"step": 1234, "epoch": 88, "ranks": [[key, …], …]}. Nothing is replayed. --streams, --shuffle-block and
--exclude are the run's data.streams, data.shuffle_block and data.exclude_shards; of a mix, give each URL=WEIGHT.
"""

if __name__ == "__main__":
    from ddpm_dist import interrupt

    interrupt.leave_quietly()

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_dist import cli
from ddpm_dist.config import DataConfig, default_streams
from ddpm_dist.data.decode import BadSampleError, Pixels, decode
from ddpm_dist.data.fetch import Sample, ShardReader
from ddpm_dist.data.loader import open_urls
from ddpm_dist.data.order import Order, share_of
from ddpm_dist.errors import ConfigError

THREADS = 16
GAP = 2
BAD_COLOUR = (255, 0, 0)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.picture and not args.picture.absolute().parent.is_dir():
        raise ConfigError(f"--picture {args.picture}: there is no folder {args.picture.parent}; create it")
    if args.global_batch % args.world:
        raise ConfigError(f"--world {args.world} doesn't divide --global-batch {args.global_batch}")
    indexes, weights = open_urls(dict(map(_weighted, args.urls)), args.exclude)
    order = Order(
        [index.counts for index in indexes],
        seed=args.seed,
        global_batch=args.global_batch,
        streams=args.streams or default_streams(args.global_batch),
        shuffle_block=args.shuffle_block,
        weights=weights,
    )
    readers = [ShardReader(index) for index in indexes]
    found = order.at(args.step)
    places = list(zip(found.set.tolist(), found.shard.tolist(), found.sample.tolist(), strict=True))
    with ThreadPoolExecutor(THREADS) as pool:
        keys = list(pool.map(lambda place: readers[place[0]].table(place[1]).key(place[2]), places))
        if args.picture:
            samples = list(pool.map(lambda place: readers[place[0]].sample(place[1], place[2]), places))
            draw(samples, args.world, args.picture)
    shares = [share_of(rank, args.world, args.global_batch) for rank in range(args.world)]
    ranks = [keys[first:last] for first, last in shares]
    print(json.dumps({"step": args.step, "epoch": order.epoch(args.step), "ranks": ranks}))


def parse(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("urls", nargs="+", metavar="DATA_URL")
    parser.add_argument("--seed", type=cli.seed, default=0, help="run.seed")
    parser.add_argument("--global-batch", type=cli.positive, required=True, metavar="B")
    parser.add_argument("--streams", type=cli.positive, metavar="S")
    parser.add_argument(
        "--shuffle-block", type=int, metavar="K", default=DataConfig.model_fields["shuffle_block"].default
    )
    parser.add_argument("--exclude", nargs="*", default=(), metavar="SHARD")
    parser.add_argument("--world", type=cli.positive, default=1, metavar="W")
    parser.add_argument("--step", type=cli.count, required=True, metavar="N")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the batch, one row or more a rank")
    return parser.parse_intermixed_args(argv)


def draw(samples: Sequence[Sample], world: int, path: Path) -> None:
    """A picture of a batch: a block of rows for each rank; what can't be decoded is red."""
    images = [_picture_of(sample) for sample in samples]
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


def _picture_of(sample: Sample) -> Pixels:
    try:
        return decode(sample.image, None, 3)
    except BadSampleError:
        return np.full((32, 32, 3), BAD_COLOUR, np.uint8)


def _weighted(text: str) -> tuple[str, float]:
    """URL=WEIGHT, or a URL with weight 1."""
    url, equals, weight = text.rpartition("=")
    try:
        return (url, float(weight)) if equals else (text, 1.0)
    except ValueError:
        return text, 1.0


if __name__ == "__main__":
    cli.run(main)
