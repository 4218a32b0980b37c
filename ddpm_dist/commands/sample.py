"""Draws images from a snapshot, on all workers of a Ray cluster that are free.

    ray job submit -- ddpm-sample --config digits --num-samples 1797
    ddpm-sample --snapshot s3://bucket/run/snapshots/000010000 --out s3://bucket/samples \
        --num-samples 50000 --workers 1:8 sampling.sampler=ddim sampling.steps=50 cluster.gpus_per_worker=1

With --config, the snapshot is the run's newest and the images go to <run.url>/samples/. A job that is started again
does what is missing, or was lost since. `--sweep sampling.steps=10,50,100` makes one folder for each value, with one
pool.
"""

import argparse
import itertools
import json
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any

from ddpm_dist import cli, snapshot, storage
from ddpm_dist.config import Config
from ddpm_dist.diffusion import Process
from ddpm_dist.errors import ConfigError, SamplingError
from ddpm_dist.recipe import apply_override, dump_config, load_config, parse_yaml, validate
from ddpm_dist.sampling import export_npz, export_png, job
from ddpm_dist.training.run_folder import newest_snapshot, snapshot_at

log = logging.getLogger(__name__)

_FREE_SECTIONS = ("sampling", "cluster", "evaluation")


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments of sample.py."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--snapshot", metavar="URL", type=cli.url, action="append", help="or a run, for its newest; default: of run.url"
    )
    parser.add_argument(
        "--out", metavar="URL", type=cli.url, help="folder for the samples; default: run.url/samples/<step>-<seed>"
    )
    parser.add_argument("--num-samples", type=cli.positive, metavar="N", help="default: evaluation.num_samples")
    parser.add_argument("--seed", type=cli.seed, default=0)
    parser.add_argument("--workers", metavar="N|MIN:MAX", help="default: cluster.workers of the configuration")
    parser.add_argument("--labels", metavar="SPEC", help="random (default), none, all, or classes such as 3 or 0,1,2")
    parser.add_argument(
        "--verify", action="store_true", help="read and hash the shards that are there, and make altered ones again"
    )
    parser.add_argument("--sweep", metavar="KEY=A,B", action="append", default=[], help="one folder for each value")
    parser.add_argument(
        "--npz", metavar="URL", type=cli.url, help="write all images into one .npz as well (arr_0, NHWC)"
    )
    parser.add_argument("--png", metavar="URL", type=cli.url, help="write a folder of PNG files as well")
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config`, `--print-config` and overrides, which evaluate.py has as well."""
    cli.config_option(parser, "of the run (default: the one stored in the snapshot)")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and leave")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def run(args: argparse.Namespace) -> list[job.Result]:
    """Does what the arguments ask for."""
    if args.config is None and not args.snapshot:
        raise SamplingError("give --snapshot URL, or --config FILE for the newest snapshot of its run")
    snapshots = [snapshot_at(url) for url in args.snapshot or ()]
    if args.config:
        cfg = load_config(args.config, args.overrides)
    else:
        cfg = stored_config(snapshots[0], args.overrides)
    print_if_asked(args, cfg)
    snapshots = snapshots or [newest(cfg)]
    for url in snapshots:
        say_what_is_left(url)
    orders = make_orders(args, cfg, snapshots)
    if len(orders) > 1 and (args.npz or args.png):
        raise SamplingError(f"--npz and --png: of one set of samples, and this job makes {len(orders)}; make it first")
    results = job.run(orders, workers(args.workers, cfg), cfg.cluster, verify=args.verify)
    if args.npz:
        export_npz(results[0].out, args.npz)
    if args.png:
        export_png(results[0].out, args.png)
    return results


def make_orders(args: argparse.Namespace, cfg: Config, snapshots: Sequence[str]) -> list[job.Order]:
    """One order for each snapshot and each combination of swept values, snapshot by snapshot."""
    axes = [_axis(text) for text in args.sweep]
    orders = []
    for url in snapshots:
        for point in itertools.product(*axes):
            values = cfg.model_dump(mode="json")
            for key, value in point:
                apply_override(values, f"{key}={value}")
            sampling = validate(values, "--sweep").sampling
            name = "-".join(f"{key.rpartition('.')[2]}={_in_name(value)}" for key, value in point)
            out = _out(args, cfg, url)
            if len(snapshots) > 1:
                out = storage.join(out, url.rstrip("/").rpartition("/")[2])
            orders.append(
                job.Order(
                    snapshot=url,
                    out=storage.join(out, name) if name else out,
                    num_samples=args.num_samples if args.num_samples is not None else cfg.evaluation.num_samples,
                    seed=args.seed,
                    labels=args.labels,
                    sampling=sampling,
                )
            )
    return orders


def describe(result: job.Result) -> str:
    """One line of JSON for programs that read the job's output."""
    manifest = result.manifest
    return json.dumps(
        {
            "samples": result.out,
            "num_samples": manifest.num_samples,
            "made": result.made,
            "duplicates": result.duplicates,
            "grid": result.grid,
            "snapshot": manifest.snapshot,
            "step": manifest.step,
        }
    )


def workers(text: str | None, cfg: Config) -> tuple[int, int]:
    """(min, max) of `N` or `MIN:MAX`; cluster.workers by default."""
    if text is None:
        return cfg.worker_range
    low, _, high = text.partition(":")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        bounds = 0, 0
    if not 1 <= bounds[0] <= bounds[1]:
        raise SamplingError(f"--workers {text}: expected N or MIN:MAX with 1 ≤ MIN ≤ MAX, such as 4 or 1:8")
    return bounds


def say_what_is_left(url: str) -> None:
    """What a snapshot of diffusers says of sampling that isn't taken over, as ddpm-convert says it."""
    for note in snapshot.notes_on(url):
        log.info("%s: not kept: %s; how to sample belongs to a job (`sampling.…`)", storage.redact(url), note)


def stored_config(url: str, overrides: Sequence[str]) -> Config:
    """The configuration stored in a snapshot, with overrides that don't change the training."""
    check_overrides(overrides, "the snapshot's own configuration")
    info = snapshot.load_info(url)
    text = info["config"]
    values: Any = parse_yaml(text, url) if text else _minimal(url, info)
    for override in overrides:
        apply_override(values, override)
    return validate(values, storage.redact(url))


def check_overrides(overrides: Sequence[str], what_holds: str) -> None:
    """Raises ConfigError for an override of what a stored configuration has fixed."""
    for override in overrides:
        if override.partition(".")[0] not in _FREE_SECTIONS:
            raise ConfigError(
                f"{override!r}: without --config, {what_holds} holds; only "
                f"{', '.join(f'{section}.*' for section in _FREE_SECTIONS)} may be given"
            )


def print_if_asked(args: argparse.Namespace, cfg: Config) -> None:
    """With `--print-config`: shows the resolved configuration, and leaves."""
    if args.print_config:
        print(dump_config(cfg), end="")
        sys.exit(0)


def _minimal(url: str, info: dict[str, Any]) -> dict[str, Any]:
    """For a snapshot of another program: nothing is known of its training, and sampling's defaults hold."""
    diffusion = snapshot.diffusion_in(url)
    return {
        "run": {"url": url},
        "data": {"url": f"{url}-data", "image_size": info["image_size"], "channels": info["channels"]},
        "model": {"channel_mult": [1], "attention_resolutions": []},
        **_process_of(diffusion),
        "train": {"steps": 1, "global_batch": 1},
    }


def _process_of(diffusion: Process) -> dict[str, Any]:
    """What sampling's settings are checked by; a continuous process's default is its own sampler."""
    if diffusion.discrete:
        return {"diffusion": {"timesteps": int(diffusion.path.last) + 1}}
    told = {key.partition(".")[2]: value for key, value in snapshot.keys_of_process(diffusion).items()}
    spacing = "rho" if told["process"] == "edm" else "uniform"
    return {"diffusion": told, "sampling": {"sampler": "heun", "steps": 18, "spacing": spacing, "clip": "none"}}


def newest(cfg: Config) -> str:
    """URL of the run's newest snapshot."""
    url = newest_snapshot(cfg.run.url)
    if url is None:
        raise SamplingError(
            f"run.url: {storage.redact(cfg.run.url)} has no snapshot yet; train it, or give --snapshot URL"
        )
    return url


def _out(args: argparse.Namespace, cfg: Config, url: str) -> str:
    if args.out:
        return str(args.out)
    if not args.config:
        raise SamplingError("give --out URL, the folder for the samples")
    step = url.rstrip("/").rpartition("/")[2]
    return storage.join(cfg.run.url, "samples", f"{step}-seed{args.seed}")


def _in_name(value: str) -> str:
    """A swept value in a folder's name: `0..500` for a list."""
    return value.strip("[]").replace(" ", "").replace(",", "..")


def _axis(text: str) -> list[tuple[str, str]]:
    key, equals, values = text.partition("=")
    if not equals or not key.startswith("sampling."):
        raise SamplingError(f"--sweep {text}: expected sampling.key=value,value, such as sampling.steps=10,50,100")
    listed = re.split(r",(?![^\[]*\])", values)  # at the commas outside lists, such as [0,500]
    if not all(listed):
        raise SamplingError(f"--sweep {text}: an empty value")
    return [(key, value) for value in listed]


def main(argv: Sequence[str] | None = None) -> None:
    """Draws what is missing of the images, and prints a line for each folder."""
    for result in run(parser(__doc__ or "").parse_intermixed_args(argv)):
        print(describe(result), flush=True)
