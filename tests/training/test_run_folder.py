"""Who may use a run's folder, and with which configuration."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from ddpm_dist import snapshot, storage
from ddpm_dist.engine import World
from ddpm_dist.errors import ClaimError, ConfigError
from ddpm_dist.recipe import dump_config, parse_config
from ddpm_dist.state import StateStore
from ddpm_dist.training import run_folder
from ddpm_dist.training.branch import resolve

ALONE = World(0, 1, 0, torch.device("cpu"), "gloo")
RECIPE = """
run: {{url: "{url}"}}
data: {{url: memory://data, image_size: 8, channels: 1}}
model: {{channels: 32, channel_mult: [1], attention_resolutions: []}}
train: {{steps: 10, global_batch: 12}}
"""


@pytest.fixture
def url(tmp_path) -> str:
    return (tmp_path / "run").as_uri()


def config(url: str, *overrides: str):
    return parse_config(RECIPE.format(url=url), overrides)


def prepare(cfg) -> None:
    """As an attempt does it: check, adopt, claim."""
    run_folder.check(cfg)
    run_folder.adopt(cfg)
    storage.publish(f"{cfg.run.url}/checkpoints/owner/000001", b"{}")


def lease(url: str, **changes) -> None:
    values = {"token": "a", "host": "elsewhere", "boot": "x", "pid": 1, "step": 5, "beat": 1, "time": time.time()}
    storage.publish(f"{url}/lease.json", json.dumps({**values, "released": False, **changes}).encode())


def test_same_configuration_may_go_on_and_free_keys_may_change(url) -> None:
    prepare(config(url))
    prepare(config(url, "cluster.workers=2", "logging.every_steps=3"))
    assert b"every_steps: 3" in storage.read(f"{url}/config.yaml")


def test_steps_may_grow(url, caplog) -> None:
    prepare(config(url))
    caplog.set_level("INFO")
    prepare(config(url, "train.steps=20"))
    assert "train.steps: 10 -> 20" in caplog.text


def test_another_configuration_is_refused_with_the_list(url) -> None:
    prepare(config(url))
    before = storage.read(f"{url}/config.yaml")
    with pytest.raises(ConfigError, match=r"(?s)another configuration.*diffusion\.prediction: eps -> v") as e:
        prepare(config(url, "train.lr=0.1", "diffusion.prediction=v"))
    assert "train.lr: 0.0002 -> 0.1" in str(e.value)
    assert "run.init_from" in str(e.value)
    assert storage.read(f"{url}/config.yaml") == before


def test_a_configuration_that_never_trained_binds_nobody(url) -> None:
    run_folder.adopt(config(url, "train.lr=0.1"))
    run_folder.check(config(url))


BIG = "train.global_batch=512"


def test_a_new_run_writes_down_the_number_of_its_streams(url) -> None:
    cfg = resolve(config(url, BIG))
    assert cfg.data.streams == 128
    prepare(cfg)
    assert b"streams: 128" in storage.read(f"{url}/config.yaml")
    assert resolve(config(url, BIG)) == cfg
    with pytest.raises(ConfigError, match=r"data\.streams: 128 -> 64"):
        run_folder.check(resolve(config(url, BIG, "data.streams=64")))


def test_a_run_of_before_keeps_the_streams_of_its_time(url) -> None:
    storage.publish(f"{url}/config.yaml", dump_config(config(url, BIG)).encode())  # as it was: null
    assert b"streams: null" in storage.read(f"{url}/config.yaml")
    assert resolve(config(url, BIG)).streams == 128, "nobody has trained there yet"
    storage.publish(f"{url}/checkpoints/owner/000001", b"{}")
    cfg = resolve(config(url, BIG))
    assert cfg.streams == 32
    run_folder.check(cfg)
    run_folder.check(config(url, BIG, "data.streams=32"))
    with pytest.raises(ConfigError, match=r"data\.streams: 32 -> 128"):
        run_folder.check(resolve(config(url, BIG, "data.streams=128")))


def test_a_check_writes_nothing(url) -> None:
    prepare(config(url))
    storage.publish(f"{url}/stop", b"")
    run_folder.check(config(url, "train.steps=7777"))
    assert storage.exists(f"{url}/stop")
    assert b"7777" not in storage.read(f"{url}/config.yaml")


def test_a_released_lease_and_one_of_a_dead_process_are_no_obstacle(url) -> None:
    lease(url, released=True)
    run_folder.take_over(url, "b")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lease(url, host=os.uname().nodename, boot=run_folder._boot_id(), pid=dead.pid)
    start = time.monotonic()
    run_folder.take_over(url, "b")
    assert time.monotonic() - start < run_folder.LEASE_S / 2


def test_the_same_job_keeps_its_lease(url) -> None:
    lease(url)
    run_folder.take_over(url, "a")


def test_a_silent_owner_is_replaced_after_the_lease(url, monkeypatch) -> None:
    monkeypatch.setattr(run_folder, "LEASE_S", 1.5)
    lease(url)
    run_folder.take_over(url, "b")


def test_a_living_owner_is_named(url) -> None:
    living = run_folder.Lease(url, "a")
    try:
        living.step = 123
        with pytest.raises(ClaimError, match=rf"in use by process {os.getpid()} on .*stop"):
            run_folder.take_over(url, "b")
    finally:
        living.release()
    run_folder.take_over(url, "b")


def test_who_lost_the_run_leaves_its_lease_alone(url, monkeypatch) -> None:
    """A void attempt, as after a network cut, must neither look like the owner nor release what isn't its own."""
    monkeypatch.setattr(run_folder, "RENEW_S", 0.2)
    cfg = config(url)
    void = StateStore(cfg, ALONE)
    void.claim()
    held = run_folder.Lease(url, "void", void.check_owner)
    held.poll()
    owner = StateStore(cfg, ALONE)
    owner.claim()
    owners = run_folder.Lease(url, "owner", owner.check_owner)
    held._thread.join(30)
    with pytest.raises(ClaimError, match="has taken this run over"):
        held.poll()
    storage.publish(f"{url}/stop", b"")
    held.release()
    time.sleep(0.5)
    there = json.loads(storage.read(f"{url}/lease.json"))
    assert there["token"] == "owner"
    assert not there["released"]
    owners.release()
    assert json.loads(storage.read(f"{url}/lease.json"))["released"]


def test_who_lost_the_run_neither_writes_nor_withdraws_a_snapshot(url) -> None:
    cfg = config(url, "checkpoint.snapshot_every_steps=10")
    network, diffusion = snapshot.build(cfg)
    place = run_folder.snapshot_url(url, 10)
    void, owner = StateStore(cfg, ALONE), StateStore(cfg, ALONE)
    void.claim()
    owner.claim()
    snapshot.save_snapshot(place, network, network.config, diffusion, {"step": 10}, owner.check_owner)
    before = {name: storage.read(storage.join(place, name)) for name in storage.list_objects(place)}
    other = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    with pytest.raises(ClaimError, match="has taken this run over"):
        snapshot.save_snapshot(place, other, network.config, diffusion, {"step": 10}, void.check_owner)
    assert {name: storage.read(storage.join(place, name)) for name in storage.list_objects(place)} == before


def test_a_stop_object_is_noticed_and_removed_when_obeyed(url, monkeypatch) -> None:
    monkeypatch.setattr(run_folder, "RENEW_S", 0.2)
    held = run_folder.Lease(url, "a")
    assert not held.stop_requested
    storage.publish(f"{url}/stop", b"")
    deadline = time.monotonic() + 30
    while not held.stop_requested and time.monotonic() < deadline:
        time.sleep(0.1)
    assert held.stop_requested
    held.release()
    assert not storage.exists(f"{url}/stop")


def test_the_best_state_and_those_that_may_be_the_next_best_are_kept(url) -> None:
    steps = [10 * i for i in range(1, 13)]
    plan = ("checkpoint.snapshot_every_steps=20", "evaluation.every=20")
    assert run_folder.steps_to_keep(config(url), steps) == set()
    assert run_folder.steps_to_keep(config(url, *plan), steps) == {60, 80, 100, 120}, "not without a limit"
    for step in (20, 40, 80):
        storage.publish(f"{url}/evaluation/results/{step:09d}-500-against-1797-of-1b2c-77.json", b"{}")
    storage.publish(f"{url}/evaluation/best.json", json.dumps({"step": 40, "metric": "frechet_pixel"}).encode())
    assert run_folder.steps_to_keep(config(url, *plan), steps) == {40, 60, 100, 120}
    assert run_folder.steps_to_keep(config(url), steps) == {40}, "evaluated by hand"
    assert run_folder.steps_to_keep(config(url, *plan), [10, 30]) == set()
    best = {"step": 40, "question": "0123456789ab", "others": [{"step": 50}, {"step": "damaged"}, 7]}
    storage.publish(f"{url}/evaluation/best.json", json.dumps(best).encode())
    assert run_folder.steps_to_keep(config(url, *plan), steps) == {40, 50, 60, 80, 100, 120}, "80: another question's"
    storage.publish(f"{url}/evaluation/results/000000100-500-against-1797-of-1b2c-01234567-77aa55bb.json", b"{}")
    assert run_folder.steps_to_keep(config(url, *plan), steps) == {40, 50, 60, 80, 120}


def test_newest_snapshot_is_the_newest_whole_one(url) -> None:
    assert run_folder.newest_snapshot(url) is None
    for step in (10, 9):
        storage.publish(f"{run_folder.snapshot_url(url, step)}/model_index.json", b"{}")
    storage.publish(f"{run_folder.snapshot_url(url, 11)}/unet/config.json", b"{}")
    assert run_folder.newest_snapshot(url) == run_folder.snapshot_url(url, 10)


FOREIGN = b'{"token": "a", "holder": "another program", "step": "5"}'


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff\xfe", FOREIGN])
def test_damaged_small_objects_are_written_anew(url, damage, caplog) -> None:
    for name in ("lease.json", "summary.json"):
        storage.publish(f"{url}/{name}", damage)
    run_folder.take_over(url, "me")
    assert run_folder.last_sign_of_life(url) is None
    assert run_folder.read_summary(url) is None
    assert "lease.json is damaged, or not ours; it will be written anew" in caplog.text
    assert "summary.json is damaged, or not ours; it will be written anew" in caplog.text
