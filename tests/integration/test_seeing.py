"""What TensorBoard shows of a run that was killed once, against what its ranks recorded of each step.

The curves are looked at from the state on that the second attempt began with: whether the first one published its only
line before it died (events are, every ten seconds) depends on how long it took.
"""

import gzip
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm_dist.data.decode import encode_png
from ddpm_dist.data.writer import EncodedSample, write_index, write_shard
from ddpm_dist.recipe import parse_config
from ddpm_dist.training.flops import training_flops_per_image
from ddpm_dist.training.metrics import PHASES
from tests.integration import loop_ranks as loop
from tests.integration.loop_ranks import Faults

STEPS, EVERY, KILLED, SAVED = 12, 3, 7, 4
LINES = {6: 2, 9: 3, 12: 3}
"""Step at which the second attempt logs -> steps since it did so before, or began."""
SAMPLES, BAD, BATCH = 64, 4, 16
PEAK_TFLOPS = 0.001
PLAN = (
    f"train.steps={STEPS}", f"logging.every_steps={EVERY}", "checkpoint.every_steps=4", "data.max_bad_fraction=0.2",
    "checkpoint.snapshot_every_steps=6", "logging.grid_images=5", "logging.grid_steps=2", "train.warmup_steps=8",
    "logging.profile_steps=[8,9]", f"logging.peak_tflops={PEAK_TFLOPS}", "train.lr_schedule=cosine",
    "train.decay_steps=16", "precision=fp32", "cluster.workers=2",
)  # fmt: skip


def make_set(url: str) -> None:
    """Grey images of which every sixteenth is no image."""
    pixels = np.random.default_rng(0).integers(0, 256, (SAMPLES, 8, 8, 1), dtype=np.uint8)
    images = [b"no image" if i % (SAMPLES // BAD) == 3 else encode_png(pixels[i]) for i in range(SAMPLES)]
    write_index(url, [write_shard(url, "a.tar", [EncodedSample(f"{i:03d}", x, "png") for i, x in enumerate(images)])])


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any], EventAccumulator, float]:
    """(folder of a run, its steps as recorded, its events as TensorBoard reads them, its seconds)."""
    folder = tmp_path_factory.mktemp("seeing")
    make_set((folder / "data").as_uri())
    cfg = loop.config((folder / "run").as_uri(), (folder / "data").as_uri(), *PLAN)
    began = time.time()
    recording = Faults(record=str(folder))
    dying = Faults(record=str(folder), die=(1, KILLED, 0), die_after_state=SAVED)
    assert None in loop.attempt(cfg, 2, dying)
    loop.finish(cfg, 2, recording)
    seconds = time.time() - began
    events = EventAccumulator(str(folder / "run/tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return folder / "run", loop.steps_of(folder), events, seconds


def curve(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag) if event.step > SAVED}


def test_losses_are_the_means_of_what_was_heard(seen: Any) -> None:
    """A step's losses are heard of one step later."""
    _, steps, events, _ = seen
    lines = {6: range(4, 5), 9: range(5, 8), 12: range(8, 11)}
    assert curve(events, "loss/mean") == pytest.approx(
        {line: np.mean([loss for step in heard for loss in steps[step]["losses"]]) for line, heard in lines.items()},
        rel=1e-5,
    )
    for quarter in range(4):
        expected = {}
        for line, heard in lines.items():
            pairs = [pair for step in heard for pair in zip(steps[step]["t"], steps[step]["losses"], strict=True)]
            losses = [loss for t, loss in pairs if quarter * 250 <= t < (quarter + 1) * 250]
            expected |= {line: np.mean(losses)} if losses else {}
        assert curve(events, f"loss/t_quartile_{quarter + 1}") == pytest.approx(expected, rel=1e-5)


def test_the_optimizer_is_shown_as_it_was(seen: Any) -> None:
    _, steps, events, _ = seen
    norms = {line: steps[line - 1]["grad_norm"] for line in LINES}
    assert curve(events, "optimisation/grad_norm") == pytest.approx(norms, rel=1e-6)
    rates = {line: 1e-3 * min((line - 1) / 8, 1) * _cosine((line - 1 - 8) / 8) for line in LINES}
    assert curve(events, "optimisation/lr") == pytest.approx(rates, rel=1e-5)
    assert curve(events, "optimisation/loss_scale") == dict.fromkeys(LINES, 1.0)
    assert curve(events, "optimisation/skipped_steps") == dict.fromkeys(LINES, 0.0)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * max(progress, 0)))


