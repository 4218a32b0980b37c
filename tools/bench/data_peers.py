"""One contender of tools/bench/data.py in its own process: writes its format, or measures; prints one JSON object.

Arguments: write|epochs|resume, contender, URL, images, pixels, images a shard, folder, fair|own, workers.
"""

import io
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import s3fs  # noqa: F401 - fsspec would import it at the first read, and imports aren't measured
import torch
from PIL import Image

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.data.decode import decode
from ddpm_dist.data.index import load_index
from ddpm_dist.data.loader import Loader
from ddpm_dist.data.stream import iterate_raw

BATCH = 128
SHUFFLE = 1000
RESUME_AT = 0.9
BLOCKS = {32: 128, 256: 32}
"""Our shuffle blocks: range reads of 0.5 and 0.8 MB, since a request costs the store the same at any size up to a
megabyte. 32 streams of them hold 4,096 and 1,024 samples, more than WebDataset's 1,000."""


@dataclass(frozen=True)
class Case:
    url: str
    images: int
    size: int
    per_shard: int
    cache: Path
    fair: bool
    workers: int

    @property
    def extension(self) -> str:
        return "png" if self.size == 32 else "jpg"

    def decode(self, data: bytes) -> np.ndarray[Any, Any]:
        return decode(data, None, 3) if self.fair else np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


Batches = Iterator[tuple[Any, Any]]
"""(images [128, …] uint8, numbers of the samples)."""


def ours(case: Case, skip: int = 0) -> Iterator[Batches]:
    cfg = Config.model_validate(
        {
            "run": {"url": "memory://run"},
            "data": {"url": f"{case.url}/tars", "image_size": case.size, "shuffle_block": BLOCKS[case.size],
                     "workers": case.workers, "buffer_bytes": 2**26},
            "model": {"channel_mult": (1,), "attention_resolutions": ()},
            "train": {"steps": 1, "global_batch": BATCH},
            "precision": "fp32",
        }
    )  # fmt: skip
    loader = Loader(cfg, 0, 1)
    batches = loader.batches(skip)

    def epoch() -> Batches:
        for _ in range(loader.steps_per_epoch):
            batch = next(batches)
            yield batch.images, [int(key) for key in batch.keys]

    while True:
        yield epoch()


def webdataset(case: Case, skip: int = 0) -> Iterator[Batches]:
    """Shards over HTTP by WebDataset's own curl pipe; the resume skips undecoded samples, as there is no other."""
    import webdataset as wds

    index = load_index(f"{case.url}/tars")
    urls = [storage.signed_url(f"{case.url}/tars/{shard.name}", 36000) for shard in index.shards]
    seen = [0]

    def sample(found: dict[str, Any]) -> tuple[Any, int]:
        seen[0] += 1
        pixels = np.empty(0) if seen[0] <= skip * BATCH else case.decode(found[case.extension])
        return pixels, int(found["__key__"])

    dataset = wds.WebDataset([f"pipe:curl -s -f '{url}'" for url in urls], shardshuffle=100).shuffle(SHUFFLE)
    dataset = dataset.map(sample)
    loader = torch.utils.data.DataLoader(
        dataset.batched(BATCH, partial=False, collation_fn=collate), batch_size=None, num_workers=case.workers
    )
    while True:
        yield iter(loader)


def collate(samples: list[tuple[Any, int]]) -> tuple[Any, list[int]]:
    return torch.from_numpy(np.stack([pixels for pixels, _ in samples])), [number for _, number in samples]


def collate_decoded(case: Case) -> Callable[[list[dict[str, Any]]], tuple[Any, list[int]]]:
    def function(samples: list[dict[str, Any]]) -> tuple[Any, list[int]]:
        return collate([(case.decode(sample["image"]), int(sample["key"])) for sample in samples])

    return function


def mosaicml(case: Case, skip: int = 0) -> Iterator[Batches]:
    from streaming import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(remote=f"{case.url}/mosaicml", local=str(case.cache), shuffle=True, batch_size=BATCH)
    loader = StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=case.workers, collate_fn=collate_decoded(case), drop_last=True
    )
    if skip:
        state = {"epoch": 0, "sample_in_epoch": skip * BATCH, "num_canonical_nodes": 1, "shuffle_seed": 9176}
        dataset.load_state_dict({**state, "initial_physical_nodes": 1})
    while True:
        yield iter(loader)


