"""From SIGKILL of a worker to the next new step, ours beside Ray Train's way: a part of tools/bench/training.py.

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

from ddpm_dist.config import Config  # noqa: E402
from ddpm_dist.errors import ClusterError  # noqa: E402
from ddpm_dist.recipe import dump_config, parse_config  # noqa: E402
from ddpm_dist.state.history import latest_step  # noqa: E402
from tools.local.ray_cluster import RayCluster  # noqa: E402
from tools.local.s3_server import S3Server, client_environment  # noqa: E402

EVERY = 5
"""Steps between the checkpoints of both sides."""
PATIENCE_S = 600.0


def bench_restart(make_config: Callable[..., Config], server: S3Server, core: int, rounds: int) -> dict[str, float]:
    """Median seconds of both sides, and theirs over ours; one worker on `core`."""
    seconds: dict[str, list[float]] = {"ours": [], "ray": []}
    for _ in range(rounds):
        for side, found in seconds.items():
            cfg = make_config(f"checkpoint.every_steps={EVERY}", "cluster.workers=1")
            found.append(_one_kill(side, cfg, server, core))
            print(f"{side}: {found[-1]:.1f} s from SIGKILL to the next step", flush=True)
    medians = {side: statistics.median(found) for side, found in seconds.items()}
    return {
        "restart_seconds": medians["ours"],
        "restart_seconds_ray": medians["ray"],
        "restart_ray_of_ours": medians["ray"] / medians["ours"],
    }


def _one_kill(side: str, cfg: Config, server: S3Server, core: int) -> float:
    """A fresh cluster and job, killed once after two checkpoints."""
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-restart-") as folder:
        stamps, order = Path(folder) / "stamps", Path(folder) / "order.json"
        stamps.touch()
        order.write_text(
            json.dumps({"config": dump_config(cfg), "stamps": str(stamps), "folder": folder, "core": core})
        )
        lines: list[str] = []
        with RayCluster(1, {**client_environment(server), "PYTHONPATH": str(ROOT)}) as cluster:
            command = ["python", "tools/bench/training_restart.py", side, str(order)]
            job = threading.Thread(target=_submit, args=(cluster, command, lines))
            job.start()
            _await(lambda: len(stamps.read_text().splitlines()) > 2 * EVERY + 2, job, lines)
            (worker,) = [process for process in cluster.processes() if _is_worker(process)]
            worker.kill()
            killed = time.time()
            _await(lambda: any(pid != worker.pid for pid, _ in _read(stamps)), job, lines)
        job.join()
        return next(when for pid, when in _read(stamps) if pid != worker.pid) - killed


def _submit(cluster: RayCluster, command: list[str], lines: list[str]) -> None:
    try:
        cluster.submit(command, lines.append)
    except ClusterError as error:  # also when the cluster is taken away, as here at the end
        lines.append(str(error))


def _await(true: Callable[[], bool], job: threading.Thread, lines: list[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        if not job.is_alive() or time.monotonic() > deadline:
            raise SystemExit("the job of the benchmark makes no steps; its last words:\n" + "\n".join(lines[-30:]))
        time.sleep(0.02)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return bool(process.cmdline()[0].startswith("ray::RayTrainWorker"))
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

    os.sched_setaffinity(0, {order["core"]})
    step = Engine.step

    def stamped(self: Engine, lr: float) -> Any:
        report = step(self, lr)
        stamp(order["stamps"])
        return report

    Engine.step = stamped  # type: ignore[method-assign]
    ray_worker(arguments, token, lambda: False)


def rays_worker(order: dict[str, Any]) -> None:
    """Ray Train's guide to checkpoints ("Saving and Loading Checkpoints", PyTorch), with this network and batch."""
    import ray.train
    from ray.train import Checkpoint

    from ddpm_dist import snapshot
    from ddpm_dist.training.step import to_model_range

    os.sched_setaffinity(0, {order["core"]})
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
        if (step + 1) % EVERY == 0:
            with tempfile.TemporaryDirectory() as folder:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, os.path.join(folder, "model.pt"))
                ray.train.report({"loss": loss.item()}, checkpoint=Checkpoint.from_directory(folder))


def main(side: str, order_file: str) -> None:
    order = json.loads(Path(order_file).read_text())
    cfg = parse_config(order["config"])
    from tools.bench import training_restart as by_name  # functions that workers find by their module

    if side == "ours":
        from ddpm_dist.cluster.train import train_on_ray
        from ddpm_dist.training import run_folder
        from ddpm_dist.training.entry import finished

        token = run_folder.new_token()
        finished(cfg, token)
        train_on_ray(cfg, partial(by_name.our_worker, token=token, order=order), partial(latest_step, cfg.run.url))
    else:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        run = RunConfig(storage_path=order["folder"], name="ray", failure_config=FailureConfig(max_failures=-1))
        TorchTrainer(
            by_name.rays_worker, train_loop_config=order, scaling_config=ScalingConfig(num_workers=1), run_config=run
        ).fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
