"""Followers of a run: each snapshot once for each question, whatever is damaged, killed or changed."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_dist import snapshot, storage
from ddpm_dist.config import ClusterConfig
from ddpm_dist.errors import DdpmDistError, EvaluationError
from ddpm_dist.evaluation import follow as following, result
from ddpm_dist.evaluation.order import Order
from ddpm_dist.sampling import job as sampling_job
from ddpm_dist.training.events import read_events
from ddpm_dist.training.run_folder import snapshot_url, write_summary
from tests.evaluation.tiny import (
    CLUSTER,
    PIXEL,
    InProcess,
    evaluate,
    make_set,
    pictures,
    publish_snapshot,
    run_config,
)
from tests.sampling.tiny import SETTINGS, make_order, make_snapshot


def test_follows_a_run_evaluating_each_snapshot_once(
    sets: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The follower is broken off in the middle of an evaluation and started again while snapshots come."""
    run = f"file://{tmp_path}/run"
    cfg = run_config(run, sets[1])
    order = Order(data=sets[1], metrics=PIXEL, num_samples=16, sampling=cfg.sampling)
    question = following.question_of(cfg, order)
    curve = f"{run}/tensorboard/evaluation/16-{question.id[:8]}"
    evaluated: list[int] = []

    def in_process(one: Order, workers: tuple[int, int], cluster: ClusterConfig) -> dict[str, object]:
        step = int(str(one.snapshot)[-9:])
        evaluated.append(step)
        if evaluated.count(step) == 1 and step == 20:
            raise KeyboardInterrupt
        found = evaluate(one)
        if step == 20:
            publish_snapshot(run, 30)
        return found

    monkeypatch.setattr(following.job, "run", in_process)
    publish_snapshot(run, 10)
    publish_snapshot(run, 20)
    with pytest.raises(KeyboardInterrupt):
        following.follow(cfg, order, (1, 2), poll_s=0.01)
    assert following.follow(cfg, order, (1, 2), poll_s=0.01) == 2
    assert evaluated == [10, 20, 20, 30]
    folder = f"{run}/evaluation"
    drawn = storage.list_names(curve)
    assert len([name for name in drawn if "tfevents" in name]) == 3
    for name in (f"{folder}/best.json", f"{folder}/report.html", f"{curve}/{drawn[-1]}"):
        storage.delete(name)  # as if it had been killed right after its last result
    assert following.follow(cfg, order, (1, 2), poll_s=0.01) == 0
    found = result.results(folder)
    assert [one["step"] for one in found] == [10, 20, 30]
    best = min(found, key=lambda one: one["metrics"]["frechet_pixel"])
    assert json.loads(storage.read(f"{folder}/best.json"))["step"] == best["step"]
    assert read_events(run).scalars == {}, "the training's curves are apart"
    assert len([name for name in storage.list_names(curve) if "tfevents" in name]) == 3
    assert b"Fr\xc3\xa9chet pixel" in storage.read(f"{folder}/report.html")


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 12},
        {"seed": 1},
        {"sampling": SETTINGS.model_copy(update={"steps": 2})},
        {"metrics": ("kid_pixel",)},
        {"data": "OTHER"},
        {"data": None, "reference": "STATISTICS"},
    ],
)
def test_another_question_is_another_evaluation(followed, tmp_path: Path, change: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    """Two questions about one run: both are answered, and neither ranks among the other's answers."""
    cfg, order, follow = followed
    make_set(f"file://{tmp_path}/other", pictures(150, 4))
    buffer = io.BytesIO()
    np.savez(buffer, mu=np.zeros(64), sigma=np.eye(64))
    storage.publish(f"file://{tmp_path}/theirs.npz", buffer.getvalue())
    places = {"OTHER": f"file://{tmp_path}/other", "STATISTICS": f"file://{tmp_path}/theirs.npz"}
    other = replace(order, **{key: places.get(str(value), value) for key, value in change.items()})
    assert follow(order) == [20, 30]
    first = json.loads(storage.read(f"{cfg.run.url}/evaluation/best.json"))
    assert follow(other) == [20, 30]
    assert follow(order) == follow(other) == []
    folder = f"{cfg.run.url}/evaluation"
    second = json.loads(storage.read(f"{folder}/best.json"))
    assert second["question"] != first["question"]
    mine = [r for r in result.results(folder) if r["question"]["id"] == second["question"]]
    best = min(mine, key=lambda r: r["metrics"][second["metric"]])
    assert (second["step"], second["value"]) == (best["step"], best["metrics"][second["metric"]])
    assert [(o["question"], o["step"], o["value"]) for o in second["others"]] == [
        (first["question"], first["step"], first["value"])
    ]
    assert len(storage.list_names(f"{cfg.run.url}/tensorboard/evaluation")) == 2


def test_what_does_not_alter_the_numbers_is_no_other_question(followed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The set at another place, other layout of the samples, the order of the metrics, metrics by their short names."""
    _, order, follow = followed
    two = replace(order, metrics=("frechet_pixel", "kid_pixel"))
    assert follow(two) == [20, 30]
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    layout = SETTINGS.model_copy(update={"unit_size": 4, "batch_size": 2, "format": "raw"})
    assert follow(replace(two, metrics=("kid_pixel", "frechet_pixel"), sampling=layout)) == []
    assert follow(replace(two, data=f"file://{tmp_path}/moved", labels="none")) == []


def test_kept_samples_answer_the_same_question_as_drawn_ones(sets: tuple[str, str], tmp_path: Path) -> None:
    url, out = make_snapshot(f"file://{tmp_path}/snapshot"), f"file://{tmp_path}/out"
    sampling_job.run([make_order(url, out)], (1, 3), CLUSTER, InProcess())  # type: ignore[arg-type]
    kept = evaluate(Order(samples=out, data=sets[1], metrics=PIXEL))
    order = Order(snapshot=url, data=sets[1], metrics=PIXEL, num_samples=20, sampling=SETTINGS)
    drawn = evaluate(replace(order, out=f"file://{tmp_path}/evaluation"))
    assert (kept["name"], kept["question"], kept["answers"]) == (drawn["name"], drawn["question"], drawn["answers"])
    fewer = evaluate(Order(samples=out, data=sets[1], metrics=PIXEL, num_samples=10))
    assert fewer["name"] != kept["name"]
    assert fewer["answers"] != kept["answers"]


def test_results_of_the_first_version_are_not_ranked_and_not_taken_for_answers(followed) -> None:  # type: ignore[no-untyped-def]
    cfg, order, follow = followed
    assert follow(order) == [20, 30]
    folder = f"{cfg.run.url}/evaluation"
    for found in result.results(folder):
        old = {
            key: value for key, value in found.items() if key not in ("question", "answers", "labels", "finished_at")
        }
        storage.delete(f"{folder}/results/{found['name']}.json")
        old["name"] = f"{found['step']:09d}-16-against-201-of-01234567-89abcdef"
        old["metrics"] = {"frechet_pixel": 0.0}
        storage.publish(f"{folder}/results/{old['name']}.json", json.dumps(old).encode())
    assert follow(order) == [20, 30]
    assert len(result.results(folder)) == 4
    assert json.loads(storage.read(f"{folder}/best.json"))["value"] > 0
    assert b"is not ranked" in storage.read(f"{folder}/report.html")


def test_a_snapshot_that_was_made_anew_is_evaluated_anew(followed) -> None:  # type: ignore[no-untyped-def]
    cfg, order, follow = followed
    assert follow(order) == [20, 30]
    network, diffusion = snapshot.load_snapshot(snapshot_url(cfg.run.url, 30))
    info = {**snapshot.load_info(snapshot_url(cfg.run.url, 30)), "step": 20}
    snapshot.save_snapshot(snapshot_url(cfg.run.url, 20), network, network.config, diffusion, info)
    assert follow(order) == [20]
    best = json.loads(storage.read(f"{cfg.run.url}/evaluation/best.json"))
    storage.delete_tree(best["snapshot"])
    assert json.loads(storage.read(f"{cfg.run.url}/evaluation/best.json"))["step"] == best["step"]
    following.mark_best(cfg.run.url, following.question_of(cfg, order))
    assert json.loads(storage.read(f"{cfg.run.url}/evaluation/best.json"))["step"] != best["step"], "it is gone"


def damage_weights(url: str) -> None:
    name = f"{url}/unet/diffusion_pytorch_model.safetensors"
    data = bytearray(storage.read(name))
    data[-5] ^= 1
    storage.publish(name, bytes(data))


def damage_info(url: str) -> None:
    storage.publish(f"{url}/ddpm_dist.json", b"{]")


def damage_keys(url: str) -> None:
    info = json.loads(storage.read(f"{url}/ddpm_dist.json"))
    storage.publish(f"{url}/ddpm_dist.json", json.dumps({"format": info["format"], "step": 20}).encode())


def diverge(url: str) -> None:
    network, diffusion = snapshot.load_snapshot(url)
    with torch.no_grad():
        network.conv_out.bias.fill_(torch.nan)
    snapshot.save_snapshot(url, network, network.config, diffusion, snapshot.load_info(url))


@pytest.mark.parametrize("damage", [damage_weights, damage_info, damage_keys, diverge])
def test_one_damaged_snapshot_does_not_keep_the_others(followed, damage) -> None:  # type: ignore[no-untyped-def]
    cfg, order, follow = followed
    damage(snapshot_url(cfg.run.url, 20))
    with pytest.raises(EvaluationError, match=r"1 snapshots evaluated; 1 could not be(?s:.*)\n  step 20: "):
        follow(order)
    folder = f"{cfg.run.url}/evaluation"
    assert [found["step"] for found in result.results(folder)] == [30]
    publish_snapshot(cfg.run.url, 20)
    assert follow(order) == [20]


def test_what_is_wrong_with_the_question_ends_a_follower(followed, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    cfg, order, follow = followed
    publish_snapshot(cfg.run.url, 10)
    with pytest.raises(DdpmDistError, match=r"data-none/index\.json"):
        follow(replace(order, data=f"{order.data}-none"))

    def broken(*_: object) -> None:
        raise EvaluationError("the data set lost a shard")

    monkeypatch.setattr(following.job, "run", broken)
    with pytest.raises(EvaluationError, match=r"^the data set lost a shard$"):
        follow(order)


def test_a_last_snapshot_that_will_not_come_is_not_waited_for(followed, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    """The run was stopped; then it ends, but its last snapshot was deleted."""
    cfg, order, follow = followed
    caplog.set_level("INFO")
    storage.delete_tree(snapshot_url(cfg.run.url, 30))
    assert follow(order, quiet_s=0.2) == [20]
    assert "waiting for the next snapshot; the last one will be that of step 30" in caplog.text
    assert "the run has shown no sign of life for 0:0" in caplog.text
    assert "and has no snapshot of its last step (30)" in caplog.text
    ended = {"step": 30, "images_seen": 120, "images_per_second": 1.0, "data_wait_fraction": 0.0}
    write_summary(cfg.run.url, ended)
    assert follow(order, quiet_s=30) == []
    assert "has ended at step 30, but its last snapshot is gone" in caplog.text


def test_a_damaged_result_is_said_and_made_anew(followed, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    cfg, order, follow = followed
    folder = f"{cfg.run.url}/evaluation"
    follow(order)
    name = next(found["name"] for found in result.results(folder) if found["step"] == 20)
    whole = json.loads(storage.read(f"{folder}/results/{name}.json"))
    strings = {**whole, "metrics": {"frechet_pixel": "1.5"}}
    for spoilt in (b"", b"{", b"[]", b"{}", b"\xff", b'{"metrics": 3}', json.dumps(strings).encode()):
        storage.publish(f"{folder}/results/{name}.json", spoilt)
        caplog.clear()
        assert [found["step"] for found in result.results(folder)] == [30], spoilt
        assert f"{name}.json: damaged, " in caplog.text
    assert follow(order) == [20]
    assert [found["step"] for found in result.results(folder)] == [20, 30]


def test_follows_at_the_wanted_interval(sets: tuple[str, str], tmp_path: Path) -> None:
    run = f"file://{tmp_path}/run"
    for step in (8, 16, 20, 30):
        publish_snapshot(run, step)
    cfg = run_config(run, sets[1])
    question = following.question_of(cfg, Order(data=sets[1], metrics=PIXEL, num_samples=16))
    assert following.pending_steps(run_config(run, sets[1], every=8), question) == [8, 16, 30]
    assert following.pending_steps(cfg, question) == [8, 16, 20, 30]
