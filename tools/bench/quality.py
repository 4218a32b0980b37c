"""Quality at equal images seen: our recipe beside diffusers' training example and lucidrains' library.

    python -m tools.bench.quality digits
    python -m tools.bench.quality digits --arms ours,diffusers,lucidrains --images 100000 --seeds 0,1,2
    python -m tools.bench.quality digits --arms ours --seeds 0,1,2 --vary "eps: diffusion.prediction=eps"


Every arm trains on the same images for as many images, in float32 on one thread, and 1,797 images (or as many as
the set has, up to 5,000) are drawn from its EMA weights by 50 steps of deterministic DDIM. Printed: Fréchet
distances to the whole set in pixels and in EfficientNet-Lite0 features, each beside the floor between two halves of
the set. `ours` is the real system (launch/train_deepspeed.py with the recipe). The peers take the same number of
parameters, learning rate 1e-3 and EMA 0.995. lucidrains' library needs torchvision, so it lives in a virtual
environment of its own: --lucidrains PYTHON. Last line: one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ddpm_dist import cli, snapshot  # noqa: E402
from ddpm_dist.config import Config, DiffusionConfig, SamplingConfig  # noqa: E402
from ddpm_dist.data.stream import iterate  # noqa: E402
from ddpm_dist.diffusion.gaussian import GaussianDiffusion  # noqa: E402
from ddpm_dist.diffusion.samplers import sample  # noqa: E402
from ddpm_dist.evaluation.distances import frechet_of_features  # noqa: E402
from ddpm_dist.evaluation.features import Pixel, lite0  # noqa: E402
from ddpm_dist.recipe import load_config  # noqa: E402

RECIPES = {"digits": "digits", "fashion-mnist": "fashion-mnist", "emoji": "emoji32"}
SAMPLER = SamplingConfig(sampler="ddim", steps=50)
LR, EMA_DECAY, BATCH = 1e-3, 0.995, 128
CHUNK = 256


@dataclass(frozen=True)
class Bench:
    """What all arms share: real uint8 [N, C, H, W], their shards, a folder to work in, and how many to draw."""

    args: argparse.Namespace
    real: Tensor
    data_url: str
    work: Path
    samples: int

    @property
    def shape(self) -> tuple[int, int, int]:
        c, h, w = self.real.shape[1:]
        return c, h, w


def main(argv: Sequence[str] | None = None) -> None:
    """Trains each arm for each seed, alternating, and prints the table."""
    args = _arguments(argv)
    for arm, settings in _arms(args).values():
        if arm == "ours":
            _config(args, settings, "file:///run", "file:///data")  # a mistake is said before the work
    with tempfile.TemporaryDirectory(prefix="ddpm-quality-", ignore_cleanup_errors=True) as work:
        _measure(args, Path(work))


def _measure(args: argparse.Namespace, work: Path) -> None:
    data_url = _make_data(args.data, work)
    real = torch.stack([torch.as_tensor(s.image) for s in iterate(data_url)])
    bench = Bench(args, real, data_url, work, min(len(real), args.samples))
    judge = Judge(real)
    print(f"{len(real)} images {tuple(real.shape[1:])}; floor between halves: {judge.floor()}", flush=True)
    results: dict[str, list[dict[str, float]]] = {}
    kept = _kept(args.results)
    for seed in args.seeds:
        for name, (arm, settings) in _arms(args).items():
            key = json.dumps([args.data, args.recipe, args.images, bench.samples, seed, name, settings, args.override])
            if key not in kept:
                start = time.perf_counter()
                kept[key] = judge(ARMS[arm](bench, settings, seed))
                kept[key]["seconds"] = time.perf_counter() - start
                if args.results:
                    with args.results.open("a") as file:
                        print(json.dumps({"key": key, "found": kept[key]}), file=file)
            results.setdefault(name, []).append(kept[key])
            print(f"  seed {seed} {name:16s} " + "  ".join(f"{k} {v:.4g}" for k, v in kept[key].items()), flush=True)
    print(_report(args, judge.floor(), results))


def _arms(args: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    """name -> (function, settings): those of --arms, then each --vary."""
    arms: dict[str, tuple[str, list[str]]] = {name: (name, []) for name in args.arms.split(",") if name}
    for text in args.vary:
        head, _, settings = text.partition(":")
        name, _, arm = head.strip().partition("@")
        arms[name] = (arm or "ours", settings.split())
    return arms


def _kept(path: Path | None) -> dict[str, dict[str, float]]:
    """Results of an earlier start."""
    if path is None or not path.exists():
        return {}
    return {row["key"]: row["found"] for row in map(json.loads, path.read_text().splitlines())}


class Judge:
    """Fréchet distances of uint8 images [N, C, H, W] to the whole real set."""

    def __init__(self, real: Tensor) -> None:
        _, channels, height, width = real.shape
        self._networks: dict[str, Callable[[Tensor], Tensor]] = {
            "frechet_lite0": lite0,
            "frechet_pixel": lambda images: Pixel((channels, height, width))(images).features,
        }
        self._real = {name: network(real) for name, network in self._networks.items()}

    def __call__(self, images: Tensor) -> dict[str, float]:
        return {n: frechet_of_features(network(images), self._real[n]) for n, network in self._networks.items()}

    def floor(self) -> dict[str, float]:
        """Between two random halves of the real images, so at half the count."""
        order = torch.randperm(len(self._real["frechet_pixel"]), generator=torch.Generator().manual_seed(0))
        a, b = order.chunk(2)
        return {name: round(frechet_of_features(f[a], f[b]), 4) for name, f in self._real.items()}


def ours(bench: Bench, settings: list[str], seed: int) -> Tensor:
    """The real system, one process: `launch/train_deepspeed.py` with the recipe."""
    args = bench.args
    run_url = tempfile.mkdtemp(prefix="run-", dir=bench.work)
    recipe, cfg = _config(args, settings, f"file://{run_url}", bench.data_url)
    settings = [*args.override, *settings]
    steps = args.images // cfg.train.global_batch
    overrides = [
        f"run.url={cfg.run.url}", f"run.seed={seed}", f"data.url={bench.data_url}", "cluster.workers=1",
        f"train.steps={steps}", f"checkpoint.snapshot_every_steps={steps}", f"checkpoint.every_steps={steps}",
        "precision=fp32", "logging.grid_images=0", *settings,
    ]  # fmt: skip
    if cfg.train.decay_steps:
        overrides.append(f"train.decay_steps={steps}")
    command = [sys.executable, str(ROOT / "launch/train_deepspeed.py"), "--config", str(recipe), *overrides]
    _run(command)
    unet, diffusion = snapshot.load_snapshot(f"{cfg.run.url}/snapshots/{steps:09d}")
    return _draw(unet, diffusion, bench, seed)


def _config(args: argparse.Namespace, settings: list[str], run_url: str, data_url: str) -> tuple[Path, Config]:
    """The recipe's file, and what it says with all overrides."""
    recipe = ROOT / "configs" / f"{args.recipe or RECIPES[args.data]}.yaml"
    urls = [f"run.url={run_url}", f"data.url={data_url}"]
    return recipe, load_config(recipe, [*urls, *args.override, *settings])


