"""tools/plan.py: what it prints, draws and refuses."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ddpm_dist.commands import plan
from ddpm_dist.errors import ConfigError
from ddpm_dist.recipe import recipes


def test_a_plan_in_words_and_as_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    plan.main(["--config", "cifar10", "--gpus", "8", "--picture", str(picture)])
    out = capsys.readouterr().out
    assert out.startswith("cifar10 on 8 × H100 SXM5 80 GB in 1 node\n")
    for said in (
        "35,746,307 parameters",
        "128 images: 16 a GPU",
        "102,400,000 images",
        "we would: ",
        "not measured by us",
    ):
        assert said in out
    root = ElementTree.parse(picture).getroot()
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"cifar10 on H100 SXM5 80 GB", "2", "8", "64", "communication"} <= set(texts)


def test_the_same_for_programs_with_a_simulation(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "cifar10", "--gpus", "8", "--nodes", "2", "--json", "--simulate", "--days", "3", "--seed", "7"]
    found = []
    for _ in range(2):
        plan.main([*words, "--mtbf-hours", "5", "--set", "spares=0"])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1], "the same seed is the same month"
    one = found[0]
    assert (one["nodes"], one["mtbf_s"], one["images"]) == (2, 5 * 3600, 800_000 * 128)
    assert one["gpu_hours"] == pytest.approx(one["days"] * 24 * 8)
    assert one["step_s"] == pytest.approx(max(one["compute_s"], one["launch_s"]) + one["communication_s"])
    assert one["simulated"][0]["what"] == "best interval"
    assert all(constant["source"] for constant in one["constants"].values())
    halves = [other for other in one["otherwise"] if other["what"] == "4 GPUs"]
    assert halves[0]["mtbf_s"] == 2 * 5 * 3600


def test_what_one_gpu_does_may_be_given_and_little_work_for_many_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--config", "cifar10", "--gpus", "64", "--images-per-second", "7000", "precision=bf16"])
    out = capsys.readouterr().out
    assert "images/s of one GPU: given" in out
    assert "GPUs would take" in out
    plan.main(
        [
            "--config",
            "lsun256",
            "--gpus",
            "8",
            "--card",
            "rtx4090",
            "train.max_micro_batch=64",
            "train.global_batch=512",
        ]
    )
    assert "it doesn't fit: a rank needs" in capsys.readouterr().out


def test_the_recipes_interval_is_held_beside_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "lsun256", "--gpus", "1024", "train.global_batch=4096", "checkpoint.every_steps=20000"]
    plan.main(words)
    assert "we would: checkpoint.every_steps=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "8", "--card", "h900"], "--card h900: known are v100, a100-40, a100"),
        (["--gpus", "8", "--card", "v100", "precision=bf16"], "no peak is known in bf16; set precision=fp32 or fp16"),
        (["--gpus", "6"], "must divide train.global_batch: 128"),
        (["--gpus", "8", "--nodes", "3"], "can't be shared evenly by --nodes 3"),
        (["--gpus", "8", "--picture", "/nowhere/plan.svg"], "--picture /nowhere/plan.svg: No such file"),
    ],
)
def test_what_can_not_be_planned_is_said(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        plan.main(["--config", "cifar10", *words])


@pytest.mark.parametrize(
    "words", [["--set", "luck=1"], ["--set", "spares=-1"], ["--network", "0"], ["--mtbf-hours", "x"]]
)
def test_numbers_that_are_none(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan.main(["--config", "cifar10", "--gpus", "8", *words])
    assert "expected" in capsys.readouterr().err


PLANNED = re.compile(
    r"# Planned, not measured: `ddpm-plan (.*?)`: ([\d,]+) images/s, ([\d.,]+) days, ([\d,]+) GPU-hours\."
)


@pytest.mark.parametrize("name", ["cifar10", "lsun256", "celebahq256"])
def test_the_recipes_heads_quote_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    quoted = PLANNED.search(recipes()[name].read_text())
    assert quoted, f"{name}: its head says what a run would take"
    words, *figures = quoted.groups()
    plan.main(words.split())
    out = capsys.readouterr().out
    for figure, noun in zip(figures, ("images/s", "days", "GPU-hours"), strict=True):
        assert f" {figure} {noun}" in out
