"""The whole system on this machine, on real data: what `make demo` runs after its set-up.

    python tools/local/demo.py digits|fashion-mnist|emoji [--steps N] [--out DIR]

A real S3 server, a real Ray cluster with token authentication, and jobs submitted to it: training with two DeepSpeed
workers, sampling, evaluation. Run again, it goes on from the last checkpoint. It leaves no process behind.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from ddpm_dist import interrupt

    interrupt.leave_quietly()

from ddpm_dist import cli, storage  # noqa: E402
from ddpm_dist.errors import ClusterError  # noqa: E402
from ddpm_dist.recipe import load_config  # noqa: E402
from tools.local.processes import end, start_bound  # noqa: E402
from tools.local.ray_cluster import RayCluster, ignore_signals  # noqa: E402
from tools.local.s3_server import S3Server, client_environment  # noqa: E402


@dataclass(frozen=True)
class Subject:
    """What is learned."""

    recipe: str
    steps: int | None
    """Optimizer steps that make a demonstration; None: the recipe's own."""
    samples: int | None
    """Images to draw and to compare; None: the recipe's own."""


SUBJECTS = {
    "digits": Subject("configs/digits.yaml", 1500, None),  # half of the recipe: digits can be read by then
    "fashion-mnist": Subject("configs/fashion-mnist.yaml", 2000, 1000),
    "emoji": Subject("configs/emoji32.yaml", 1000, 500),
}
CPUS = 4
"""Logical ones, for Ray: two workers of one thread each, and room for what only waits."""
RAYS_OWN = re.compile(
    r" (cli|packaging|job_manager|dashboard_sdk|sdk|worker|working_dir)\.py:\d+ -- |core_worker\.cc"
    r"|^Running entrypoint for job|^\(RayTrainWorker.*\) Setting up process group"
    r"|^\(TrainController.*\) (Requesting resources|Attempting to start|Started training|- \(ip=)"
)
"""Lines about Ray itself, which go to the log only."""
PREFIX = re.compile(r"^\((RayTrainWorker|TrainController)[^)]*\) ")
"""What Ray puts before the lines of its workers."""


