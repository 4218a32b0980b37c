"""Our loader beside WebDataset, MosaicML Streaming and LitData, from the same S3 server, alternating in one run.

    python -m tools.bench.data                 # all; about an hour on a quiet machine
    python -m tools.bench.data --quick         # a tenth of the images, one round

Each contender runs in a process of its own and fills uint8 batches of 128: a first epoch (nothing cached), a
second one, and a cold start at 90 % of an epoch. `own` is each peer with Pillow, as its documentation shows;
`fair` is all with our decoders. Ours and WebDataset read the same tars. Peers that aren't importable go into a
virtual environment beside --folder (their dependencies contradict the project's pins). The last line is one JSON
object with the medians of the ratios. With two cores or more, contenders have the first to themselves, with all their
threads and workers, and the server has the others.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_dist import cli, storage
from ddpm_dist.data.decode import Pixels, encode_jpeg, encode_png
from ddpm_dist.data.writer import EncodedSample, write_index, write_shard
from ddpm_dist.errors import DataError
from tools.local.s3_server import S3Server

log = logging.getLogger(__name__)

SETS: dict[str, tuple[int, int, int, Any, str]] = {  # images, pixels, images a shard, encoder, extension
    "png": (40_000, 32, 1000, encode_png, "png"),
    "jpeg": (8_000, 256, 125, lambda pixels: encode_jpeg(pixels, 90), "jpg"),
}
PEERS = ("webdataset", "mosaicml", "litdata")
TARGETS = {
    "png fair 0 litdata first": 1.1, "jpeg fair 0 litdata first": 1.2,
    "png fair 0 webdataset first": 1.8, "jpeg fair 0 webdataset first": 1.25,
}  # fmt: skip
LIMITS = {
    "png fair 0 ours resume_s": 0.25, "jpeg fair 0 ours resume_s": 0.25,
    "png fair 0 ours peak_MiB": 286.1, "jpeg fair 0 ours peak_MiB": 381.5,
}  # fmt: skip
"""Seconds of a cold, exact resume; 300 and 400 MB of memory."""
PEER_PACKAGES = (
    "mosaicml-streaming==0.13.0", "litdata==0.2.76", "boto3==1.43.117", "s3transfer", "jmespath", "brotli", "zstd",
    "python-snappy", "cramjam", "catalogue", "circuitbreaker", "xxhash", "lightning-utilities", "crc32c",
    "tifffile", "transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2",
)  # fmt: skip
BASES = 60
FIRST_CORE = min(os.sched_getaffinity(0))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    folder = Path(args.folder).resolve()
    sets = {name: (one[0] // (10 if args.quick else 1), *one[1:]) for name, one in SETS.items() if name in args.sets}
    python = peer_python(folder) if args.peer_python is None else args.peer_python
    results: dict[str, list[dict[str, Any]]] = {}
    with elsewhere(), S3Server(folder / f"s3{'-quick' if args.quick else ''}") as server:
        os.environ.update(server.env)
        for name, (count, size, per_shard, encode, extension) in sets.items():
            url = f"s3://{server.bucket}/{name}"
            if not storage.exists(f"{url}/tars/index.json"):
                write_tars(f"{url}/tars", count, size, per_shard, encode, extension)
            for peer in {"mosaicml", "litdata"} & set(args.peers):
                if not storage.exists(f"{url}/{peer}/done"):
                    measure(python, "write", peer, url, count, size, per_shard, folder, "fair", 0)
                    storage.publish(f"{url}/{peer}/done", b"")
        for turn in range(args.rounds):
            for name, (count, size, per_shard, *_) in sets.items():
                url = f"s3://{server.bucket}/{name}"
                for decoder, workers in [(d, w) for d in args.decoders for w in args.workers]:
                    for who in rotated(["ours", *args.peers], turn):
                        for what in ("epochs", "resume") if decoder == "fair" and workers == 0 else ("epochs",):
                            program = sys.executable if who == "ours" else python
                            found = measure(program, what, who, url, count, size, per_shard, folder, decoder, workers)
                            results.setdefault(f"{name} {decoder} {workers} {who}", []).append(found)
                            print(f"{name} {decoder} workers {workers} {who}: {json.dumps(found)}", flush=True)
    summarise(results)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the images, one round")
    parser.add_argument("--rounds", type=cli.positive, default=3, help="(default: %(default)s)")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--decoders", nargs="+", choices=("fair", "own"), default=["fair", "own"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--folder", default="out/bench_data", help="data, caches, peers (default: %(default)s)")
    parser.add_argument("--peer-python", metavar="FILE", help="interpreter with the peers; default: made in --folder")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds = 1
    return args


def rotated(names: list[str], turn: int) -> list[str]:
    """So that nobody always runs first."""
    return names[turn % len(names) :] + names[: turn % len(names)]


@contextmanager
def elsewhere() -> Iterator[None]:
    """This process, and what it starts, leave the first core to the contenders."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores - {FIRST_CORE} or cores)
    yield
    os.sched_setaffinity(0, cores)