def litdata(case: Case, skip: int = 0) -> Iterator[Batches]:
    from litdata import StreamingDataLoader, StreamingDataset

    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    dataset = StreamingDataset(
        f"{case.url}/litdata", cache_dir=str(case.cache), shuffle=True, drop_last=True, storage_options=options
    )
    loader = StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=case.workers, collate_fn=collate_decoded(case), drop_last=True
    )
    if skip:
        loader.load_state_dict(
            {
                "dataset": dataset.state_dict(0, case.workers or 1, BATCH),
                "current_epoch": 1,
                "num_samples_yielded": skip * BATCH,
                "latest_worker_idx": 0,
            }
        )
    while True:
        yield iter(loader)


CONTENDERS = {"ours": ours, "webdataset": webdataset, "mosaicml": mosaicml, "litdata": litdata}


def epochs(contender: Callable[[Case], Iterator[Batches]], case: Case) -> dict[str, Any]:
    """Images/s of two epochs from making the loader on, and per processor second; shards in a batch; peak memory."""
    found: dict[str, Any] = {}
    start, spent = time.perf_counter(), cpu_s()
    batches = contender(case)
    for name in ("first", "second"):
        count, mixed = 0, []
        for images, numbers in next(batches):
            assert images.dtype == torch.uint8, images.dtype
            assert len(images) == BATCH
            count += len(images)
            mixed.append(len({number // case.per_shard for number in numbers}))
        found[name] = count / (time.perf_counter() - start)
        found[f"{name}_cpu"] = count / (cpu_s() - spent)
        start, spent = time.perf_counter(), cpu_s()
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    middle = mixed[len(mixed) // 4 : 3 * len(mixed) // 4]
    return {**found, "shards_mixed": float(np.mean(middle)), "peak_MiB": own / 1024, "peak_child_MiB": children / 1024}


def cpu_s() -> float:
    """Processor seconds of this process and its ended children: what a busy machine distorts least."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def resume(contender: Callable[[Case, int], Iterator[Batches]], case: Case) -> dict[str, Any]:
    """Seconds from making the loader to the first batch at 90 % of an epoch, nothing cached, no connection open."""
    skip = int(case.images / BATCH * RESUME_AT)
    start = time.perf_counter()
    for position, (images, _) in enumerate(next(contender(case, skip))):
        if contender is not webdataset or position == skip:
            assert len(images) == BATCH
            break
    return {"resume_s": time.perf_counter() - start}


def write(who: str, case: Case) -> None:
    """The images of our tars in a peer's format, with as many images in a file."""
    samples = ({"image": sample.image, "key": int(sample.key)} for sample in iterate_raw(f"{case.url}/tars"))
    if who == "mosaicml":
        from streaming import MDSWriter

        info = load_index(f"{case.url}/tars")
        images = info.bytes_per_sample - 2048
        with MDSWriter(
            out=str(case.cache), columns={"image": "bytes", "key": "int"}, size_limit=int(images * case.per_shard)
        ) as writer:
            for sample in samples:
                writer.write(sample)
    else:
        from litdata.streaming.writer import BinaryWriter

        case.cache.mkdir(parents=True, exist_ok=True)
        writer = BinaryWriter(str(case.cache), chunk_size=case.per_shard)
        for number, sample in enumerate(samples):
            writer[number] = sample
        writer.done()
        writer.merge(1)
    for file in sorted(case.cache.rglob("*")):
        if file.is_file():
            storage.publish(f"{case.url}/{who}/{file.relative_to(case.cache)}", file.read_bytes())


def main() -> None:
    what, who, url, images, size, per_shard, folder, decoder, workers = sys.argv[1:]
    cache = Path(tempfile.mkdtemp(prefix=f"{who}-", dir=folder))
    case = Case(url, int(images), int(size), int(per_shard), cache / "data", decoder == "fair", int(workers))
    try:
        if what == "write":
            write(who, case)
            found: dict[str, Any] = {}
        else:
            contender: Any = CONTENDERS[who]
            found = (epochs if what == "epochs" else resume)(contender, case)
        print(json.dumps(found), flush=True)
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    os._exit(0)  # peers' helper threads and shared memory needn't end in order


if __name__ == "__main__":
    main()
