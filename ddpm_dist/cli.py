"""What every command shares: `--config FILE key=value …`, and errors as one message without a traceback.

Importing it makes Ctrl-C quiet from there on: the packages that a command imports next take seconds to load.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType

from ddpm_dist.config import Config
from ddpm_dist.errors import DdpmDistError
from ddpm_dist.recipe import dump_config, load_config

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
INTERRUPTED = "interrupted; the same command continues"


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--config`, `--print-config` and overrides."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="recipe, such as configs/digits.yaml")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and leave")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def config_from(args: argparse.Namespace) -> Config:
    """The checked configuration; leaves after printing it if `--print-config` was given."""
    cfg = load_config(args.config, args.overrides)
    if args.print_config:
        print(dump_config(cfg), end="")
        sys.exit(0)
    return cfg


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Calls `main(None)` as a command: user errors become one line on stderr and exit code 1.

    With DDPM_DIST_TRACEBACK=1 in the environment, the traceback is shown as well.
    """
    setup_logging()
    try:
        main(None)
    except DdpmDistError as error:
        if os.environ.get("DDPM_DIST_TRACEBACK") == "1":
            logging.exception("traceback, as DDPM_DIST_TRACEBACK=1 asks")
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _excepthook


def setup_logging() -> None:
    """Plain lines with the time, on stderr."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for noisy in ("botocore", "aiobotocore", "s3fs", "fsspec", "urllib3", "asyncio", "aiohttp", "ray.data"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
