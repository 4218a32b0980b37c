"""Checks a data set against its index, and every image, and says what is wrong.

    ddpm-shards verify s3://bucket/folder

Exit code 0: all is as the index says and every image decodes; 1: the lines printed say what isn't.
"""

import argparse
import sys
from collections.abc import Sequence

from ddpm_dist import cli
from ddpm_dist.data import verify_shards
from ddpm_dist.progress import counted


def main(argv: Sequence[str] | None = None) -> None:
    """Prints what it found; an exit with an error if anything is not as the index says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("url", type=cli.url, metavar="URL")
    parser.add_argument("--index", type=cli.url, metavar="URL", help="folder of the index (default: with the shards)")
    parser.add_argument("--no-decode", action="store_true", help="hashes and structure, without decoding the images")
    parser.add_argument(
        "--workers", type=cli.positive, metavar="N", help="processes (default: all cores, 1 for small sets)"
    )
    args = parser.parse_args(argv)
    problems = verify_shards(args.url, at=args.index, workers=args.workers, decoded=not args.no_decode)
    for problem in problems:
        print(f"{problem.shard}: {problem.what}")
    print(f"{args.url}: {counted(len(problems), 'problem') if problems else 'all is as the index says'}")
    if problems:
        sys.exit(cli.EXIT_ERROR)
