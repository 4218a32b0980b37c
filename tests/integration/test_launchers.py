"""A whole short training under each launcher that is found here ends with the bytes of two processes started by hand.

What isn't found is said: `apt-get install openmpi-bin mpich slurmctld slurmd slurm-client` brings all (Debian).
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from ddpm_dist.engine.launchers import OURS
from tests.integration import jobs
from tools.local.processes import start_family
from tools.local.s3_server import free_port

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
STEPS = 8
SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_res
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES
"""
"""A cluster of this machine alone, without munge: who is on this machine is who he says."""

Environment = Mapping[str, str]


def found(*programs: str, package: str) -> None:
    """Skips a test where one of these isn't installed."""
    lacking = [program for program in programs if shutil.which(program) is None]
    if lacking:
        pytest.skip(f"{', '.join(lacking)}: not installed here; apt-get install {package}")


class Trial:
    """A training of two processes, into a folder of its own."""

    def __init__(self, folder: Path, data_url: str) -> None:
        self.run_url = (folder / "run").as_uri()
        self.log = folder / "log"
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in OURS},
            "PYTHONPATH": str(jobs.ROOT),
            "DS_ACCELERATOR": "cpu",
        }
        self.script = [
            str(jobs.ROOT / "launch/train_deepspeed.py"), "--config", str(jobs.ROOT / "configs/digits.yaml"),
            *jobs.SMALL, f"run.url={self.run_url}", f"data.url={data_url}", f"train.steps={STEPS}",
            "cluster.workers=2",
        ]  # fmt: skip

    def start(self, beginning: Sequence[str], more: Environment) -> "subprocess.Popen[bytes]":
        """The command of a launcher, whose processes all end with its guardian."""
        with self.log.open("a") as out:
            return start_family(
                [*beginning, *self.script], self.log.parent / "none", env={**self.environment, **more}, stdout=out,
                stderr=out, cwd=jobs.ROOT,
            )  # fmt: skip

    def finish(self, *processes: "subprocess.Popen[bytes]") -> str:
        """The SHA-256 of the weights that they end with."""
        try:
            deadline = time.monotonic() + 400
            for process in processes:
                process.wait(max(1.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                assert process.stdin is not None
                process.stdin.close()
                process.wait()
        text = self.log.read_text()
        assert f"finished at step {STEPS}" in text, text[-6000:]
        assert text.count("a new run begins") == 1, "one training, not one for each process"
        assert "Traceback" not in text, text[-6000:]
        return jobs.weights_sha256(self.run_url, STEPS)


def by_hand(trial: Trial) -> str:
    port = str(free_port())
    ranks = [
        trial.start(
            [sys.executable],
            {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in "01"
    ]
    return trial.finish(*ranks)


def deepspeed(trial: Trial) -> str:
    program = str(Path(sys.executable).with_name("deepspeed"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return trial.finish(trial.start([program, "--num_gpus=2", f"--master_port={free_port()}"], {"PATH": path}))


def torchrun(trial: Trial) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return trial.finish(trial.start(command, {}))


def open_mpi(trial: Trial) -> str:
    found("mpirun.openmpi", package="openmpi-bin")
    command = ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]
    return trial.finish(trial.start([*command, sys.executable], {"MASTER_PORT": str(free_port())}))


def mpich(trial: Trial) -> str:
    found("mpiexec.hydra", package="mpich")
    return trial.finish(trial.start(["mpiexec.hydra", "-n", "2", sys.executable], {"MASTER_PORT": str(free_port())}))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """SLURM's daemons on this machine; what srun needs in its environment."""
    found("srun", "slurmctld", "slurmd", package="slurmctld slurmd slurm-client")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf, user = folder / "slurm.conf", subprocess.check_output(["id", "-un"], text=True).strip()
    ports = {"controller": free_port(), "node": free_port()}
    conf.write_text(SLURM_CONF.format(folder=folder, user=user, cpus=os.cpu_count(), **ports))
    with (folder / "log").open("w") as out:
        daemons = [
            start_family([*command, "-D", "-f", str(conf)], folder / "none", stdout=out, stderr=out)
            for command in (["slurmctld"], ["slurmd", "-N", "localhost"])
        ]
    environment = {"SLURM_CONF": str(conf)}
    try:
        deadline = time.monotonic() + 60
        while b"idle" not in subprocess.run(
            ["sinfo", "-h"], env={**os.environ, **environment}, capture_output=True, check=False
        ).stdout:  # fmt: skip
            assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.5)
        yield environment
    finally:
        for daemon in daemons:
            assert daemon.stdin is not None
            daemon.stdin.close()
            daemon.wait()


@pytest.fixture(scope="module")
def reference(data_url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return by_hand(Trial(tmp_path_factory.mktemp("reference"), data_url))


@pytest.mark.parametrize("launch", [deepspeed, torchrun, open_mpi, mpich], ids=lambda launch: launch.__name__)
def test_a_training_under(launch: Callable[[Trial], str], reference: str, data_url: str, tmp_path: Path) -> None:
    assert launch(Trial(tmp_path, data_url)) == reference


@pytest.mark.parametrize("kind", ["none", "pmi2"])
def test_a_training_under_srun(kind: str, slurm: Environment, reference: str, data_url: str, tmp_path: Path) -> None:
    """SLURM's own way, and with what MPI programs are told (the default of many sites)."""
    trial = Trial(tmp_path, data_url)
    trial.script[:0] = [sys.executable]
    assert trial.finish(trial.start(["srun", f"--mpi={kind}", "--overcommit", "-n", "2"], slurm)) == reference
