"""From a SIGKILL to the next new step, and from `ray.init` to the first, ours beside Ray Train's way.

A part of tools/bench/training.py.

Run as a Ray job, this file is one of both sides; every step leaves a line in the file STAMPS.
"""

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import psutil  # type: ignore[import-untyped]  # noqa: E402
import torch  # noqa: E402

from ddpm_dist import storage  # noqa: E402
from ddpm_dist.config import Config  # noqa: E402
from ddpm_dist.errors import ClusterError  # noqa: E402
from ddpm_dist.recipe import dump_config, parse_config  # noqa: E402
from ddpm_dist.state.history import latest_step  # noqa: E402
from tools.local.ray_cluster import RayCluster  # noqa: E402
from tools.local.s3_server import S3Server, client_environment  # noqa: E402

EVERY = 5
"""Steps between the checkpoints of both sides."""
PATIENCE_S = 600.0
Found = dict[str, float]


def bench_restart(make_config: Callable[..., Config], server: S3Server, cores: list[int], rounds: int) -> Found:
    """Median seconds of both sides by victim and number of workers, and theirs over ours.

    One worker has a core for itself; two share what there is, on both sides.
    """
    seconds: dict[str, list[float]] = {}
    everything = sorted(os.sched_getaffinity(0))
    for workers in (1, 2):
        for number in range(rounds):
            for side in ("ours", "ray") if number % 2 == 0 else ("ray", "ours"):
                cfg = make_config(f"checkpoint.every_steps={EVERY}", f"cluster.workers={workers}")
                second = make_config(f"checkpoint.every_steps={EVERY}", f"cluster.workers={workers}", "train.steps=3")
                for name, spent in _one_round(
                    side, cfg, second, server, cores if workers == 1 else everything, workers
                ).items():
                    seconds.setdefault(f"{name}_{workers}_{side}", []).append(spent)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = {
        f"restart_ray_of_ours_{name.removesuffix('_ours')}": medians[name.replace("_ours", "_ray")] / ours
        for name, ours in medians.items()
        if name.endswith("_ours") and name.replace("_ours", "_ray") in medians
    }
    return {**{f"restart_seconds_{name}": value for name, value in medians.items()}, **ratios}


VICTIMS: dict[str, dict[str, tuple[str, bool]]] = {
    "rank": {"ours": ("ddpm_dist rank", False), "ray": ("ray::RayTrainWorker", False)},
    "all_ranks": {"ours": ("ddpm_dist rank", True), "ray": ("ray::RayTrainWorker", True)},
    "ray_worker": {"ours": ("ray::RayTrainWorker", False), "ray": ("ray::RayTrainWorker", False)},
    "standby": {"ours": ("ddpm_dist standby", False)},
}
"""Who is killed -> side -> beginning of its title, and whether all of them are."""


def _one_round(side: str, cfg: Config, second: Config, server: S3Server, cores: list[int], workers: int) -> Found:
    """A fresh cluster with one job, of which one victim after the other is killed, and then a second, short job."""
    found: dict[str, float] = {}

    def note(name: str, spent: float) -> None:
        found[name] = spent
        print(f"{side}, {workers} workers, {name}: {spent:.2f} s", flush=True)

    with tempfile.TemporaryDirectory(prefix="ddpm-bench-restart-") as name:
        folder = Path(name)
        with RayCluster(cfg.worker_range[0], {**client_environment(server), "PYTHONPATH": str(ROOT)}) as cluster:
            with _Job(cluster, side, cfg, folder / "first", cores, workers) as job:
                note("first_job", job.first_step())
                for victim, sides in VICTIMS.items():
                    if side in sides and not (victim == "all_ranks" and workers == 1):
                        note(victim, job.kill(*sides[side]))
                job.stop()
            with _Job(cluster, side, second, folder / "second", cores, workers) as job:
                note("job_on_warm_node", job.first_step())
    return found


