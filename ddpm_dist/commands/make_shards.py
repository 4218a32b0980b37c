"""Writes a data set: WebDataset shards and their index, at any URL.

    ddpm-shards make digits s3://bucket/digits
    ddpm-shards make fashion-mnist --split test file:///data/fashion-test
    ddpm-shards make emoji --split heldout s3://bucket/emoji-heldout
    ddpm-shards make cifar10 cifar-10-python.tar.gz s3://bucket/cifar10
    ddpm-shards make folder photos --size 256 --format jpeg s3://bucket/photos256
    ddpm-shards make folder imagenet/ --split train s3://bucket/imagenet
    ddpm-shards make npz mnist.npz --images x_train --labels y_train s3://bucket/mnist
    ddpm-shards make parquet s3://bucket/imagenet-parquet --size 256 --ray 64 s3://bucket/imagenet256

Started again after a kill, it makes what is missing. It never overwrites.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from functools import partial

from ddpm_dist import cli, storage
from ddpm_dist.config import ClusterConfig
from ddpm_dist.data import SOURCES, Reading, SourceOptions
from ddpm_dist.data.build import Made, Plan, ShardMaker, build, make_plan, run_in_processes

SMALL = 5000
"""Samples up to which starting processes costs more than they save."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked one by one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("kind", choices=list(SOURCES), help="what the input is")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="files, folders or URLs of the input")
    parser.add_argument("url", metavar="URL", help="folder of the new data set, such as s3://bucket/name")
    parser.add_argument(
        "--split",
        metavar="PART",
        help='part of a data set that is published in parts, such as train, val, test, or "all"; where parts lie side '
        "by side in the input, it has to be said (cifar10, fashion-mnist, emoji: default train)",
    )
    parser.add_argument(
        "--images",
        metavar="NAME",
        help="npz, parquet: array or column of the images (default: images, arr_0; image, img)",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE|NAME",
        help='for files: a CSV of file,class, a JSON {file: class}, or "folders"; for idx, its labels file; for npz '
        'and parquet, the array or column; or "none" (default: what the input says: dataset.json, folders, labels)',
    )
    parser.add_argument(
        "--sparse-labels",
        choices=Reading.SPARSE,
        help="class numbers with big gaps: keep them, or take them for names of classes",
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="files to take, by their path below INPUT; * matches / as well (may stand several times)",
    )
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="files to leave out")
    parser.add_argument(
        "--index", metavar="URL", help="for webdataset: folder of the input's index (default: with its shards)"
    )
    parser.add_argument(
        "--size",
        type=cli.positive,
        metavar="PIXELS",
        help="resize and centre-crop to this height and width (default: as they are; emoji: 32)",
    )
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), help="convert to grey or RGB (default: grey stays grey, all else RGB)"
    )
    parser.add_argument(
        "--format",
        default="png",
        choices=("png", "jpeg", "raw", "keep"),
        help="keep: the input's files as they are (default: %(default)s)",
    )
    parser.add_argument("--quality", type=cli.percent, default=95, help="of JPEG (default: %(default)s)")
    parser.add_argument(
        "--shard-bytes",
        type=cli.positive,
        default=2**26,
        metavar="BYTES",
        help="about so many a shard, and at least 8 shards (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-samples", type=cli.positive, metavar="N", help="exactly so many a shard, instead of bytes"
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the shuffle before writing (default: %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that can't be decoded")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the input's order")
    parser.add_argument(
        "--workers", type=cli.positive, metavar="N", help="processes (default: all cores, 1 for small sets)"
    )
    parser.add_argument(
        "--ray", type=cli.positive, metavar="N", help="instead: up to N Ray workers, on the nodes of a cluster"
    )
    return parser.parse_intermixed_args(argv)  # options may stand between INPUT and URL


def run_on_ray(workers: int, plan: Plan, url: str, numbers: list[int]) -> Iterator[Made]:
    """Shards over the nodes of the cluster at RAY_ADDRESS; input and output must be reachable from each."""
    from ddpm_dist.cluster import ActorPool, Failed  # which bring Ray

    with ActorPool(partial(ShardMaker, plan, url), (1, workers), ClusterConfig()) as pool:
        for outcome in pool.map(numbers):
            if isinstance(outcome, Failed):
                raise outcome.error
            yield outcome.value


def main(argv: Sequence[str] | None = None) -> None:
    """Makes what of the set is not there yet, and its index at the end."""
    args = parse(argv)
    options = SourceOptions(
        tuple(args.inputs),
        args.split,
        args.labels,
        args.size,
        args.images,
        tuple(args.include),
        tuple(args.exclude),
        args.sparse_labels,
        args.index,
    )
    storage.check_access(args.url)  # before an input is read, which can take minutes
    plan = make_plan(
        args.kind,
        options,
        format=args.format,
        quality=args.quality,
        channels=args.channels,
        shuffle_seed=None if args.no_shuffle else args.seed,
        skip_bad=args.skip_bad,
        samples_per_shard=args.shard_samples,
        bytes_per_shard=args.shard_bytes,
    )
    if args.ray:
        build(plan, args.url, partial(run_on_ray, args.ray))
        return
    workers = args.workers or (1 if plan.samples < SMALL else os.cpu_count() or 1)
    build(plan, args.url, partial(run_in_processes, workers))