def measure(python: str, *arguments: object) -> dict[str, Any]:
    """What one process of tools/bench/data_peers.py says."""
    command = [python, "-m", "tools.bench.data_peers", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}
    pin = partial(os.sched_setaffinity, 0, {FIRST_CORE})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, preexec_fn=pin)
    if done.returncode:
        tail = " | ".join(done.stderr.strip().splitlines()[-3:])
        return {"failed": tail}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def write_tars(url: str, count: int, size: int, per_shard: int, encode: Any, extension: str) -> None:
    """Shards of images whose spectrum falls as that of photographs."""
    bases = [photo_like(seed, size) for seed in range(BASES)]
    written: list[Any] = []
    samples: list[Any] = []
    for i in range(count):
        turned = np.roll(bases[i % BASES], (i * 7 % size, i * 13 % size), (0, 1))[:, :: 1 - 2 * (i % 2)]
        samples.append(EncodedSample(f"{i:08d}", encode(np.ascontiguousarray(turned)), extension, i % 10))
        if len(samples) == per_shard or i == count - 1:
            written.append(write_shard(url, f"shard-{len(written):06d}.tar", samples))
            samples = []
    write_index(url, written)


def photo_like(seed: int, size: int) -> Pixels:
    """[size, size, 3] uint8 noise with amplitude f^-1.7: a PNG of 32 pixels has 2.3 kB, a JPEG of 256 has 22 kB."""
    rng = np.random.default_rng(seed)
    f = np.fft.fftfreq(size)
    radius = np.hypot(f[:, None], f[None])
    radius[0, 0] = 1 / size
    noise = rng.standard_normal((2, 3, size, size))
    image = np.fft.ifft2((noise[0] + 1j * noise[1]) / radius**1.7).real.transpose(1, 2, 0)
    return np.clip((image - image.mean()) / image.std() * 50 + 128, 0, 255).astype(np.uint8)


def peer_python(folder: Path) -> str:
    """An interpreter that imports the project's packages, and the peers from a folder of their own."""
    root = folder / "peers"
    python = root / "bin" / "python"
    if not (root / "ready").exists():
        log.info("bench_data: an environment for the peers in %s", root)
        venv.create(root, with_pip=True, clear=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = root / "lib" / version / "site-packages"
        ours = Path(sys.prefix) / "lib" / version / "site-packages"
        (packages / "shared.pth").write_text(f"{ours}\n{Path(__file__).resolve().parents[2]}\n")
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *PEER_PACKAGES]
        if subprocess.run(command, check=False).returncode:
            raise DataError("bench_data: the peers can't be installed; name an interpreter with --peer-python")
        # streaming imports torchvision for one base class; its wheels bring CUDA or don't fit a CPU build of torch.
        stand_in = packages / "torchvision"
        (stand_in / "transforms").mkdir(parents=True)
        (stand_in / "__init__.py").touch()
        (stand_in / "datasets.py").write_text("class VisionDataset: ...\n")
        (stand_in / "transforms" / "__init__.py").touch()
        (stand_in / "transforms" / "functional.py").write_text("def to_tensor(image): raise NotImplementedError\n")
        (root / "ready").touch()
    return str(python)


def summarise(results: dict[str, list[dict[str, Any]]]) -> None:
    ratios: dict[str, float] = {}
    for name in [name for name in results if name.endswith(" ours")]:
        case = name.removesuffix(" ours")
        for peer in PEERS:
            theirs = results.get(f"{case} {peer}", [])
            for figure in ("first", "second", "first_cpu", "second_cpu", "resume_s"):
                pairs = zip(values(results[name], figure), values(theirs, figure), strict=False)
                found = [a / b if figure != "resume_s" else b / a for a, b in pairs]
                if found:
                    ratios[f"{case} {peer} {figure.removesuffix('_s')}"] = round(statistics.median(found), 3)
    figures = {
        f"{name} {figure}": round(statistics.median(values(runs, figure)), 3)
        for name, runs in results.items()
        for figure in ("first", "second", "first_cpu", "second_cpu", "resume_s", "peak_MiB", "shards_mixed")
        if list(values(runs, figure))
    }
    for key, wanted in TARGETS.items():
        if key in ratios:
            print(f"{'reached' if ratios[key] >= wanted else 'missed '}: {key}: {ratios[key]} × (wanted {wanted})")
    for key, most in LIMITS.items():
        if key in figures:
            print(f"{'reached' if figures[key] <= most else 'missed '}: {key}: {figures[key]} (at most {most})")
    print(json.dumps({"ratios": ratios, "figures": figures}))


def values(runs: Sequence[dict[str, Any]], figure: str) -> Iterator[float]:
    return (run[figure] for run in runs if figure in run)


if __name__ == "__main__":
    cli.run(main)
