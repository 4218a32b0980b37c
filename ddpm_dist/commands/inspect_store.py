"""Tries on a store, in a folder of its own, what training, sampling and evaluation need of one.

    ddpm-inspect store s3://BUCKET/FOLDER

Exit code 0: all that is needed works; 1: the lines printed say what doesn't. It leaves nothing where it may delete.
"""

import argparse
import sys
from collections.abc import Sequence

from ddpm_dist import cli, storage
from ddpm_dist.doctor import try_store


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a line for each thing that it tried; an exit with an error if one that is needed failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("url", type=cli.url, metavar="URL", help="a folder, such as the one of run.url")
    url = parser.parse_args(argv).url
    if url.startswith("s3://"):
        print(f"{storage.introduce()}")
    usable = True
    for name, needed, error in try_store(url):
        print(f"ok      {name}" if error is None else f"FAILED  {name}: {error}")
        usable = usable and (error is None or not needed)
    if not usable:
        print(f"{url}: not usable as it is; docs/stores.md says what is needed")
        sys.exit(cli.EXIT_ERROR)
    print(f"{url}: usable")
