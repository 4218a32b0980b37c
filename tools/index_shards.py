"""Writes the index of a WebDataset that exists: one pass over its shards, in parallel, resumable.

tools/index_shards.py s3://bucket/folder-with-tars
tools/index_shards.py --label json:class_id s3://bucket/others
"""

if __name__ == "__main__":
    from ddpm_dist import interrupt

    interrupt.leave_quietly()

import argparse
from collections.abc import Sequence

from ddpm_dist import cli
from ddpm_dist.data.foreign import index_shards


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("url", metavar="URL", help="folder with the shards; the index is written there")
    parser.add_argument(
        "--label",
        default="cls",
        metavar="EXTENSION",
        help="member with the class number, such as cls (default), or json:FIELD",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: all cores")
    parser.add_argument("--leave-out-damaged", action="store_true", help="index what is whole, instead of stopping")
    args = parser.parse_args(argv)
    index = index_shards(
        args.url, label_field=args.label, workers=args.workers, leave_out_damaged=args.leave_out_damaged
    )
    formats = ", ".join(f"{count} {form}" for form, count in sorted(index.schema.formats.items()))
    print(
        f"{index.num_samples} samples ({formats}) in {len(index.shards)} shards, {index.num_bytes} bytes, "
        f"{index.num_classes or 0} classes; content {index.content_id}"
    )


if __name__ == "__main__":
    cli.run(main)
