"""Throughput of sampling jobs and evaluations, each beside what it is to be compared with.

    python -m tools.bench.sampling                        # all parts, about 15 minutes on 2 cores
    python -m tools.bench.sampling --parts job --rounds 5
    python -m tools.bench.sampling --parts diffusers --recipe configs/cifar10.yaml --images 32 --steps 10

job         images/s of a job with 1 and 2 workers (one thread each, started already) beside a bare loop of the same
            network and sampler in 1 and 2 processes; the job also encodes, publishes and writes its index
diffusers   the job with 1 worker beside diffusers' DDIM pipeline with the same weights, steps and batch, bf16 both
evaluate    Fréchet distance of 10,000 stored images with 2 workers beside torchmetrics in one process
first       seconds from the command line to the first published image, on a cluster that is up

The two sides alternate in one run, and ratios are medians over rounds. Last line: one JSON object of the ratios.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch is imported, here and in every process started from here
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - the 15 that Ray gives would compare unequals on a busy machine
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ddpm_dist import cli, snapshot, storage  # noqa: E402
from ddpm_dist.cluster.pool import ActorPool  # noqa: E402
from ddpm_dist.config import ClusterConfig, Precision, SamplingConfig  # noqa: E402
from ddpm_dist.data import decode  # noqa: E402
from ddpm_dist.data.stream import iterate  # noqa: E402
from ddpm_dist.data.writer import EncodedSample, write_index, write_shard  # noqa: E402
from ddpm_dist.evaluation import job as evaluation_job  # noqa: E402
from ddpm_dist.evaluation.features import Lite0  # noqa: E402
from ddpm_dist.evaluation.order import Order as EvaluationOrder  # noqa: E402
from ddpm_dist.recipe import dump_config, load_config  # noqa: E402
from ddpm_dist.sampling import job  # noqa: E402
from ddpm_dist.sampling.worker import DTYPES  # noqa: E402
from tools.bench.sampling_loops import Loops, images_per_s  # noqa: E402

CLUSTER = ClusterConfig(wait_seconds=120)
DEADLINE_S = 300.0


class Bench:
    """A snapshot of random weights, and how many images a measurement draws."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self._runs = args, f"file://{folder}", 0
        cfg = load_config(args.recipe, [f"run.url=file://{folder}/run", f"data.url=file://{folder}/data"])
        self.shape = (cfg.data.channels, cfg.data.image_size, cfg.data.image_size)
        self.snapshot = f"file://{folder}/snapshot"
        network, diffusion = snapshot.build(cfg)
        info = {"kind": "ema", "step": 1, "config": dump_config(cfg)}
        snapshot.save_snapshot(self.snapshot, network, network.config, diffusion, info)

    def settings(self, precision: Precision) -> SamplingConfig:
        batch, images = self.args.batch, self.args.images
        unit = max(batch, images // 16 // batch * batch)  # the last units decide how evenly two workers end
        return SamplingConfig(
            sampler="ddim", steps=self.args.steps, batch_size=batch, unit_size=unit, precision=precision
        )

    def job(self, pool: ActorPool, images: int, precision: Precision) -> float:
        """Images/s of a whole job on workers that are there."""
        self._runs += 1
        order = job.Order(self.snapshot, f"{self.folder}/out{self._runs}", images, sampling=self.settings(precision))
        return images_per_s(images, lambda: job.run([order], (1, 1), CLUSTER, pool))


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    folder = Path(tempfile.mkdtemp(prefix="ddpm-bench-sampling-"))
    try:
        bench = Bench(args, folder)
        ratios: dict[str, float] = {}
        for part in args.parts.split(","):
            ratios |= PARTS[part](bench)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({name: round(value, 4) for name, value in ratios.items()}), flush=True)


def bench_job(bench: Bench) -> dict[str, float]:
    """The job beside the bare loop, with one worker and with two."""
    images, found = bench.args.images, {}
    for workers in (1, 2):
        with (
            ActorPool(job.worker_factory(CLUSTER), (workers, workers), CLUSTER) as pool,
            Loops(bench.snapshot, bench.settings("fp32"), bench.shape, workers) as loops,
        ):
            bench.job(pool, workers * bench.settings("fp32").unit_size, "fp32")
            loops.run(bench.args.batch)
            ratios = []
            for _ in range(bench.args.rounds):
                bare, ours = loops.run(images), bench.job(pool, images, "fp32")
                ratios.append(ours / bare)
                _say(f"{workers} workers: job {ours:.1f} images/s, bare loops {bare:.1f}", ours / bare)
        found[f"job_of_bare_{workers}"] = median(ratios)
    return found