class Demo:
    """The steps, one method each; `announce` numbers them."""

    def __init__(self, name: str, steps: int | None, out: Path) -> None:
        self.name, self.out = name, out
        self.recipe = SUBJECTS[name].recipe
        self.data_url, self.run_url = f"s3://ddpm/data/{name}", f"s3://ddpm/runs/{name}"
        self.overrides = [f"run.url={self.run_url}", f"data.url={self.data_url}"]
        steps, samples = steps or SUBJECTS[name].steps, SUBJECTS[name].samples
        self.overrides += [f"train.steps={steps}"] if steps else []
        self.overrides += [f"evaluation.num_samples={samples}"] if samples else []
        self.cfg = load_config(ROOT / self.recipe, self.overrides)
        self._step, self._began = 0, time.monotonic()

    def announce(self, what: str) -> None:
        self._step += 1
        print(f"\n[{self._step}/7 after {time.monotonic() - self._began:.0f} s] {what}", flush=True)

    def run(self, stack: ExitStack) -> dict[str, Any]:
        """All steps; returns the summary. What is started is put on the stack."""
        self.announce(f"S3 server (SeaweedFS) on loopback; its objects are in {shown(self.out / 's3')}")
        server = stack.enter_context(S3Server(self.out / "s3"))
        environment = client_environment(server)
        os.environ.clear()
        os.environ.update(environment)  # for `storage` in this process
        self.announce(f"{self.name} as WebDataset shards at {self.data_url}")
        self.make_shards(environment)
        self.announce("Ray cluster on this machine, with token authentication")
        cluster = stack.enter_context(RayCluster(CPUS, environment))
        print(f"dashboard at {cluster.address}, while this runs", flush=True)
        workers = self.cfg.cluster.workers
        self.announce(
            f"training job: {workers} DeepSpeed workers, ZeRO-{self.cfg.zero.stage}, {self.cfg.precision}, "
            f"{self.cfg.train.steps:,} steps of {self.cfg.train.global_batch} images, into {self.run_url}"
        )
        self.job(cluster, "train", "launch/train.py")
        self.announce(f"sampling job: {self.cfg.evaluation.num_samples:,} images, {workers} workers")
        samples = self.job(cluster, "sample", "launch/sample.py", f"--num-samples={self.cfg.evaluation.num_samples}")
        self.announce("evaluation job: Fréchet distances to the data")
        evaluation = self.job(cluster, "evaluate", "launch/evaluate.py", f"--samples={samples['samples']}")
        self.announce("summary")
        return self.summary(samples, evaluation["metrics"])

    def make_shards(self, environment: dict[str, str]) -> None:
        """tools/make_shards.py; nothing to do if the index, which is written last, is there."""
        if storage.exists(storage.join(self.data_url, "index.json")):
            print("they are there", flush=True)
            return
        command = [sys.executable, str(ROOT / "tools/make_shards.py"), self.name, self.data_url]
        process = start_bound(command, env={**environment, "OMP_NUM_THREADS": "1"})
        try:
            if process.wait() != 0:
                raise ClusterError(
                    f"make_shards failed; what it said stands above; the data is to be at {self.data_url}"
                )
        finally:
            end(process)

    def job(self, cluster: RayCluster, name: str, script: str, *arguments: str) -> dict[str, Any]:
        """Submits a job, shows its output, keeps all of it in a log; returns the last JSON object it printed."""
        log_path = self.out / "logs" / f"{name}.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {}
        with open(log_path, "w") as log:

            def show(line: str) -> None:
                nonlocal result
                log.write(line + "\n")
                found = as_object(line)
                if found is not None:
                    result = found
                elif not RAYS_OWN.search(line):
                    print(PREFIX.sub("", line), flush=True)

            command = ["python", script, "--config", self.recipe, *arguments, *self.overrides]
            try:
                cluster.submit(command, show)
            except ClusterError as error:
                raise ClusterError(
                    f"{error}; all that it said is in {shown(log_path)}. The same command goes on from here; "
                    f"`rm -r {shown(self.out)}` before it begins anew"
                ) from None
        return result

    def summary(self, samples: dict[str, Any], metrics: dict[str, float]) -> dict[str, Any]:
        """Gathers the numbers, and copies what people look at out of the bucket."""
        training = json.loads(storage.read(storage.join(self.run_url, "summary.json")))
        grid = self.out / "samples.png"
        grid.write_bytes(storage.read(samples["grid"]))
        tensorboard = self.out / "tensorboard"
        shutil.rmtree(tensorboard, ignore_errors=True)
        tensorboard.mkdir()
        events = storage.join(self.run_url, "tensorboard")
        for name in storage.list_objects(events):
            path = tensorboard / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.read(storage.join(events, name)))
        names = ("frechet_pixel", "frechet_pixel_floor", "frechet_lite0", "frechet_lite0_floor")
        return {
            "images_seen": training["images_seen"],
            "images_per_second": training["images_per_second"],
            "data_wait_fraction": training["data_wait_fraction"],
            **{name: metrics[name] for name in names},
            "grid": str(grid),
            "tensorboard": str(tensorboard),
            "snapshot": samples["snapshot"],
            "samples": samples["samples"],
        }

    def tell(self, summary: dict[str, Any]) -> None:
        """The summary for people."""
        s, seconds = summary, time.monotonic() - self._began
        out = shown(self.out)
        print(
            f"  images seen         {s['images_seen']:,} ({s['images_per_second']:,.0f}/s, "
            f"{s['data_wait_fraction']:.1%} of the time waiting for data)\n"
            f"  Fréchet distance    {s['frechet_pixel']:.3g} in pixels "
            f"(real against real {s['frechet_pixel_floor']:.3g})\n"
            f"                      {s['frechet_lite0']:.3g} in EfficientNet-Lite0 features "
            f"(real against real {s['frechet_lite0_floor']:.3g})\n"
            f"  samples             {shown(Path(s['grid']))}, all of them at {s['samples']}\n"
            f"  snapshot            {s['snapshot']}\n"
            f"  curves              .venv/bin/tensorboard --logdir {shown(Path(s['tensorboard']))}\n"
            f"  into the bucket     .venv/bin/python tools/local/s3_server.py --dir {out}/s3 -- bash\n"
            f"  in numbers          {out}/summary.json\n"
            f"{seconds:.0f} s in all",
            flush=True,
        )


def as_object(line: str) -> dict[str, Any] | None:
    """The JSON object that a line is; None if it is none."""
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def shown(path: Path) -> str:
    """A path as short as it can be from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", choices=list(SUBJECTS), help="what to learn")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps in all, instead of a demonstration's")
    parser.add_argument("--out", type=Path, default=ROOT / "out/demo", metavar="DIR", help="where everything goes")
    args = parser.parse_args(argv)
    demo = Demo(args.data, args.steps, args.out.resolve())
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell in the background ignores Ctrl-C
        signal.signal(number, signal.default_int_handler)
    stack = ExitStack()
    try:
        summary = demo.run(stack)
        text = json.dumps(summary, indent=2) + "\n"
        (demo.out / "summary.json").write_text(text)
        demo.tell(summary)
    finally:
        ignore_signals()
        stack.close()


if __name__ == "__main__":
    cli.run(main)
