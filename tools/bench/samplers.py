"""Quality against number of network evaluations: every sampler and spacing on one trained snapshot.

    python -m tools.bench.samplers --train digits --work out/samplers      # then all samplers, with all spacings
    python -m tools.bench.samplers --snapshot URL --data URL --work out/samplers
    python -m tools.bench.samplers … --samplers unipc,dpmpp_2m --spacings log_snr,uniform --evaluations 8,12,16,25

Printed: Fréchet distances of the drawn images to the whole data set in EfficientNet-Lite0 features and in pixels,
medians over seeds, and their ratio to the sampler's own limit. There are two limits, since an imperfect network's SDE
and ODE end in different distributions: ancestral sampling over all T times for samplers that add noise, Heun's method
at 199 evaluations (even in log-SNR) for deterministic ones. All start from the same noise, so deterministic samplers
compare closely even with few images; of samplers that add noise, 256 images leave a deviation of 0.18 in a ratio.

Images are kept in the work folder and drawn once: a stopped run goes on, and a second run only measures. The picture
is WORK/samplers.png. All of it on one thread; the ancestral limit is most of the cost. Last line: one JSON object.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch is imported
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ddpm_dist import cli, snapshot, storage  # noqa: E402
from ddpm_dist.data.stream import iterate  # noqa: E402
from ddpm_dist.diffusion.grids import SPACINGS  # noqa: E402
from ddpm_dist.diffusion.samplers import SAMPLERS, sample  # noqa: E402
from ddpm_dist.errors import ConfigError  # noqa: E402
from ddpm_dist.recipe import load_config  # noqa: E402
from tools.bench.quality_judge import Judge  # noqa: E402
from tools.bench.samplers_picture import picture  # noqa: E402
from tools.bench.samplers_rows import METRICS, Draw, Row, curves, first_within, steps_for  # noqa: E402

RECIPES = {"digits": "digits", "digits-eps": "digits", "fashion-mnist": "fashion-mnist"}
"""What can be trained, and the data set that it takes."""
UNIT = 256


class Bench:
    """The snapshot, the data, and the images and distances that the work folder keeps."""

    def __init__(self, snapshot_url: str, data_url: str, work: Path, images: int | None) -> None:
        self._network, self.diffusion = snapshot.load_snapshot(snapshot_url)
        if snapshot.load_info(snapshot_url)["num_classes"] is not None:
            raise ConfigError(f"{snapshot_url} is conditional on classes; this benchmark draws without labels")
        self._network.requires_grad_(False)
        self.folder = work / "sets" / snapshot.snapshot_id(snapshot_url)[:16]
        real = torch.stack([torch.as_tensor(s.image) for s in iterate(data_url)])
        self._shape = (real.shape[1], real.shape[2], real.shape[3])
        self.count = min(images or len(real), len(real))
        self._judge = Judge(real)
        self.floor = self._judge.floor()
        self._found = self.folder / f"distances-{self.count}-of-{zlib.crc32(real.numpy().tobytes()):08x}.json"

    def unit(self, draw: Draw, start: int) -> tuple[Tensor, int]:
        """Images start … start + UNIT, [UNIT, C, H, W] uint8, and the evaluations that each of them took."""
        path = self.folder / draw.key / f"{start:06d}.npz"
        try:
            with np.load(path) as kept:
                return torch.from_numpy(kept["images"]), int(kept["evaluations"])
        except (OSError, EOFError, zipfile.BadZipFile):
            pass  # not drawn yet, or by a run that was killed
        calls = 0

        def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            nonlocal calls
            calls += 1
            result: Tensor = self._network(x, t, labels)
            return result

        indices = torch.arange(start, start + UNIT)
        x = sample(network, self.diffusion, draw.settings, seed=draw.seed, indices=indices, shape=self._shape)
        images = ((x + 1) * 127.5).round().to(torch.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez(file, images=images.numpy(), evaluations=calls)
        return images, calls

    def images(self, draw: Draw) -> tuple[Tensor, int]:
        """All images of a way to sample, and the evaluations that each took."""
        units = [self.unit(draw, start) for start in range(0, self.count, UNIT)]
        return torch.cat([images for images, _ in units])[: self.count], units[0][1]

    def measure(self, draw: Draw) -> dict[str, float]:
        """Distances by name, and `evaluations`."""
        known = json.loads(self._found.read_text()) if self._found.exists() else {}
        if draw.key not in known:
            images, evaluations = self.images(draw)
            known[draw.key] = {**self._judge(images), "evaluations": evaluations}
            self._found.write_text(json.dumps(known))
        found: dict[str, float] = known[draw.key]
        return found


def measure_row(bench: Bench, draw: Draw, seeds: Sequence[int]) -> Row:
    """A way to sample, with all seeds, beside its limit."""
    runs = [bench.measure(replace(draw, seed=seed)) for seed in seeds]
    limits = [bench.measure(replace(draw.limit, seed=seed)) for seed in seeds]
    distances = {m: median(run[m] for run in runs) for m in METRICS}
    ratios = {m: median(run[m] / end[m] for run, end in zip(runs, limits, strict=True)) for m in METRICS}
    return Row(draw, int(runs[0]["evaluations"]), distances, ratios)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.train:
        args.snapshot, args.data = train(args.train, args.override, args.work)
    bench = Bench(args.snapshot, args.data, args.work, args.images)
    print(f"{bench.count} images a set; floor between halves of the data: {bench.floor}", flush=True)
    rows = []
    for draw in limits(args):
        rows.append(show(measure_row(bench, draw, args.seeds)))
    for sampler, spacing, evaluations in itertools.product(args.samplers, args.spacings, args.evaluations):
        draw = Draw(sampler, spacing, steps_for(sampler, evaluations), args.clip)
        rows.append(show(measure_row(bench, draw, args.seeds)))
    ends = len(limits(args))
    picture(rows[ends:]).save(args.work / "samplers.png")
    print(json.dumps(summary(bench, rows[:ends], rows[ends:])))


def show(row: Row) -> Row:
    print(row.line(), flush=True)
    return row


def limits(args: argparse.Namespace) -> list[Draw]:
    """The limits of the samplers asked for, each once."""
    return list(dict.fromkeys(Draw(name, "uniform", None, args.clip).limit for name in args.samplers))


def summary(bench: Bench, ends: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """The last line: limits, and what each curve needs to come and stay within 5 % of its own."""
    return {
        "images": bench.count,
        "floor": bench.floor,
        "limits": {row.draw.sampler: {m: round(row.distances[m], 4) for m in METRICS} for row in ends},
        "evaluations_within_5_percent": first_within(rows),
        "ratios": {
            name: {row.evaluations: [round(row.ratios[m], 3) for m in METRICS] for row in curve}
            for name, curve in curves(rows).items()
        },
    }


def train(name: str, overrides: Sequence[str], work: Path) -> tuple[str, str]:
    """Snapshot and data of a recipe, trained in the work folder by one process unless it is there."""
    recipe, data_url = ROOT / f"configs/{name}.yaml", f"{work.as_uri()}/data-{RECIPES[name]}"
    run_url = f"{work.as_uri()}/run-{name}-{zlib.crc32(' '.join(overrides).encode()):08x}"
    overrides = [f"run.url={run_url}", f"data.url={data_url}", *overrides]
    steps = load_config(recipe, overrides).train.steps
    url = f"{run_url}/snapshots/{steps:09d}"
    if not storage.exists(f"{url}/model_index.json"):
        _run("tools/make_shards.py", RECIPES[name], data_url)
        overrides += ["cluster.workers=1", "precision=fp32", "logging.grid_images=0"]
        overrides += [f"checkpoint.snapshot_every_steps={steps}", f"checkpoint.every_steps={steps}"]
        _run("launch/train_deepspeed.py", "--config", str(recipe), *overrides)
    return url, data_url


def _run(script: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if subprocess.run([sys.executable, str(ROOT / script), *arguments], env=environment).returncode:
        sys.exit(f"{script} failed; its messages are above")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshot", metavar="URL", help="of an unconditional network")
    parser.add_argument("--data", metavar="URL", help="the data set that it was trained on")
    parser.add_argument("--train", choices=RECIPES, help="a recipe to train in the work folder instead")
    parser.add_argument("--work", type=lambda path: Path(path).resolve(), required=True, help="keeps drawn images")
    parser.add_argument("--images", type=cli.positive, help="in a set; as many as the data set has, if not given")
    parser.add_argument("--samplers", type=_names(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--spacings", type=_names(SPACINGS), default=list(SPACINGS))
    parser.add_argument("--evaluations", type=_counts, default=[10, 15, 20, 25, 50])
    parser.add_argument("--seeds", type=_numbers, default=[0], help="such as 0,1,2")
    parser.add_argument("--clip", choices=("none", "static", "dynamic"), default="static")
    parser.add_argument("override", nargs="*", metavar="section.key=value", help="for --train")
    args = parser.parse_args(argv)
    if bool(args.train) == bool(args.snapshot and args.data):
        parser.error("give --snapshot and --data, or --train")
    if args.override and not args.train:
        parser.error(f"{args.override[0]}: overrides are of the recipe that --train names")
    return args


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is unknown; choose from {', '.join(known)}")
        return names

    return parse


def _counts(text: str) -> list[int]:
    return [cli.positive(part) for part in text.split(",")]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers such as 10,20") from None


if __name__ == "__main__":
    cli.run(main)