def bench_diffusers(bench: Bench) -> dict[str, float]:
    """The job with one worker beside diffusers' pipeline, bf16 both."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline

    torch.set_num_threads(1)
    args = bench.args
    loaded = DDPMPipeline.from_pretrained(bench.snapshot.removeprefix("file://"))
    unet = loaded.unet.to(DTYPES["bf16"]).eval()
    # The pipeline turns its image into a NumPy array, which has no bf16: the network's answer becomes float32.
    unet.register_forward_pre_hook(lambda _, given: (given[0].to(DTYPES["bf16"]), *given[1:]))
    unet.register_forward_hook(_widen)
    pipeline = DDIMPipeline(unet=unet, scheduler=DDIMScheduler.from_config(loaded.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)

    def theirs(images: int) -> float:
        def draw() -> None:
            for _ in range(images // args.batch):
                pipeline(batch_size=args.batch, num_inference_steps=args.steps, eta=0.0, output_type="np")

        return images_per_s(images // args.batch * args.batch, draw)

    ratios = []
    with ActorPool(job.worker_factory(CLUSTER), (1, 1), CLUSTER) as pool:
        bench.job(pool, args.batch, "bf16")
        theirs(args.batch)
        for _ in range(args.rounds):
            reference, ours = theirs(args.images), bench.job(pool, args.images, "bf16")
            ratios.append(ours / reference)
            _say(f"bf16: job {ours:.1f} images/s, diffusers {reference:.1f}", ours / reference)
    return {"job_of_diffusers_bf16": median(ratios)}


def _widen(module: torch.nn.Module, given: Any, output: Any) -> Any:
    output.sample = output.sample.float()
    return output


def bench_evaluate(bench: Bench) -> dict[str, float]:
    """Fréchet distance of stored images in Lite0 features, the reference's statistics being there on both sides."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    torch.set_num_threads(1)
    count = bench.args.stored
    samples = _make_set(f"{bench.folder}/stored", count, seed=1)
    data = _make_set(f"{bench.folder}/reference", 500, seed=2)
    metric = FrechetInceptionDistance(feature=_Module(Lite0()), normalize=False)
    for batch in _batches(data):
        metric.update(batch, real=True)

    def theirs() -> None:
        for batch in _batches(samples):
            metric.update(batch, real=False)
        metric.compute()
        metric.reset()

    order = EvaluationOrder(samples=samples, data=data, metrics=("frechet_lite0",))
    ratios = []
    metric.reset_real_features = False
    with ActorPool(evaluation_job.worker_factory(CLUSTER), (2, 2), CLUSTER) as pool:

        def ours() -> None:
            evaluation_job.evaluate(order, pool, 2, CLUSTER)

        evaluation_job.evaluate(EvaluationOrder(samples=data, data=data, metrics=("frechet_lite0",)), pool, 2, CLUSTER)
        for _ in range(bench.args.rounds):
            reference, own = images_per_s(count, theirs), images_per_s(count, ours)
            ratios.append(own / reference)
            _say(f"evaluation: 2 workers {own:.0f} images/s, torchmetrics {reference:.0f}", own / reference)
    return {"evaluate_of_torchmetrics_2": median(ratios)}


class _Module(torch.nn.Module):
    """Our Lite0 as torchmetrics wants it."""

    def __init__(self, network: Lite0) -> None:
        super().__init__()
        self._network, self.num_features = network, network.dim

    def forward(self, images: Tensor) -> Tensor:
        return self._network(images).features


def bench_first(bench: Bench) -> dict[str, float]:
    """Seconds from the command to the first receipt, on a cluster that is up but has no workers yet."""
    from tools.local.ray_cluster import RayCluster

    seconds = []
    with RayCluster(2, os.environ) as cluster:
        for number in range(bench.args.rounds):
            out = f"{bench.folder}/first{number}"
            command = ["ray", "job", "submit", "--no-wait", "--working-dir", str(ROOT), "--"]
            command += ["python", "launch/sample.py", "--snapshot", bench.snapshot]
            command += ["--out", out, "--num-samples", str(bench.args.batch)]
            command += [f"sampling.batch_size={bench.args.batch}", f"sampling.unit_size={bench.args.batch}"]
            command += ["sampling.sampler=ddim", f"sampling.steps={bench.args.steps}", "--workers", "1"]
            start = time.perf_counter()
            subprocess.run(command, check=True, env=cluster.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while not storage.list_objects(f"{out}/receipts"):
                if time.perf_counter() - start > DEADLINE_S:
                    raise SystemExit(f"no image after {DEADLINE_S:.0f} s")
                time.sleep(0.05)
            seconds.append(time.perf_counter() - start)
            print(f"first {bench.args.batch} images after {seconds[-1]:.1f} s", flush=True)
    return {"seconds_to_first_image": median(seconds)}


def _make_set(url: str, count: int, seed: int) -> str:
    """Smooth random colour images of 32 px, as PNG."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    images = torch.nn.functional.interpolate(noise, (32, 32), mode="bicubic").mul(60).add(128).clamp(0, 255)
    pixels = images.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    shards = []
    for start in range(0, count, 500):
        part = pixels[start : start + 500]
        encoded = [EncodedSample(f"{start + i:06d}", decode.encode_png(image), "png") for i, image in enumerate(part)]
        shards.append(write_shard(url, f"shard-{start:06d}.tar", encoded))
    write_index(url, shards)
    return url


def _batches(url: str) -> "list[Tensor]":
    images = [torch.from_numpy(sample.image.copy()) for sample in iterate(url)]
    return list(torch.stack(images).split(64))


def _say(text: str, ratio: float) -> None:
    print(f"{text}, ratio {ratio:.3f}", flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B")
    parser.add_argument("--recipe", default=str(ROOT / "configs/digits.yaml"), metavar="FILE")
    parser.add_argument("--images", type=cli.positive, default=1024, help="images of a measurement")
    parser.add_argument("--batch", type=cli.positive, default=64)
    parser.add_argument("--steps", type=cli.positive, default=50, help="steps of DDIM")
    parser.add_argument("--stored", type=cli.positive, default=10_000, help="stored images that are evaluated")
    parser.add_argument("--rounds", type=cli.positive, default=5)
    args = parser.parse_args(argv)
    for part in args.parts.split(","):
        if part not in PARTS:
            parser.error(f"--parts: {part!r} is unknown; choose from {', '.join(PARTS)}")
    return args


PARTS: dict[str, Callable[[Bench], dict[str, float]]] = {
    "job": bench_job,
    "diffusers": bench_diffusers,
    "evaluate": bench_evaluate,
    "first": bench_first,
}

if __name__ == "__main__":
    cli.run(main)
