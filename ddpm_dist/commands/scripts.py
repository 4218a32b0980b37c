"""The programs: each asks for a quiet Ctrl-C, loads its command and runs it. launch/, tools/ and setup.py call these.

Nothing is imported before a program has begun, so that its packages load under the quiet Ctrl-C, and what else
imports a script keeps its own.
"""

import sys
from collections.abc import Callable

from ddpm_dist import interrupt


def _run(command: str) -> None:
    interrupt.leave_quietly()
    from ddpm_dist import cli

    cli.run(cli.load(f"ddpm_dist.commands.{command}"))


def train() -> None:
    """`ddpm-train`."""
    _run("train")


def train_deepspeed() -> None:
    """`ddpm-train-deepspeed`, under DeepSpeed's launcher."""
    _run("train_deepspeed")


def sample() -> None:
    """`ddpm-sample`."""
    _run("sample")


def evaluate() -> None:
    """`ddpm-evaluate`."""
    _run("evaluate")


def make_shards() -> None:
    """`ddpm-shards make`."""
    _run("make_shards")


def index_shards() -> None:
    """`ddpm-shards index`."""
    _run("index_shards")


def verify_shards() -> None:
    """`ddpm-shards verify`."""
    _run("verify_shards")


def inspect_batch() -> None:
    """`ddpm-inspect batch`."""
    _run("inspect_batch")


def inspect_checkpoint() -> None:
    """`ddpm-inspect checkpoint`."""
    _run("inspect_checkpoint")


def inspect_store() -> None:
    """`ddpm-inspect store`."""
    _run("inspect_store")


def convert_weights() -> None:
    """`ddpm-convert`."""
    _run("convert_weights")


def posthoc_ema() -> None:
    """`ddpm-posthoc-ema`."""
    _run("posthoc_ema")


def doctor() -> None:
    """`ddpm-doctor`."""
    _run("doctor")


def plan() -> None:
    """`ddpm-plan`."""
    _run("plan")


SHARDS = {"make": make_shards, "index": index_shards, "verify": verify_shards}
INSPECT = {"batch": inspect_batch, "checkpoint": inspect_checkpoint, "store": inspect_store}


def shards() -> None:
    """`ddpm-shards make|index|verify …`."""
    _one_of("ddpm-shards", SHARDS)


def inspect() -> None:
    """`ddpm-inspect batch|checkpoint|store …`."""
    _one_of("ddpm-inspect", INSPECT)


PROGRAMS = {
    "train": train,
    "train-deepspeed": train_deepspeed,
    "sample": sample,
    "evaluate": evaluate,
    "shards": shards,
    "inspect": inspect,
    "convert": convert_weights,
    "posthoc-ema": posthoc_ema,
    "doctor": doctor,
    "plan": plan,
}
"""What setup.py installs as `ddpm-NAME`."""


def by_name() -> None:
    """`python -m ddpm_dist.commands NAME …`, for who can't know whether the programs are installed."""
    _one_of("python -m ddpm_dist.commands", PROGRAMS, lambda word: f"ddpm-{word}")


def _one_of(program: str, commands: dict[str, Callable[[], None]], named: Callable[[str], str] | None = None) -> None:
    """Runs the command that the first word names, with the others; named: the name that it then has in its help."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word not in commands:
        asked = word in ("-h", "--help")
        print(f"usage: {program} {'|'.join(commands)} …  (each with --help)", file=sys.stdout if asked else sys.stderr)
        if word and not asked:
            print(f"{program}: {word!r} is none of its commands", file=sys.stderr)
        sys.exit(0 if asked else 2)
    sys.argv[:2] = [named(word) if named else f"{program} {word}"]
    commands[word]()
