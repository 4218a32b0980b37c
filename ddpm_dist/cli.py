"""What every command shares: `--config FILE key=value …`, and errors as one message without a traceback."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ddpm_dist import interrupt
from ddpm_dist.config import Config, check_url
from ddpm_dist.errors import ConfigError, DdpmDistError, without_url_secrets
from ddpm_dist.packages import absent
from ddpm_dist.recipe import dump_config, load_config, recipes

EXIT_ERROR = 1


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--config`, `--print-config` and overrides."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    config_option(parser, "of the run", required=True)
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and leave")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def config_option(parser: argparse.ArgumentParser, what_for: str, required: bool = False) -> None:
    """`--config`, the same in each command; what_for: what the recipe is that of."""
    names = ", ".join(recipes())
    parser.add_argument(
        "--config",
        required=required,
        action=Once,
        metavar="RECIPE",
        help=f"recipe {what_for}: a file, or one of {names}",
    )


def config_from(args: argparse.Namespace) -> Config:
    """The checked configuration; leaves after printing it if `--print-config` was given."""
    cfg = load_config(args.config, args.overrides)
    if args.print_config:
        print(dump_config(cfg), end="")
        sys.exit(0)
    return cfg


Main = Callable[[Sequence[str] | None], None]


def load(module: str) -> Main:
    """`main` of a command's module; what its packages lack is said by `run`."""
    try:
        main: Main = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        lacking = error

        def main(argv: Sequence[str] | None) -> None:
            raise lacking

    return main


def run(main: Main) -> None:
    """Calls `main(None)` as a command: user errors become one line on stderr and exit code 1.

    A package that isn't installed is one of them. With DDPM_DIST_TRACEBACK=1 in the environment, the traceback is shown
    as well.
    """
    interrupt.restore()
    setup_logging()
    try:
        _explaining_absent_packages(main)
    except DdpmDistError as error:
        if os.environ.get("DDPM_DIST_TRACEBACK") == "1":
            logging.exception("traceback, as DDPM_DIST_TRACEBACK=1 asks")
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        print(interrupt.MESSAGE.decode(), end="", file=sys.stderr, flush=True)
        sys.exit(interrupt.EXIT_CODE)


def _explaining_absent_packages(main: Main) -> None:
    try:
        main(None)
    except ModuleNotFoundError as error:
        explained = absent(error)
        if explained is None:
            raise
        raise ConfigError(explained) from error


def url(text: str) -> str:
    """For argparse: a URL such as s3://BUCKET/FOLDER."""
    try:
        return check_url(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{without_url_secrets(text)!r}: {error}") from None


class Once(argparse.Action):
    """For argparse: an option that stands twice is an error; argparse would take the last one in silence."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} stands twice: {getattr(namespace, self.dest)} and {values}")
        setattr(namespace, self.dest, values)


def positive(text: str) -> int:
    """For argparse: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on")
    return int(text)


def count(text: str) -> int:
    """For argparse: a whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 on")
    return int(text)


def percent(text: str) -> int:
    """For argparse: a whole number from 1 to 100."""
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 to 100")
    return int(text)


def seed(text: str) -> int:
    """For argparse: a seed."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to 2^63 - 1")
    return int(text)


def setup_logging() -> None:
    """Plain lines with the time, on stderr."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for noisy in ("botocore", "aiobotocore", "s3fs", "fsspec", "urllib3", "asyncio", "aiohttp", "ray.data"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for told in ("credentials", "tokens"):  # with a traceback, what our error says in a line
        for library in ("botocore", "aiobotocore"):
            logging.getLogger(f"{library}.{told}").setLevel(logging.CRITICAL)
