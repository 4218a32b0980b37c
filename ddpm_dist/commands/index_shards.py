"""Writes the index of a WebDataset that exists: one pass over its shards, in parallel, resumable.

ddpm-shards index s3://bucket/folder-with-tars
ddpm-shards index --label json:class_id --image jpg s3://bucket/others
ddpm-shards index s3://public/read-only --index s3://mine/index-of-it
"""

import argparse
from collections.abc import Sequence

from ddpm_dist import cli
from ddpm_dist.data import Reading, index_shards
from ddpm_dist.progress import counted


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the index, and prints what is in it and what isn't."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("url", metavar="URL", help="folder with the shards")
    parser.add_argument(
        "--index", type=cli.url, metavar="URL", help="another folder for the index (default: with the shards)"
    )
    parser.add_argument(
        "--label",
        metavar="EXTENSION",
        help='member with the class (a number, or a name), json:FIELD for a field of the .json member, or "none" '
        f"(default: {Reading().label})",
    )
    parser.add_argument("--labels", metavar="FILE", help="instead: a CSV of file,class or a JSON {file: class}")
    parser.add_argument(
        "--sparse-labels",
        choices=Reading.SPARSE,
        help="class numbers with big gaps: keep them, or take them for names of classes",
    )
    parser.add_argument(
        "--image", metavar="EXTENSION|GLOB", help="member with the image, where a sample has several (jpg, '*.input.*')"
    )
    parser.add_argument(
        "--keys",
        choices=Reading.KEYS,
        default=Reading().keys,
        help="where a sample's key ends in a file's name (default: %(default)s)",
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="shards to take, by their path below URL; * matches / as well (may stand several times)",
    )
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="shards to leave out")
    parser.add_argument(
        "--workers", type=cli.positive, metavar="N", help="processes (default: all cores, 1 for small sets)"
    )
    parser.add_argument("--leave-out-damaged", action="store_true", help="index what is whole, instead of stopping")
    args = parser.parse_args(argv)
    if args.label and args.labels:
        parser.error("--label and --labels: one of them says the classes")
    reading = Reading(
        args.label or Reading().label,
        args.labels,
        args.image,
        args.keys,
        args.sparse_labels,
        tuple(args.include),
        tuple(args.exclude),
    )
    index = index_shards(
        args.url, reading, at=args.index, workers=args.workers, leave_out_damaged=args.leave_out_damaged
    )
    forms = [f"{count} {form}" for form, count in sorted(index.schema.formats.items())]
    no_image = index.num_samples - sum(index.schema.formats.values())
    if no_image:
        forms.append(f"{no_image} not an image: ddpm-shards verify names them")
    classes = "no labels"
    if index.num_classes:
        classes = f"{index.num_classes:,} {'class' if index.num_classes == 1 else 'classes'}"
    elif reading == Reading():
        classes += " (no .cls; --label names another member, --labels a file)"
    if index.schema.class_names:
        names = index.schema.class_names
        classes += f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
    print(
        f"{counted(index.num_samples, 'sample')} ({', '.join(forms)}) in {counted(len(index.shards), 'shard')}, "
        f"{index.num_bytes} bytes, {classes}; "
        f"content {index.content_id}"
    )