class _Job:
    """A side's training on a cluster."""

    def __init__(
        self, cluster: RayCluster, side: str, cfg: Config, folder: Path, cores: list[int], workers: int
    ) -> None:
        folder.mkdir()
        self._cluster, self._url, self._stamps, order = cluster, cfg.run.url, folder / "stamps", folder / "order.json"
        self._stamps.touch()
        self._end = folder / "end"
        orders = {"config": dump_config(cfg), "stamps": str(self._stamps), "end": str(self._end)}
        order.write_text(json.dumps({**orders, "folder": str(folder), "cores": cores, "workers": workers}))
        self._lines: list[str] = []
        command = ["python", "tools/bench/training_restart.py", side, str(order)]
        self._thread = threading.Thread(target=_submit, args=(cluster, command, self._lines))

    def __enter__(self) -> "_Job":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def first_step(self) -> float:
        """Seconds from `ray.init` to the end of the first step."""
        self._await(lambda: len(_read(self._stamps)) > 1)
        (_, began), (_, stepped) = _read(self._stamps)[:2]
        return stepped - began

    def kill(self, title: str, all_of_them: bool) -> float:
        """Seconds from SIGKILL to the end of the first step by a new process."""
        done = len(_read(self._stamps))
        self._await(lambda: len(_read(self._stamps)) > done + 2 * EVERY + 2)
        victims = [process for process in self._cluster.processes() if _titled(process, title)]
        old = {pid for pid, _ in _read(self._stamps)}
        for process in victims if all_of_them else victims[:1]:
            process.kill()
        killed = time.time()
        self._await(lambda: any(pid not in old for pid, _ in _read(self._stamps)))
        return next(when for pid, when in _read(self._stamps) if pid not in old) - killed

    def stop(self) -> None:
        """Both sides leave after their next step."""
        self._end.touch()
        self._thread.join(PATIENCE_S)

    def _await(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise SystemExit(
                    "the job of the benchmark makes no steps; its last words:\n" + "\n".join(self._lines[-30:])
                )
            time.sleep(0.02)


def _submit(cluster: RayCluster, command: list[str], lines: list[str]) -> None:
    try:
        cluster.submit(command, lines.append)
    except ClusterError as error:  # also when the cluster is taken away, as here at the end
        lines.append(str(error))


def _titled(process: psutil.Process, title: str) -> bool:
    try:
        return process.cmdline()[0].startswith(title)
    except (psutil.Error, IndexError):
        return False


def _read(stamps: Path) -> list[tuple[int, float]]:
    whole = stamps.read_text().rpartition("\n")[0].splitlines()
    return [(int(line.split()[0]), float(line.split()[1])) for line in whole]


# In the job


def stamp(path: str) -> None:
    """A step is done."""
    with open(path, "a") as file:
        file.write(f"{os.getpid()} {time.time()}\n")


def our_worker(arguments: dict[str, Any], token: str, order: dict[str, Any]) -> None:
    """launch/train.py's worker, with a line for each step."""
    from ddpm_dist.engine.engine import Engine
    from ddpm_dist.training.entry import ray_worker

    os.sched_setaffinity(0, set(order["cores"]))
    step = Engine.step

    def stamped(self: Engine, lr: float) -> Any:
        report = step(self, lr)
        stamp(order["stamps"])
        if os.path.exists(order["end"]):
            storage.publish(storage.join(parse_config(arguments["config"]).run.url, "stop"), b"")
        return report

    Engine.step = stamped  # type: ignore[method-assign]
    ray_worker(arguments, token, lambda: False)


def rays_worker(order: dict[str, Any]) -> None:
    """Ray Train's guide to checkpoints ("Saving and Loading Checkpoints", PyTorch), with this network and batch."""
    import ray.train
    import torch.distributed as dist
    from ray.train import Checkpoint

    from ddpm_dist import snapshot
    from ddpm_dist.training.step import to_model_range

    os.sched_setaffinity(0, set(order["cores"]))
    cfg = parse_config(order["config"])
    shape = (cfg.train.global_batch, cfg.data.channels, cfg.data.image_size, cfg.data.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    model = ray.train.torch.prepare_model(snapshot.build(cfg)[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.train.lr, fused=True)
    start = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(os.path.join(folder, "model.pt"))
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            start = state["step"]
    for step in range(start, cfg.train.steps):
        x, eps = to_model_range(images), torch.randn(shape)
        loss = (model(x + eps, torch.randint(0, 1000, shape[:1])) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stamp(order["stamps"])
        end = torch.tensor(os.path.exists(order["end"]))
        dist.broadcast(end, 0)  # a rank that leaves a step before the other leaves it waiting for ever
        if end:
            return
        if (step + 1) % EVERY == 0:
            with tempfile.TemporaryDirectory() as folder:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, os.path.join(folder, "model.pt"))
                ray.train.report({"loss": loss.item()}, checkpoint=Checkpoint.from_directory(folder))


def main(side: str, order_file: str) -> None:
    order = json.loads(Path(order_file).read_text())
    cfg = parse_config(order["config"])
    stamp(order["stamps"])
    from tools.bench import training_restart as by_name  # functions that workers find by their module

    if side == "ours":
        from ddpm_dist.cluster import train_on_ray, warm_nodes
        from ddpm_dist.training import run_folder
        from ddpm_dist.training.entry import finished

        warm_nodes(cfg)
        token = run_folder.new_token()
        finished(cfg, token)
        train_on_ray(cfg, partial(by_name.our_worker, token=token, order=order), partial(latest_step, cfg.run.url))
    else:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        run = RunConfig(storage_path=order["folder"], name="ray", failure_config=FailureConfig(max_failures=-1))
        TorchTrainer(
            by_name.rays_worker,
            train_loop_config=order,
            scaling_config=ScalingConfig(num_workers=order["workers"]),
            run_config=run,
        ).fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