def test_time_is_shown_by_phase_and_adds_up(seen: Any) -> None:
    run, _, events, seconds = seen
    phases = {name: curve(events, f"seconds_per_step/{name}") for name in PHASES}
    assert {"data", "forward", "backward", "step", "ema"} <= set(PHASES)
    rates = curve(events, "speed/images_per_second")
    cfg = parse_config((run / "config.yaml").read_text())
    for line in LINES:
        assert all(phases[name][line] > 0 for name in ("data", "forward", "backward", "step", "ema"))
        step_s = sum(curve[line] for curve in phases.values())
        assert rates[line] == pytest.approx(BATCH / step_s, rel=1e-4)
        assert curve(events, "speed/data_wait_fraction")[line] == pytest.approx(phases["data"][line] / step_s, rel=1e-4)
        tflops = training_flops_per_image(cfg) * rates[line] / 2 / 1e12
        found = curve(events, "speed/model_flops_utilisation")[line]
        assert found == pytest.approx(tflops / PEAK_TFLOPS, rel=1e-4), "of each of two ranks"
    assert phases["snapshot"][6] > 0 == phases["snapshot"][9]
    stall = curve(events, "checkpoint/stall_seconds")
    assert stall == pytest.approx({line: phases["checkpoint"][line] * count for line, count in LINES.items()})
    assert stall[6] == 0 < stall[9] < seconds
    assert 0 <= curve(events, "checkpoint/background_seconds")[12] < seconds, "0 while the first save is on its way"
    assert 0.05 < curve(events, "memory/host_GiB")[12] < 64


def test_a_restart_is_shown_with_what_it_cost(seen: Any) -> None:
    run, _, events, _ = seen
    assert curve(events, "progress/restarts") == dict.fromkeys(LINES, 1)
    assert 0 <= curve(events, "goodput/lost")[12] < 1, "a sign of life comes every four seconds"
    assert 0 < curve(events, "goodput/restart")[12] < 1
    for line in LINES:
        every = [curve(events, tag)[line] for tag in events.Tags()["scalars"] if tag.startswith("goodput/")]
        assert 0.5 < sum(every) <= 1.001, "of the time since the run began"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["restarts"] == 1
    assert summary["goodput"]["restart"] > 0


def test_bad_samples_are_counted_over_attempts(seen: Any) -> None:
    """64 samples, 4 of them spoilt, make 4 batches an epoch; what came after the last state is counted anew."""
    _, _, events, _ = seen
    found = curve(events, "data/bad_samples")
    assert sorted(found.values()) == list(found.values())
    assert 2 * BAD - 2 <= found[9] <= 2 * BAD, "two epochs, but for what was heard too late for the state of step 4"
    assert found[12] > found[9]


def test_grids_the_configuration_and_a_trace_are_there(seen: Any) -> None:
    run, _, events, _ = seen
    grids = {event.step: Image.open(io.BytesIO(event.encoded_image_string)) for event in events.Images("samples/ema")}
    assert {step: grid.size for step, grid in grids.items()} == {6: (17, 26), 12: (17, 26)}, "2 columns, 3 rows"
    text = events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    saved = (run / "config.yaml").read_text()
    assert text == f"```yaml\n{saved}```"
    (trace,) = (run / "profiles").iterdir()
    assert trace.name == "steps-8-9.json.gz"
    names = [event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert sum("convolution_backward" in name for name in names) > 0
    assert sum("optimizer" in name.lower() or "adam" in name.lower() for name in names) > 0
