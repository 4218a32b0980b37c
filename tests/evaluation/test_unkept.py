"""Images that an evaluation draws for itself: gone on with after a kill, removed afterwards, nobody else's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ddpm_dist import storage
from ddpm_dist.evaluation import result
from ddpm_dist.evaluation.order import Order
from ddpm_dist.evaluation.worker import SummaryTask
from ddpm_dist.sampling import job as sampling_job
from ddpm_dist.sampling.worker import UnitTask
from ddpm_dist.training.run_folder import snapshot_url
from tests.evaluation.tiny import CLUSTER, PIXEL, InProcess, evaluate
from tests.sampling.tiny import SETTINGS, make_order, make_snapshot


def test_straight_from_a_snapshot_without_keeping_images(sets: tuple[str, str], tmp_path: Path) -> None:
    url = make_snapshot(f"file://{tmp_path}/snapshot")
    out = f"file://{tmp_path}/evaluation"
    order = Order(snapshot=url, data=sets[1], metrics=PIXEL, num_samples=30, sampling=SETTINGS, out=out, nearest=4)
    found = evaluate(order)
    sampling_job.run([make_order(url, f"file://{tmp_path}/kept", 30)], (1, 3), CLUSTER, InProcess())  # type: ignore[arg-type]
    kept = evaluate(Order(samples=f"file://{tmp_path}/kept", data=sets[1], metrics=PIXEL))
    assert found["metrics"] == pytest.approx(kept["metrics"], rel=1e-9)
    assert storage.list_objects(storage.join(out, "unkept")) == {}
    assert result.results(out) == [json.loads(json.dumps(found))]
    lines = storage.read(storage.join(out, "results.jsonl")).decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10]
    assert storage.exists(str(found["grid"]))
    nearest = found["nearest"]
    assert isinstance(nearest, dict)
    assert len(nearest["distances"]) == 4
    assert storage.exists(nearest["picture"])


class Broken(InProcess):
    """Is interrupted when the images are drawn."""

    def map(self, tasks):  # type: ignore[no-untyped-def]
        tasks = list(tasks)
        if isinstance(tasks[0], SummaryTask):
            raise KeyboardInterrupt
        yield from super().map(tasks)


class Overtaken(InProcess):
    """Another evaluation of the same question ends, and removes the images, just before these tasks of ours."""

    def __init__(self, order: Order, kind: type) -> None:
        super().__init__()
        self.order, self.kind, self.overtaken = order, kind, False

    def map(self, tasks):  # type: ignore[no-untyped-def]
        tasks = list(tasks)
        if not self.overtaken and isinstance(tasks[0], self.kind):
            self.overtaken = True
            evaluate(self.order)
        yield from super().map(tasks)


@pytest.mark.parametrize("kind", [UnitTask, SummaryTask])
def test_two_evaluations_of_one_question_answer_it_once(sets: tuple[str, str], tmp_path: Path, kind: type) -> None:
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/evaluation"
    order = Order(snapshot=url, data=sets[1], metrics=PIXEL, num_samples=16, sampling=SETTINGS, out=out)
    found = evaluate(order, Overtaken(order, kind))
    assert result.results(out) == [json.loads(json.dumps(found))]
    assert storage.list_objects(f"{out}/unkept") == {}


@pytest.mark.parametrize("left", ["refused", "no manifest", "damaged manifest"])
def test_images_that_cannot_be_gone_on_with_are_drawn_anew(sets: tuple[str, str], tmp_path: Path, left: str) -> None:
    """An evaluation was killed, and its images are of other hardware, or lost their manifest."""
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/evaluation"
    order = Order(snapshot=url, data=sets[1], metrics=PIXEL, num_samples=16, sampling=SETTINGS, out=out)
    with pytest.raises(KeyboardInterrupt):
        evaluate(order, Broken())
    folder = f"{out}/unkept/{storage.list_names(f'{out}/unkept')[0]}"
    manifest = json.loads(storage.read(f"{folder}/manifest.json"))
    manifest["fingerprint"]["device"] = "cuda NVIDIA SPARC"
    if left == "no manifest":
        storage.delete(f"{folder}/manifest.json")
    else:
        text = json.dumps(manifest) if left == "refused" else "{"
        storage.publish(f"{folder}/manifest.json", text.encode())
    storage.delete(f"{folder}/receipts/000000008-000000016.json")
    assert evaluate(order)["num_samples"] == 16
    assert storage.list_objects(f"{out}/unkept") == {}


def test_two_evaluations_of_a_run_leave_each_others_images(followed) -> None:  # type: ignore[no-untyped-def]
    """One with other metrics, one that was killed; a follower removes its own images alone."""
    cfg, order, follow = followed
    folder = f"{cfg.run.url}/evaluation"
    url = snapshot_url(cfg.run.url, 30)
    others = replace(order, metrics=("kid_pixel",)).for_snapshot(url, folder)
    with pytest.raises(KeyboardInterrupt):
        evaluate(others, Broken())
    left = storage.list_objects(f"{folder}/unkept")
    assert left
    assert follow(order) == [20, 30]
    assert storage.list_objects(f"{folder}/unkept") == left
    pool = InProcess()
    evaluate(others, pool)
    assert storage.list_objects(f"{folder}/unkept") == {}
    assert not any(isinstance(task, UnitTask) for task in pool.tasks), "its images were gone on with"
