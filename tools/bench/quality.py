"""Quality at equal images seen: our recipes beside diffusers, lucidrains' library, NVlabs' EDM and flow_matching.

    python -m tools.bench.quality digits
    python -m tools.bench.quality digits --arms ours,diffusers,lucidrains,edm,flow --edm DIR --flow DIR --seeds 0,1,2
    python -m tools.bench.quality digits --arms ours --seeds 0,1,2 --vary "edm: @digits-edm" --vary "flow: @digits-flow"

Every arm sees as many images, in float32 on one thread, with about as many parameters and learning rate 1e-3; 1,797
samples (or as many as the set has, up to 5,000) are drawn from its EMA weights by its own sampler: ours by the
recipe's, diffusers and lucidrains by 50 steps of DDIM, edm by 35 evaluations of Heun's method, flow by 50. A peer runs
with batches of 32 and EMA 0.999, and with 128 and 0.995: its better one counts. Printed: what `quality_judge.py` says.
`ours` is launch/train_deepspeed.py with the recipe; edm and flow are the code of checkouts that the user names, run by
--python where it needs packages that aren't here, as lucidrains' library does. Last line: one JSON object.
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
from ddpm_dist.diffusion import Process  # noqa: E402
from ddpm_dist.diffusion.gaussian import GaussianDiffusion  # noqa: E402
from ddpm_dist.diffusion.samplers import sample  # noqa: E402
from ddpm_dist.recipe import load_config  # noqa: E402
from tools.bench.quality_judge import Judge  # noqa: E402

RECIPES = {"digits": "digits", "fashion-mnist": "fashion-mnist", "emoji": "emoji32"}
SAMPLER = SamplingConfig(sampler="ddim", steps=50)
LR = 1e-3
PEERS = {"32": ["batch=32", "ema=0.999"], "128": ["batch=128", "ema=0.995"]}
"""The two settings of which every peer gets its better one."""
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
    """name -> (function, settings): those of --arms, a peer's with each of its settings, then each --vary."""
    arms: dict[str, tuple[str, list[str]]] = {}
    for name in filter(None, args.arms.split(",")):
        if name == "ours":
            arms[name] = (name, [])
        else:
            arms |= {f"{name}/{batch}": (name, PEERS[batch]) for batch in args.peers}
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


def ours(bench: Bench, settings: list[str], seed: int) -> Tensor:
    """The real system, one process: `launch/train_deepspeed.py` with the recipe."""
    args = bench.args
    run_url = tempfile.mkdtemp(prefix="run-", dir=bench.work)
    recipe, cfg = _config(args, settings, f"file://{run_url}", bench.data_url)
    settings = [*args.override, *(s for s in settings if s[0] != "@")]
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
    return _draw(unet, diffusion, bench, seed, cfg.sampling)


def _config(args: argparse.Namespace, settings: list[str], run_url: str, data_url: str) -> tuple[Path, Config]:
    """The recipe's file, or that of a setting @NAME, and what it says with all overrides."""
    named = [setting[1:] for setting in settings if setting[0] == "@"]
    recipe = ROOT / "configs" / f"{[args.recipe or RECIPES[args.data], *named][-1]}.yaml"
    urls = [f"run.url={run_url}", f"data.url={data_url}"]
    return recipe, load_config(recipe, [*urls, *args.override, *(s for s in settings if s[0] != "@")])


def diffusers(bench: Bench, settings: list[str], seed: int) -> Tensor:
    """The loop of diffusers' unconditional example: its network, scheduler, AdamW, cosine rate and EMA."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    torch.manual_seed(seed)
    chosen = dict(setting.split("=", 1) for setting in settings)
    batch, decay = int(chosen["batch"]), float(chosen["ema"])
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
    steps = bench.args.images // batch
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=min(500, steps // 10), num_training_steps=steps)
    ema = EMAModel(model.parameters(), decay=decay, use_ema_warmup=False)
    for x_0 in _batches(bench.real, batch, steps, seed):
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
    return _draw(lambda x, t, labels: model(x, t).sample, process, bench, seed, SAMPLER)


def lucidrains(bench: Bench, settings: list[str], seed: int) -> Tensor:
    """denoising-diffusion-pytorch, in its own environment: v-prediction, sigmoid schedule, as its README shows."""
    return _elsewhere("lucidrains", bench.args.lucidrains, [], bench, settings, seed)


def edm(bench: Bench, settings: list[str], seed: int) -> Tensor:
    """NVlabs' EDM: its network, loss and sampler, from the checkout of --edm."""
    return _elsewhere("edm", bench.args.python, [str(bench.args.edm)], bench, settings, seed)


