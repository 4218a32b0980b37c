"""Tries on a store, in a folder of its own, what training, sampling and evaluation need of one.

    ddpm-inspect store s3://BUCKET/FOLDER

Exit code 0: all that is needed works; 1: the lines printed say what doesn't. It leaves nothing where it may delete.
"""

import argparse
import os
import sys
import urllib.request
import uuid
from collections.abc import Callable, Sequence

from ddpm_dist import cli, storage
from ddpm_dist.errors import StorageError

LARGE_BYTES = 33 * 2**20
"""Is sent in two parts."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a line for each thing that it tried; an exit with an error if one that is needed failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("url", type=cli.url, metavar="URL", help="a folder, such as the one of run.url")
    url = parser.parse_args(argv).url
    folder = storage.join(url, f"ddpm-store-{uuid.uuid4().hex[:8]}")
    if url.startswith("s3://"):
        print(f"{storage.introduce()}")
    storage.check_access(url)
    needed = {
        "write, read back": lambda: _round_trip(folder, b"0123456789"),
        "read a range": lambda: _expect(storage.read_range(storage.join(folder, "small"), 3, 4), b"3456"),
        "list": lambda: _expect(storage.list_objects(folder), {"small": 10}),
        "create once": lambda: _create_once(storage.join(folder, "once")),
        "a large object in parts": lambda: _round_trip(folder, os.urandom(LARGE_BYTES), "large"),
        "say what isn't there": lambda: _expect(storage.exists(storage.join(folder, "none")), False),
    }
    welcome = {
        "signed URLs (reads cost a tenth)": lambda: _signed(storage.join(folder, "small")),
        "delete (else old states stay)": lambda: storage.delete_tree(folder),
    }
    failed = [name for name, action in needed.items() if not _try(name, action)]
    for name, action in welcome.items():
        _try(name, action)
    if failed:
        print(f"{url}: not usable as it is; docs/stores.md says what is needed")
        sys.exit(cli.EXIT_ERROR)
    print(f"{url}: usable")


def _try(name: str, action: Callable[[], object]) -> bool:
    try:
        action()
    except (StorageError, OSError) as error:
        print(f"FAILED  {name}: {error}")
        return False
    print(f"ok      {name}")
    return True


def _expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise StorageError(f"{str(found)[:100]} came, where {str(wanted)[:100]} was expected")


def _round_trip(folder: str, data: bytes, name: str = "small") -> None:
    storage.publish(storage.join(folder, name), data)
    if storage.read(storage.join(folder, name)) != data:
        raise StorageError("other bytes came back than were written")


def _create_once(url: str) -> None:
    if not storage.create(url, uuid.uuid4().bytes):
        raise StorageError("a new name is taken already")
    storage.check_create(url, uuid.uuid4().bytes)


def _signed(url: str) -> None:
    signed = storage.signed_url(url, 60)
    if signed is not None:
        with urllib.request.urlopen(signed, timeout=20) as answer:  # noqa: S310 - http or https, as the endpoint is
            _expect(answer.read(), b"0123456789")
