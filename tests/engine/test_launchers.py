"""What launchers leave in the environment, and who is missed while one waits."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ddpm_dist.engine import World, join as joining, launchers, start
from ddpm_dist.errors import ClusterError, ConfigError
from ddpm_dist.recipe import parse_config
from ddpm_dist.training.entry import _check_size
from ddpm_dist.training.step import BatchPlan
from tools.local.s3_server import free_port

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1234567"}
ROOT = Path(__file__).resolve().parents[2]


def test_open_mpi_is_heard() -> None:
    on_one_machine = launchers.translated({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    assert on_one_machine == {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"
    }  # fmt: skip
    told = launchers.translated({**OPEN_MPI, "MASTER_ADDR": "node1", "MASTER_PORT": "1234"})
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("node1", "1234")
    with pytest.raises(ClusterError, match=r"Open MPI says that this is process 1 of 2 .*set MASTER_ADDR"):
        launchers.translated({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-05,9],b", "gpu03"), ("a1,a2", "a1"), ("n", "n"), ("rack-[7,9]", "rack-7"), ("c[1-2]-ib", "c1-ib")],
)
def test_srun_is_heard(nodes: str, first: str) -> None:
    found = launchers.translated({**SLURM, "SLURM_STEP_NODELIST": nodes})
    assert found == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": first, "MASTER_PORT": str(29500 + 567)
    }  # fmt: skip


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},  # a batch script, which srun didn't start
        {**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "2"},
    ],
)
def test_who_is_alone_or_told_already_stays_so(environment: dict[str, str]) -> None:
    assert launchers.translated(environment) == {}


def test_mpich_is_heard() -> None:
    """Of a process on a machine that has all of them, and of one that srun --mpi=pmi2 started."""
    pmi = {"PMI_RANK": "3", "PMI_SIZE": "4"}
    alone = launchers.translated({**pmi, "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"})
    assert (alone["RANK"], alone["LOCAL_RANK"], alone["MASTER_ADDR"]) == ("3", "3", "127.0.0.1")
    by_srun = launchers.translated({**pmi, **SLURM, "SLURM_STEP_NODELIST": "gpu[1-2]"})
    assert (by_srun["RANK"], by_srun["LOCAL_RANK"], by_srun["MASTER_ADDR"]) == ("3", "1", "gpu1")
    with pytest.raises(ClusterError, match=r"set LOCAL_RANK"):  # srun started mpirun's own process, one on each node
        launchers.translated({**pmi, **SLURM, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"})


def test_a_launcher_that_says_too_little_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"PMI_RANK, PMI_SIZE.*set LOCAL_RANK"):
        launchers.translated({"PMI_RANK": "0", "PMI_SIZE": "2"})


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2", "RANK": "0"}, {**OPEN_MPI, "MASTER_ADDR": "a"}])
def test_a_command_that_is_started_once_says_so(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    launchers.check_single("ddpm-train")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ClusterError, match=r"starts 2 of ddpm-train .*ddpm-train-deepspeed"):
        launchers.check_single("ddpm-train")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    launchers.check_single("ddpm-train")


@pytest.fixture
def left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """WORLD_SIZE and its kin of an earlier job in the shell."""
    values = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(joining, "SAY_S", 0.3)


@pytest.mark.usefixtures("left_over")
def test_who_is_missing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(ClusterError, match=r"2 of 3 .*: rank 1, 2"):
        joining.join("gloo", 0, 3, timeout_s=1.0)
    assert f"haven't come to 127.0.0.1:{os.environ['MASTER_PORT']} yet: rank 1, 2" in caplog.text
    assert "WORLD_SIZE=3" in caplog.text
    assert "to train alone, unset these" in caplog.text
    assert not dist.is_initialized()


@pytest.mark.usefixtures("left_over")
def test_a_rank_whose_first_is_missing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(ClusterError, match=r"rank 0 doesn't answer at 127.0.0.1:"):
        joining.join("gloo", 2, 3, timeout_s=4.0)
    assert "rank 2 waits for rank 0 at 127.0.0.1:" in caplog.text
    assert time.monotonic() - began < 60


WORKER = """
import torch, torch.distributed as dist
from ddpm_dist.engine import init_world
world = init_world()
total = torch.tensor([world.rank + 1.0]); dist.all_reduce(total)
import os; os.write(1, f"rank {world.rank} of {world.size} sums {total.item()}\\n".encode())  # in one piece
dist.destroy_process_group()
"""


def test_two_processes_of_mpirun_are_a_world_of_two() -> None:
    """Open MPI's variables set by hand; it need not be there."""
    port = str(free_port())
    ranks = []
    for rank in "01":
        environment = {name: value for name, value in os.environ.items() if name not in launchers.OURS}
        environment |= {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        environment |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
        ranks.append(
            subprocess.Popen([sys.executable, "-c", WORKER], env=environment, stdout=subprocess.PIPE, text=True)
        )
    said = sorted(rank.communicate(timeout=120)[0] for rank in ranks)
    assert said == ["rank 0 of 2 sums 3.0\n", "rank 1 of 2 sums 3.0\n"]


def test_deepspeed_hears_one_number_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asserts that Open MPI's local rank is its own."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    deepspeed = SimpleNamespace(initialize=lambda **_: (dict(os.environ),))
    monkeypatch.setattr(start, "load_deepspeed", lambda: deepspeed)
    heard = start.initialize(nn.Identity(), None, {}, World(1, 2, 1, torch.device("cpu"), "gloo"))  # type: ignore[arg-type]
    assert (heard["LOCAL_RANK"], heard["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("0", "0")
    assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("1", "1")


def test_torchrun_is_a_launcher(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {name: value for name, value in os.environ.items() if name not in launchers.OURS}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2 sums 3.0", "rank 1 of 2 sums 3.0"], done.stderr


def test_a_number_of_processes_that_does_not_divide_the_batch_is_one_line() -> None:
    cfg = parse_config(
        "{run: {url: memory://r}, data: {url: memory://d, image_size: 32}, train: {steps: 1, global_batch: 12}}"
    )
    _check_size(cfg, 4)
    with pytest.raises(ConfigError, match="12 can't be shared by the 5 processes that were started; start 4 or 6"):
        _check_size(cfg, 5)
    with pytest.raises(ConfigError, match="start 6 or 12"):
        _check_size(cfg, 7)


def test_a_batch_without_useful_divisors_is_said_with_a_better_one() -> None:
    said = BatchPlan.of(131, 1, 64).advice(1, 64)
    assert said is not None
    assert "131 passes of 1" in said
    assert "132 would go in 3" in said
    for batch, world, most in [(128, 1, 128), (128, 4, 8), (96, 2, 32), (131, 131, 128), (100, 1, 32)]:
        assert BatchPlan.of(batch, world, most).advice(world, most) is None