def flow(bench: Bench, settings: list[str], seed: int) -> Tensor:
    """facebookresearch/flow_matching: its image example, from the checkout of --flow."""
    return _elsewhere("flow", bench.args.python, [str(bench.args.flow)], bench, settings, seed)


def _elsewhere(name: str, python: str, checkout: list[str], bench: Bench, settings: list[str], seed: int) -> Tensor:
    """The samples of the script of that name beside this one, run by a Python that has what it needs."""
    images, samples = bench.work / "real.npy", bench.work / f"{name}-{seed}.npy"
    np.save(images, bench.real.numpy())
    options: dict[str, Any] = {"images": bench.args.images, "seed": seed, "lr": LR}
    options |= dict(setting.split("=", 1) for setting in settings)
    script = str(ROOT / "tools" / "bench" / f"quality_{name}.py")
    _run([python, script, *checkout, str(images), str(samples), str(bench.samples), json.dumps(options)])
    return torch.from_numpy(np.load(samples))


ARMS = {"ours": ours, "diffusers": diffusers, "lucidrains": lucidrains, "edm": edm, "flow": flow}


@torch.no_grad()
def _draw(network: Callable[..., Tensor], process: Process, bench: Bench, seed: int, sampler: SamplingConfig) -> Tensor:
    """[samples, C, H, W] uint8."""
    parts = [
        sample(network, process, sampler, seed=seed, indices=indices, shape=bench.shape)
        for indices in torch.arange(bench.samples).split(CHUNK)
    ]
    return ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _batches(real: Tensor, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Shuffled epochs of images in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat((order, torch.randperm(len(real), generator=generator)))
        yield real[order[:batch]].float() / 127.5 - 1
        order = order[batch:]


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
    """Medians over the seeds, and the name of each peer's better setting."""
    summary: dict[str, Any] = {"data": args.data, "images": args.images, "seeds": args.seeds, "floor": floor}
    for arm, runs in results.items():
        summary[arm] = {key: round(median(run[key] for run in runs), 4) for key in runs[0]}
    peers = {arm.partition("/")[0] for arm in results if "/" in arm}
    settings = {peer: [arm for arm in results if arm.startswith(f"{peer}/")] for peer in sorted(peers)}
    best = {peer: min(arms, key=lambda arm: summary[arm]["frechet_lite0"]) for peer, arms in settings.items()}
    return json.dumps({**summary, "better": best})


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
    parser.add_argument("--edm", type=Path, metavar="DIR", help="checkout of NVlabs/edm, for the arm edm")
    parser.add_argument("--flow", type=Path, metavar="DIR", help="checkout of facebookresearch/flow_matching")
    parser.add_argument("--python", default=sys.executable, help="of an environment that has what edm and flow need")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS), help="batches of the peers")
    parser.add_argument("override", nargs="*", metavar="section.key=value", help="for ours")
    parser.add_argument("--vary", action="append", default=[], metavar="NAME[@ARM]: key=value …", help="one more arm")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep each result there and go on from it")
    args = parser.parse_args(argv)
    if strange := set(args.peers) - set(PEERS):
        parser.error(f"--peers: {sorted(strange)[0]!r}; there are {', '.join(PEERS)}")
    unknown = {arm for arm, _ in _arms(args).values()} - set(ARMS)
    if unknown:
        parser.error(f"no arm is called {sorted(unknown)[0]!r}; there are {', '.join(ARMS)}")
    for name, arm in {(arm, getattr(args, arm, "")) for arm, _ in _arms(args).values() if arm in ("edm", "flow")}:
        if not isinstance(arm, Path) or not arm.is_dir():
            parser.error(f"--{name}: give the folder of a checkout; {arm or 'none'} is no folder")
    torch.set_num_threads(1)
    return args


if __name__ == "__main__":
    cli.run(main)