def diffusers(bench: Bench, settings: list[str], seed: int) -> Tensor:
    """The loop of diffusers' unconditional example: its network, scheduler, AdamW, cosine rate and EMA."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    torch.manual_seed(seed)
    channels, size, _ = bench.shape
    levels = (32, 64) if size == 8 else (32, 64, 64)
    model = UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=2, block_out_channels=levels,
        down_block_types=("DownBlock2D",) * (len(levels) - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (len(levels) - 1),
    )  # fmt: skip
    print(f"    diffusers: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    steps = bench.args.images // BATCH
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=min(500, steps // 10), num_training_steps=steps)
    ema = EMAModel(model.parameters(), decay=EMA_DECAY, use_ema_warmup=False)
    for x_0 in _batches(bench.real, steps, seed):
        noise = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (len(x_0),))
        loss = torch.nn.functional.mse_loss(model(scheduler.add_noise(x_0, noise, t), t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    process = GaussianDiffusion.from_config(DiffusionConfig())
    return _draw(lambda x, t, labels: model(x, t).sample, process, bench, seed)


def lucidrains(bench: Bench, settings: list[str], seed: int) -> Tensor:
    """denoising-diffusion-pytorch, in its own environment: v-prediction, sigmoid schedule, as its README shows."""
    images, samples = bench.work / "real.npy", bench.work / f"lucidrains-{seed}.npy"
    np.save(images, bench.real.numpy())
    script = ROOT / "tools" / "bench" / "quality_lucidrains.py"
    options = {"images": bench.args.images, "seed": seed, "lr": LR, "ema": EMA_DECAY, "batch": BATCH}
    options |= dict(setting.split("=", 1) for setting in settings)
    command = [str(script), str(images), str(samples), str(bench.samples), json.dumps(options)]
    _run([bench.args.lucidrains, *command])
    return torch.from_numpy(np.load(samples))


ARMS = {"ours": ours, "diffusers": diffusers, "lucidrains": lucidrains}


@torch.no_grad()
def _draw(network: Callable[..., Tensor], process: GaussianDiffusion, bench: Bench, seed: int) -> Tensor:
    """[samples, C, H, W] uint8 by the common sampler."""
    parts = [
        sample(network, process, SAMPLER, seed=seed, indices=indices, shape=bench.shape)
        for indices in torch.arange(bench.samples).split(CHUNK)
    ]
    return ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _batches(real: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Shuffled epochs of images in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.cat((order, torch.randperm(len(real), generator=generator)))
        yield real[order[:BATCH]].float() / 127.5 - 1
        order = order[BATCH:]


def _make_data(name: str, work: Path) -> str:
    url = f"{work.as_uri()}/data"
    _run([sys.executable, str(ROOT / "tools/make_shards.py"), name, url])
    return url


def _run(command: list[str]) -> None:
    """Runs a command quietly; its output is shown if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def _report(args: argparse.Namespace, floor: dict[str, float], results: dict[str, list[dict[str, float]]]) -> str:
    summary: dict[str, Any] = {"data": args.data, "images": args.images, "seeds": args.seeds, "floor": floor}
    for arm, runs in results.items():
        summary[arm] = {key: round(median(run[key] for run in runs), 4) for key in runs[0]}
    return json.dumps(summary)


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=RECIPES)
    parser.add_argument("--arms", default="ours,diffusers", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--images", type=cli.positive, default=100_000, help="training images that each arm sees")
    parser.add_argument("--seeds", type=_seeds, default=[0], metavar="0,1,…")
    parser.add_argument("--recipe", help="another file of configs/ for ours, such as digits-eps")
    parser.add_argument("--samples", type=cli.positive, default=5000, help="drawn of each arm, at most")
    parser.add_argument("--lucidrains", default="python", metavar="PYTHON", help="of an environment that has it")
    parser.add_argument("override", nargs="*", metavar="section.key=value", help="for ours")
    parser.add_argument("--vary", action="append", default=[], metavar="NAME[@ARM]: key=value …", help="one more arm")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep each result there and go on from it")
    args = parser.parse_args(argv)
    unknown = {arm for arm, _ in _arms(args).values()} - set(ARMS)
    if unknown:
        parser.error(f"no arm is called {sorted(unknown)[0]!r}; there are {', '.join(ARMS)}")
    if any(arm == "diffusers" and settings for arm, settings in _arms(args).values()):
        parser.error("--vary: diffusers' example is taken as it is; vary ours or lucidrains")
    torch.set_num_threads(1)
    return args


if __name__ == "__main__":
    cli.run(main)
