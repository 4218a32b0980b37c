"""What children of a standby do in tests: importable by name, and without a test's own imports."""

import json
import os
import signal
import sys
import threading
import time
import uuid
from pathlib import Path

from ddpm_dist.cluster.child import Request
from ddpm_dist.cluster.standby import find, start_plain  # noqa: F401 - for askers in processes of their own

HERE = "tests.cluster.standby_children"
LIGHT = f"{HERE}:light"


def request(
    function: str, payload: str = "", environment: dict[str, str] | None = None, directory: str = "/"
) -> Request:
    return Request(
        f"{HERE}:{function}", payload, dict(os.environ) if environment is None else environment, directory,
        "a child of a test", tuple(sys.path),
    )  # fmt: skip


def light() -> None:
    """A preload that costs nothing, for tests of processes alone."""
    import numpy  # noqa: F401


def slow() -> None:
    """A preload during which its asker can be killed."""
    time.sleep(3)


def with_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def failing() -> None:
    raise RuntimeError("no such GPU")


def about(payload: str, descriptors: list[int]) -> int:
    """Tells what it finds itself to be, by the first descriptor."""
    import numpy

    told = {
        "payload": payload,
        "pid": os.getpid(),
        "open": sorted(int(n) for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")),
        "given": descriptors,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "title": Path("/proc/self/cmdline").read_text().strip("\0"),
        "random": [numpy.random.rand(), uuid.uuid4().hex],
        "handlers": [signal.getsignal(n) is signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGHUP)],
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "threads": len(os.listdir("/proc/self/task")),
    }
    os.write(descriptors[0], json.dumps(told).encode())
    print("on stdout")
    print("on stderr", file=sys.stderr)
    return 7


def leave(payload: str, descriptors: list[int]) -> None:
    sys.exit(json.loads(payload))


def fail(payload: str, descriptors: list[int]) -> None:
    raise LookupError(payload)


def wait_for_ever(payload: str, descriptors: list[int]) -> None:
    os.write(descriptors[0], b"here")
    time.sleep(1000)


def train(payload: str, descriptors: list[int]) -> None:
    """A short training on S3, and a look at its snapshot; tells which modules were imported for it."""
    import torch

    before = set(sys.modules)
    untouched = not torch.cuda.is_initialized()
    from ddpm_dist import cli, snapshot
    from ddpm_dist.recipe import parse_config
    from ddpm_dist.training.entry import deepspeed_worker

    cli.setup_logging()
    cfg = parse_config(payload)
    deepspeed_worker(cfg)
    snapshot.load_snapshot(f"{cfg.run.url}/snapshots/{cfg.train.steps:09d}")
    late = sorted(name for name in set(sys.modules) - before)
    told = {"late": late, "untouched": untouched}
    if torch.cuda.is_available():
        told["cuda"] = float(torch.ones(3, device="cuda").sum())
    os.write(descriptors[0], json.dumps(told).encode())
