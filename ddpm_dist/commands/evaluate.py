"""Compares samples with data: Fréchet distances and more, each beside its real-against-real floor.

    ray job submit -- ddpm-evaluate --config digits \
        --samples s3://bucket/run/samples/000003000-seed0
    ddpm-evaluate --snapshot s3://bucket/run/snapshots/000010000 --data s3://bucket/data \
        --metrics fid,prdc --network inception=s3://bucket/pt_inception-2015-12-05-6726825d.pth --out s3://bucket/eval

    ddpm-evaluate --follow s3://bucket/run

The last line on stdout is the result as JSON; it is also written to <run.url>/evaluation/results/. With --follow,
each snapshot of a run is evaluated as it comes, and evaluation/report.html shows all of it.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ddpm_dist import cli, storage
from ddpm_dist.commands import sample as sampling_command
from ddpm_dist.config import Config, DataConfig
from ddpm_dist.errors import EvaluationError, NotFoundError
from ddpm_dist.evaluation import Order, check_used, instead, job, write_report
from ddpm_dist.evaluation.follow import follow
from ddpm_dist.recipe import load_config, parse_config
from ddpm_dist.sampling.job import load_manifest
from ddpm_dist.training.run_folder import snapshot_at

NEAREST = 10
"""Samples whose nearest training images are shown."""


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments of evaluate.py."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sampling_command.add_config_arguments(parser)
    run = parser.add_mutually_exclusive_group()
    run.add_argument(
        "--follow", metavar="RUN", type=cli.url, help="evaluate each snapshot of a run as it comes, until its last"
    )
    run.add_argument("--report", metavar="RUN", type=cli.url, help="only write evaluation/report.html of a run anew")
    parser.add_argument("--samples", metavar="URL", type=cli.url, help="folder of sample shards")
    parser.add_argument("--snapshot", metavar="URL", type=cli.url, help="draw samples from this, and don't keep them")
    parser.add_argument("--data", metavar="URL", type=cli.url, help="data set to compare with; default: data.url")
    parser.add_argument(
        "--data-index", metavar="URL", type=cli.url, help="folder of its index, if not with its shards; see data.index"
    )
    parser.add_argument(
        "--reference", metavar="URL", type=cli.url, help="statistics file (.npz) to compare with, instead of --data"
    )
    parser.add_argument("--held-out", metavar="URL", type=cli.url, help="data set for bits_per_dim; default: --data")
    parser.add_argument("--held-out-index", metavar="URL", type=cli.url, help="folder of its index, as --data-index")
    parser.add_argument("--metrics", metavar="A,B", help="default: evaluation.metrics")
    parser.add_argument(
        "--network",
        metavar="NAME=URL",
        action="append",
        default=[],
        help="weights of inception, or a TorchScript module; default: evaluation.networks",
    )
    parser.add_argument("--num-samples", type=cli.positive, metavar="N", help="default: all that are there")
    parser.add_argument("--seed", type=cli.seed, default=0)
    parser.add_argument("--labels", metavar="SPEC", help="of samples from a snapshot; see ddpm-sample")
    parser.add_argument("--workers", metavar="N|MIN:MAX", help="default: cluster.workers of the configuration")
    parser.add_argument("--out", metavar="URL", type=cli.url, help="folder for the result; default: run.url/evaluation")
    return parser


def run(args: argparse.Namespace) -> None:
    """Does what the arguments ask for, and prints the result."""
    if args.snapshot:
        args.snapshot = snapshot_at(args.snapshot)
    run_url = args.follow or args.report
    cfg = _run_config(run_url, args.overrides) if run_url else _config(args)
    sampling_command.print_if_asked(args, cfg)
    if args.report:
        print(write_report(cfg))
    elif args.follow:
        order = replace(make_order(args, cfg), num_samples=args.num_samples or cfg.evaluation.num_samples)
        done = follow(cfg, order, sampling_command.workers(args.workers, cfg))
        print(f"{done} snapshots evaluated; {storage.join(cfg.run.url, 'evaluation')}")
    else:
        result = _evaluate(args, cfg)
        print(table(result))
        print(json.dumps(result), flush=True)


def _evaluate(args: argparse.Namespace, cfg: Config) -> dict[str, Any]:
    return job.run(make_order(args, cfg), sampling_command.workers(args.workers, cfg), cfg.cluster)


def make_order(args: argparse.Namespace, cfg: Config) -> Order:
    """By default the newest snapshot of the run, against its data."""
    if args.samples is None and args.snapshot is None and args.follow is None:
        args.snapshot = sampling_command.newest(cfg)
    data = args.data
    if data is None and args.reference is None:
        if not isinstance(cfg.data.url, str):
            raise EvaluationError("data.url is a mix of data sets; say with --data which one to compare with")
        data = cfg.data.url
    names = cfg.evaluation.metrics
    if args.metrics is not None:
        names = tuple(name.strip() for name in args.metrics.split(","))
    given = dict(_network(text) for text in args.network)
    check_used(given, names)
    return Order(
        samples=args.samples,
        snapshot=args.snapshot,
        data=data,
        data_index=args.data_index or index_of(cfg.data, data),
        reference=args.reference,
        held_out=args.held_out,
        held_out_index=args.held_out_index or index_of(cfg.data, args.held_out),
        metrics=names,
        networks={**cfg.evaluation.networks, **given},
        num_samples=args.num_samples or (cfg.evaluation.num_samples if args.snapshot else None),
        seed=args.seed,
        labels=args.labels,
        sampling=cfg.sampling,
        out=args.out or (storage.join(cfg.run.url, "evaluation") if args.config or args.follow else None),
        nearest=NEAREST,
    )


def index_of(data: DataConfig, url: str | None) -> str | None:
    """Where a configuration says that the index of a data set lies; None: with the shards, or a set unknown to it."""
    if isinstance(data.index, str):
        return data.index if url == data.url else None
    return (data.index or {}).get(url or "")


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    values: dict[str, float] = result["metrics"]
    reference = result["reference"]
    lines = [f"{result['num_samples']:,} samples against {reference.get('data') or reference['statistics']}"]
    for name, value in values.items():
        if name.endswith(("_floor", "_deviation")):
            continue
        beside = [f"real against real {values[f'{name}_floor']:.4f}"] if f"{name}_floor" in values else []
        beside += [f"± {values[f'{name}_deviation']:.4f}"] if f"{name}_deviation" in values else []
        lines.append(f"  {name:24} {value:12.4f}   {', '.join(beside)}".rstrip())
    return "\n".join(lines)


def _run_config(run_url: str, overrides: Sequence[str]) -> Config:
    """The configuration that stands in a run's folder, with overrides that don't change the training."""
    sampling_command.check_overrides(overrides, "the run's own configuration")
    url = storage.join(run_url, "config.yaml")
    try:
        text = storage.read(url).decode()
    except NotFoundError:
        raise EvaluationError(
            f"{storage.redact(run_url)}: not the folder of a run, it has no config.yaml (which is written first)"
        ) from None
    cfg = parse_config(text, overrides, source=storage.redact(url))
    return cfg.model_copy(update={"run": cfg.run.model_copy(update={"url": run_url.rstrip("/")})})


def _config(args: argparse.Namespace) -> Config:
    if args.config:
        return load_config(args.config, args.overrides)
    snapshot = args.snapshot
    if snapshot is None and args.samples:
        manifest = load_manifest(args.samples)
        snapshot = manifest.snapshot if manifest else None
    if snapshot is None:
        if args.samples:
            raise EvaluationError(
                f"--samples {storage.redact(args.samples)}: no manifest of a sampling job is there"
                f"{instead(args.samples)}; for images from elsewhere give the recipe as well, by --config FILE"
            )
        raise EvaluationError("give --samples URL or --snapshot URL, or --config FILE")
    return sampling_command.stored_config(snapshot, args.overrides)


def _network(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not equals or not url:
        raise EvaluationError(f"--network {text}: expected NAME=URL")
    return name, url


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates, follows or reports, and prints the result."""
    run(parser(__doc__ or "").parse_intermixed_args(argv))
