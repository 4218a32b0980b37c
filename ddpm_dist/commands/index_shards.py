"""Writes the index of a WebDataset that exists: one pass over its shards, in parallel, resumable.

ddpm-shards index s3://bucket/folder-with-tars
ddpm-shards index --label json:class_id s3://bucket/others
"""

import argparse
from collections.abc import Sequence

from ddpm_dist import cli
from ddpm_dist.data import DEFAULT_LABEL, index_shards
from ddpm_dist.progress import counted


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("url", metavar="URL", help="folder with the shards; the index is written there")
    parser.add_argument(
        "--label",
        default=DEFAULT_LABEL,
        metavar="EXTENSION",
        help="member with the class number, or json:FIELD for a field of the .json member (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=cli.positive, metavar="N", help="processes (default: all cores, 1 for small sets)"
    )
    parser.add_argument("--leave-out-damaged", action="store_true", help="index what is whole, instead of stopping")
    args = parser.parse_args(argv)
    index = index_shards(
        args.url, label_field=args.label, workers=args.workers, leave_out_damaged=args.leave_out_damaged
    )
    forms = [f"{count} {form}" for form, count in sorted(index.schema.formats.items())]
    no_image = index.num_samples - sum(index.schema.formats.values())
    if no_image:
        forms.append(f"{no_image} not an image: ddpm-shards verify names them")
    print(
        f"{counted(index.num_samples, 'sample')} ({', '.join(forms)}) in {counted(len(index.shards), 'shard')}, "
        f"{index.num_bytes} bytes, {f'{index.num_classes} classes' if index.num_classes else 'no labels'}; "
        f"content {index.content_id}"
    )
