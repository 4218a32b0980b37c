"""tools/inspect_batch.py shows what the loader trains on; tools/index_shards.py and verify_shards.py as commands."""

import json
from pathlib import Path

import pytest
from PIL import Image

from ddpm_dist import storage
from ddpm_dist.commands import index_shards, inspect_batch, verify_shards
from ddpm_dist.errors import ConfigError
from tests.data.small_sets import config, global_batches, write_set, write_with_bad


@pytest.mark.parametrize("step", [0, 7, 31])
def test_it_prints_what_the_loader_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int) -> None:
    url = f"file://{tmp_path}/set"
    write_set(url, [50, 70])
    cfg = config(url)
    settings = ["--seed", "5", "--global-batch", "24", "--shuffle-block", "16", "--streams", str(cfg.streams)]
    picture = tmp_path / "batch.png"
    arguments = [url, *settings, "--world", "3", "--step", str(step), "--picture", str(picture)]
    inspect_batch.main(arguments)
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == step
    assert found["epoch"] == step // 5
    assert [len(rank) for rank in found["ranks"]] == [8, 8, 8]
    ((keys, _, _),) = global_batches(cfg, 1, step, 1)
    assert [key for rank in found["ranks"] for key in rank] == keys
    with Image.open(picture) as image:
        assert image.width == 8 * 10
        assert len(image.getcolors(2**16) or []) > 100


def test_the_one_that_took_a_bad_samples_place_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{tmp_path}"
    write_with_bad(url, {30: b"no image", 31: b""})
    cfg = config(url, max_bad_fraction=0.5)
    settings = ["--seed", "5", "--global-batch", "24", "--shuffle-block", "16", "--world", "4"]
    shown = []
    for step, (keys, _, _) in enumerate(global_batches(cfg, 1, 0, 4)):
        inspect_batch.main([url, *settings, "--step", str(step)])
        found = json.loads(capsys.readouterr().out)
        assert [key for rank in found["ranks"] for key in rank] == keys
        shown += keys
    assert not {"030", "031"} & set(shown)
    assert "030 can't be decoded (not an image: it begins with b'no image'); " in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--picture", "x.jpg"], r"--picture x\.jpg: it is written as PNG; name it x\.png"),
        (["--streams", "7"], "--streams 7 doesn't divide --global-batch 24"),
        (["memory://x=-1"], "memory://x=-1: a weight above 0 is wanted"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inspect_batch.main(["memory://none", "--global-batch", "24", "--step", "0", *arguments])


def test_it_inspects_mixes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    urls = {f"file://{tmp_path}/a": 1.0, f"file://{tmp_path}/b": 2.0}
    for seed, url in enumerate(urls):
        write_set(url, [50], seed=seed)
    weighted = [f"{url}={weight}" for url, weight in urls.items()]
    inspect_batch.main([*weighted, "--seed", "5", "--global-batch", "24", "--shuffle-block", "16", "--step", "3"])
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"][0] == global_batches(config(urls), 1, 3, 1)[0][0]


def test_the_index_lies_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    urls = {f"file://{tmp_path}/a": 1.0, f"file://{tmp_path}/b": 1.0}
    for seed, url in enumerate(urls):
        write_set(url, [50], seed=seed)
    wanted, settings = global_batches(config(urls), 1, 3, 1)[0][0], ["--global-batch", "24", "--shuffle-block", "16"]
    (tmp_path / "b/index.json").rename(tmp_path / "index.json")
    (tmp_path / "b/index").rename(tmp_path / "index")
    words = [*urls, "--seed", "5", *settings, "--step", "3"]
    inspect_batch.main([*words, "--index", f"file://{tmp_path}/b=file://{tmp_path}"])
    assert json.loads(capsys.readouterr().out)["ranks"][0] == wanted
    with pytest.raises(ConfigError, match=r"--index file:.*: of which of 2 sets\? Write DATA_URL=FOLDER"):
        inspect_batch.main([*words, "--index", f"file://{tmp_path}"])
    inspect_batch.main([*words[1:], "--index", f"file://{tmp_path}"])
    assert len(json.loads(capsys.readouterr().out)["ranks"][0]) == 24


def test_a_world_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--world 5 doesn't divide --global-batch 24"):
        inspect_batch.main([f"file://{tmp_path}", "--global-batch", "24", "--world", "5", "--step", "0"])


def test_index_and_verify_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"file://{tmp_path}"
    write_set(url, [5, 6])
    verify_shards.main([url])
    assert "all is as the index says" in capsys.readouterr().out
    storage.delete_tree(f"{url}/index")
    storage.delete(f"{url}/index.json")
    index_shards.main([url, "--workers", "1"])
    assert "11 samples (11 png) in 2 shards" in capsys.readouterr().out
    storage.publish(f"{url}/s-001.tar", storage.read(f"{url}/s-001.tar")[:-1])
    with pytest.raises(SystemExit):
        verify_shards.main([url])
    assert "s-001.tar: truncated" in capsys.readouterr().out
