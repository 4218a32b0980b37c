"""Training states, looked at without DeepSpeed: list, verify, compare, extract.

    ddpm-inspect checkpoint list s3://bucket/runs/digits
    ddpm-inspect checkpoint show s3://bucket/runs/digits/checkpoints/000001000-0001
    ddpm-inspect checkpoint verify STATE            every byte of it
    ddpm-inspect checkpoint compare STATE OTHER     tensor by tensor, at any two world sizes
    ddpm-inspect checkpoint extract STATE weights.safetensors --kind ema

STATE is the URL of a state, or of a run for its newest valid one.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from ddpm_dist import cli, storage
from ddpm_dist.errors import NotFoundError, StateError
from ddpm_dist.state import MANIFEST, Manifest, StateId, history, read_full, read_manifest, verify


def main(argv: Sequence[str] | None = None) -> None:
    """Does the subcommand that is named first."""
    args = _parser().parse_args(argv)
    COMMANDS[args.command](args)


def list_states(args: argparse.Namespace) -> None:
    """A line per state, newest first, and what became of it."""
    url = storage.join(args.url, "checkpoints")
    names = storage.list_objects(url)
    _, valid = history.read(url)
    folders = sorted({s for name in names if (s := StateId.parse(name.split("/")[0]))}, reverse=True)
    if not folders:
        raise StateError(f"{storage.redact(url)}: no training states")
    for state in folders:
        inside = [size for name, size in names.items() if name.startswith(f"{state}/")]
        if f"{state}/{MANIFEST}" not in names:
            standing = "unfinished: no manifest"
        elif state in valid:
            standing = "valid" + (", the next attempt continues it" if state == valid[0] else "")
        else:
            standing = "void: its attempt had been succeeded"
        print(f"{state}  step {state.step:>9,}  {sum(inside) / 2**20:>10.1f} MiB  {standing}")


def show(args: argparse.Namespace) -> None:
    """The manifest, without its tables."""
    url, manifest = _open(args.url)
    parameters = sum(manifest.elements())
    print(f"{storage.redact(url)}: {parameters:,} parameters in {len(manifest.shapes)} tensors")
    print(f"kinds: {', '.join(manifest.kinds)}")
    for rank, part in enumerate(manifest.parts):
        print(f"rank {rank}: {len(manifest.pieces(rank))} pieces, {len(part.files)} files")
    about = {key: value for key, value in manifest.meta.items() if key != "config"}
    print(json.dumps({"scalars": manifest.scalars, "meta": about}, indent=2))


def verify_state(args: argparse.Namespace) -> None:
    """Reads every byte; DamagedStateError names the first file that isn't what was written."""
    url, manifest = _open(args.url)
    verify(url, manifest)
    files = sum(len(part.files) for part in manifest.parts)
    print(f"{storage.redact(url)}: whole; {files} files, {manifest.bytes / 2**20:.1f} MiB")


def compare(args: argparse.Namespace) -> None:
    """Differences between two states; an error if there are any, so that scripts can ask."""
    url, manifest = _open(args.url)
    other_url, other = _open(args.other)
    if manifest.shapes != other.shapes or set(manifest.kinds) != set(other.kinds):
        raise StateError(f"{storage.redact(url)} and {storage.redact(other_url)}: not of the same network and averages")
    differing = 0
    for kind in manifest.kinds:
        pairs = zip(read_full(url, manifest, kind), read_full(other_url, other, kind), strict=True)
        for (name, a), (_, b) in pairs:
            if not torch.equal(a.view(torch.int32), b.view(torch.int32)):
                differing += 1
                print(f"{kind} of {name}: differ by up to {float((a - b).abs().max()):.3g}")
    if manifest.scalars != other.scalars:
        differing += 1
        print(f"scalars: {manifest.scalars} and {other.scalars}")
    if differing:
        raise StateError(f"{differing} differences")
    print("equal, bit for bit")


def extract(args: argparse.Namespace) -> None:
    """Full tensors of one kind as a .safetensors file."""
    url, manifest = _open(args.url)
    tensors = dict(read_full(url, manifest, args.kind))
    metadata = {"format": "pt", "kind": args.kind, "step": str(manifest.id.step)}
    try:
        Path(args.out).write_bytes(safetensors.torch.save(tensors, metadata))
    except OSError as error:
        raise StateError(f"{args.out}: can't be written: {error.strerror}") from None
    print(f"{args.out}: {len(tensors)} tensors of {args.kind} at step {manifest.id.step}")


def _open(url: str) -> tuple[str, Manifest]:
    """(URL of the state, its manifest) of a state, or of a run's newest valid one."""
    try:
        return url, read_manifest(url)
    except NotFoundError:
        folder = storage.join(url, "checkpoints")
        _, valid = history.read(folder)
        if not valid:
            raise StateError(
                f"{storage.redact(url)}: neither a state (no {MANIFEST}) nor a run that has one; "
                "`inspect_checkpoint.py list RUN` shows what there is"
            ) from None
        state_url = storage.join(folder, str(valid[0]))
        return state_url, read_manifest(state_url)


COMMANDS = {"list": list_states, "show": show, "verify": verify_state, "compare": compare, "extract": extract}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        command = commands.add_parser(name)
        what = "a run's folder" if name == "list" else "a state, or a run's folder"
        command.add_argument("url", type=cli.url, help=what)
        if name == "compare":
            command.add_argument("other", type=cli.url, help=what)
        if name == "extract":
            command.add_argument("out", help="file to write")
            command.add_argument("--kind", default="ema", help="weights, exp_avg, exp_avg_sq, ema (default), power-…")
    return parser
