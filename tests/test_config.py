"""ddpm_dist.config: what is refused, what is derived, and that the recipes shipped are the paper's."""

from pathlib import Path
from typing import Any

import pytest

from ddpm_dist.config import Config, check_url, streams_before_0_2
from ddpm_dist.errors import ConfigError
from ddpm_dist.recipe import differences, dump_config, load_config, parse_config
from ddpm_dist.snapshot import build

HERE = Path(__file__).resolve().parent
RECIPES = sorted((HERE.parent / "configs").glob("*.yaml"))
URLS = ["run.url=file:///run", "data.url=file:///data"]
BASE = """
run: {url: "file:///run"}
data: {url: "file:///data", image_size: 32}
train: {steps: 10, global_batch: 96}
"""


def make(*overrides: str) -> Config:
    return parse_config(BASE, overrides)


def continuous(process: str, *overrides: str) -> list[str]:
    return [f"diffusion.process={process}", "sampling.steps=18", *overrides]


def test_a_process_brings_its_own_prediction_and_times() -> None:
    for process, prediction, times in (
        ("ddpm", "eps", "uniform"),
        ("edm", "edm", "log_normal"),
        ("flow", "velocity", "uniform"),
    ):
        d = make(*continuous(process)).diffusion
        assert (d.prediction, d.times) == (prediction, times)
    chosen = make(*continuous("edm", "diffusion.prediction=x_start", "diffusion.times=uniform")).diffusion
    assert (chosen.prediction, chosen.times) == ("x_start", "uniform")


def given(betas: str) -> list[str]:
    return ["diffusion.schedule=given", "diffusion.timesteps=2", f"diffusion.betas={betas}", "sampling.steps=2"]


def recipe_named(name: str) -> Config:
    return load_config(next(path for path in RECIPES if path.stem == name), URLS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_its_head_says_how_to_run_it(path: Path) -> None:
    load_config(path, URLS)
    head = path.read_text().split("\nrun:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "make demo" in head or f"ddpm-train --config {path.stem} " in head
    assert "Cost" in head


@pytest.mark.parametrize(("recipe", "parameters"), [("cifar10", 35_746_307), ("celebahq256", 113_673_219)])
def test_the_papers_networks_have_the_papers_size(recipe: str, parameters: int) -> None:
    unet, diffusion = build(recipe_named(recipe))
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert diffusion.timesteps == 1000
    assert diffusion.alphas_cumprod[-1] == pytest.approx(4.036e-5, rel=1e-3)


def test_the_papers_recipes_at_256_pixels_share_all_but_length() -> None:
    ours, theirs = recipe_named("lsun256"), recipe_named("celebahq256")
    assert differences(ours, theirs) == {
        "identity": [],
        "schedule": ["train.steps: 1200000 -> 500000"],
        "free": ["evaluation.num_samples: 50000 -> 30000"],
    }
    assert (ours.train.lr, ours.train.global_batch, ours.diffusion.variance) == (2e-5, 64, "fixedsmall")


def test_the_fast_recipe_of_cifar10_is_the_papers_mathematics() -> None:
    ours, theirs = recipe_named("cifar10-fast"), recipe_named("cifar10")
    found = differences(theirs, ours)
    assert (found["identity"], found["schedule"]) == (["precision: fp32 -> bf16"], [])
    assert {line.partition(":")[0] for line in found["free"]} == {
        "model.channels_last", "model.compile", "cluster.cpus_per_worker", "data.workers",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), 0),
        (("cluster.gpus_per_worker=1",), 1),
        (("cluster.gpus_per_worker=1", "cluster.cpus_per_worker=3"), 2),
        (("cluster.gpus_per_worker=1", "cluster.cpus_per_worker=16"), 4),
        (("cluster.gpus_per_worker=1", "data.workers=0"), 0),
        (("data.workers=7",), 7),
    ],
)
def test_loader_processes_by_default_where_there_is_a_gpu(overrides: tuple[str, ...], expected: int) -> None:
    path = next(path for path in RECIPES if path.stem == "digits")
    assert load_config(path, [*URLS, *overrides]).data.workers == expected


def test_the_papers_training_of_cifar10() -> None:
    cfg = recipe_named("cifar10")
    train = cfg.train
    assert (train.optimizer, train.lr, train.betas, train.eps, train.weight_decay) == (
        "adam",
        2e-4,
        (0.9, 0.999),
        1e-8,
        0,
    )
    assert (train.steps, train.global_batch, train.warmup_steps, train.grad_clip) == (800_000, 128, 5000, 1.0)
    assert (cfg.ema.decay, cfg.ema.warmup, cfg.data.flip, cfg.model.dropout) == (0.9999, False, True, 0.1)
    assert (cfg.diffusion.variance, cfg.diffusion.prediction, cfg.diffusion.loss) == ("fixedlarge", "eps", "simple")
    assert (train.lr_schedule, cfg.precision) == ("constant", "fp32")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.image_size=30"], r"data.image_size: 30 can't be halved 3 times"),
        (["model.norm_groups=24"], r"model.norm_groups: 24 doesn't divide the 128 channels of level 0"),
        (["model.head_channels=100"], r"model.head_channels: 100 doesn't divide"),
        (["model.attention_resolutions=[17]"], r"17 is not among the resolutions \[32, 16, 8, 4\]"),
        (["model.checkpoint_levels=[4]"], r"model.checkpoint_levels: 4: the network has the levels 0 to 3"),
        (["diffusion.beta_start=0.5"], r"diffusion.beta_start: 0.5 is more than diffusion.beta_end: 0.02"),
        (["diffusion.schedule=given"], r"diffusion.betas: needed with"),
        (["diffusion.betas=[0.1]"], r"diffusion.betas: needed with"),
        (["diffusion.schedule=given", "diffusion.betas=[0.1]"], r"1 values for 1000 diffusion.timesteps"),
        (["diffusion.variance=learned_range"], r"simple gives diffusion.variance: learned_range no gradient"),
        (["diffusion.loss=hybrid"], r"fixedlarge is fixed"),
        (["diffusion.weighting=p2", "diffusion.loss=vlb"], r"p2 weighs the squared error, which loss: vlb doesn't"),
        (["diffusion.label_dropout=0.1"], r"diffusion.label_dropout: needs model.num_classes"),
        (["diffusion.zero_terminal_snr=true"], r"use v or x_start"),
        (given("[0.1, 1]"), r"diffusion.prediction: eps says nothing .* a last beta of 1"),
        (given("[1.0, 0.5]"), r"diffusion.betas: beta\[0\] is 1"),
        (given("[0.1, 1.5]"), r"diffusion.betas.1: 1.5"),
        (
            [*given("[0.1, 1]"), "diffusion.prediction=v", "diffusion.weighting=min_snr"],
            r"weighting: min_snr gives the last t",
        ),
        ([*given("[0.1, 1]"), "diffusion.prediction=v", "sampling.spacing=quadratic"], r"quadratic doesn't start at"),
        (["diffusion.schedule=cosin"], r"diffusion.schedule: 'cosin': Input should be 'linear'"),
        (
            ["diffusion.zero_terminal_snr=true", "diffusion.prediction=v", "diffusion.timesteps=1", "sampling.steps=1"],
            r"zero_terminal_snr: needs at least 2",
        ),
        (["sampling.steps=1001"], r"1001 can't be taken out of 1000 diffusion.timesteps; use 1 to 1000"),
        (["sampling.sampler=heun", "sampling.eta=0.5"], r"eta: 0.5 has no meaning for sampling.sampler: heun"),
        (["sampling.sampler=ddpm", "sampling.eta=0"], r"only ddim has eta"),
        (
            ["diffusion.variance=learned", "diffusion.loss=vlb", "sampling.sampler=ddpm", "sampling.steps=10"],
            r"learned is that of single steps",
        ),
        (
            ["sampling.guidance_interval=[5, 1000]"],
            r"sampling.guidance_interval: \[5, 1000\] reaches beyond the last t",
        ),
        (["sampling.guidance_interval=[5, 3]"], r"sampling.guidance_interval: \[5, 3\] is not \[first, last\]"),
        (["diffusion.process=edm"], r"sampling.steps: none .* such as sampling.spacing: rho, sampler: heun, steps: 18"),
        (["diffusion.process=flow"], r"diffusion.process: flow has no list of times; say how many"),
        (continuous("edm", "diffusion.schedule=cosine"), r"diffusion.schedule: cosine is of process: ddpm, not edm"),
        (continuous("flow", "diffusion.sigma_max=50"), r"diffusion.sigma_max: 50.0 is of process: edm, not flow"),
        (continuous("flow", "diffusion.sigma_data=0.3"), r"diffusion.sigma_data: 0.3 is of process or prediction edm"),
        (continuous("edm", "diffusion.sigma_max=0.001"), r"sigma_min: 0.002 isn't less than diffusion.sigma_max"),
        (continuous("flow", "diffusion.prediction=eps"), r"use one of velocity, x_start, v, edm"),
        (["diffusion.prediction=velocity"], r"velocity isn't one of diffusion.process: ddpm; use one of eps, x_start"),
        (continuous("edm", "diffusion.loss=vlb"), r"diffusion.loss: vlb is a bound over the steps of process: ddpm"),
        (continuous("edm", "diffusion.variance=learned"), r"diffusion.variance: learned is learned by process: ddpm"),
        (["diffusion.time_mean=0"], r"time_mean and time_std: of times: log_normal alone"),
        (
            ["diffusion.times=log_normal", "diffusion.t_sampling=loss_second_moment"],
            r"loss_second_moment draws whole times by their losses, times: log_normal by their noise",
        ),
        (continuous("edm", "sampling.guidance_interval=[1, 90]"), r"\[1, 90\] reaches beyond the last t, 80"),
        (["sampling.guidance_interval=[1.5, 9]"], r"process: ddpm has whole t"),
        (["sampling.churn=5"], r"sampling.churn: 5.0 has no meaning for sampling.sampler: ddpm; only heun"),
        (["sampling.churn_noise=1.007"], r"churn_interval and churn_noise: of sampling.churn, which is 0"),
        (
            ["sampling.sampler=heun", "sampling.churn=5", "sampling.churn_interval=[3, 2]"],
            r"sampling.churn_interval: \[3.0, 2.0\] is not",
        ),
        (["sampling.guide=s3://bucket/other"], r"sampling.guide: does nothing with sampling.guidance_scale: 1"),
        (["logging.profile_steps=[5, 3]"], r"logging.profile_steps: \[5, 3\] is not \[first, last\]"),
        (["data.streams=7"], r"data.streams: 7 doesn't divide train.global_batch: 96"),
        (["train.lr_schedule=cosine"], r"train.decay_steps: needed with"),
        (["train.lr_schedule=cosine", "train.decay_steps=9"], r"decay_steps: 9 lies within train.warmup_steps: 5000"),
        (["ema.decay=null"], r"give one of ema.decay and ema.halflife_Mimg"),
        (["ema.halflife_Mimg=0.5"], r"give one of ema.decay and ema.halflife_Mimg"),
        (["train.decay_steps=9"], r"train.decay_steps: train.lr_schedule: constant doesn't use it"),
        (["ema.power=[0.05, 0.0502]"], r"ema.power: \[0.05, 0.0502\] are too near"),
        (["zero.stage=0"], r"zero.stage: 0 works in fp32 only.*use zero.stage: 1"),
        (["zero.stage=0", "precision=fp32", "zero.offload_optimizer=true"], r"offload_optimizer: .*use zero.stage: 1"),
        (["precision=fp16"], r"precision: fp16 needs"),
        (["cluster.workers=5"], r"must divide train.global_batch: 96; admissible up to 5: \[1, 2, 3, 4\]"),
        (["cluster.workers=97"], r"cluster.workers: 97 are more than train.global_batch: 96 has images"),
        (["cluster.workers=[4, 2]"], r"\[4, 2\] is not \[min, max\]"),
        (["train.lr=-1"], r"train.lr: -1: .*greater than 0"),
        (["run.seed=-1"], r"run.seed: -1"),
        (["zero.stage=4"], r"zero.stage: 4: Input should be 0, 1, 2 or 3"),
    ],
)
def test_what_cannot_work_is_refused_by_name(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(*overrides)


@pytest.mark.parametrize(
    ("batch", "streams", "before"),
    [
        (96, 32, 32),
        (128, 32, 32),
        (7, 7, 7),
        (62, 31, 31),
        (37, 1, 1),
        (512, 128, 32),
        (1000, 250, 25),
        (65_536, 16_384, 32),
    ],
)
def test_streams_grow_with_the_batch_and_stay_what_they_were_in_small_ones(
    batch: int, streams: int, before: int
) -> None:
    assert make(f"train.global_batch={batch}").streams == streams
    assert streams_before_0_2(batch) == before


@pytest.mark.parametrize(("workers", "expected"), [("3", (3, 3)), ("[2, 6]", (2, 6))])
def test_worker_range(workers: str, expected: tuple[int, int]) -> None:
    assert make(f"cluster.workers={workers}").worker_range == expected


def test_what_version_0_1_0_saved_is_still_the_same_run() -> None:
    """Keys may be added, with a default that means what was before; none goes, and none changes its place."""
    saved = (HERE / "golden/config-0.1.0.yaml").read_text()
    assert differences(parse_config(saved), make()) == {"identity": [], "schedule": [], "free": []}
    now = iter(dump_config(make()).splitlines())
    assert all(line in now for line in saved.splitlines())


def test_a_configuration_does_not_change() -> None:
    cfg: Any = make()
    with pytest.raises(Exception, match="frozen"):
        cfg.train.steps = 5


def test_every_key_is_documented_or_plain() -> None:
    """A key whose name is not the field's own word has a description."""
    plain = {
        "timesteps", "beta_start", "beta_end", "channel_mult", "num_res_blocks", "norm_groups", "norm_eps", "dropout",
        "optimizer", "lr", "betas", "eps", "weight_decay", "lr_schedule", "prediction", "variance", "loss", "weighting",
        "min_snr_gamma", "p2_gamma", "p2_k", "t_sampling", "sampler", "spacing", "precision", "stage", "every_steps",
        "keep_last", "metrics", "num_samples", "channels", "cache_bytes", "format",
        "cpus_per_worker", "gpus_per_worker", "dynamic_quantile", "schedule", "zero_terminal_snr",
    }  # fmt: skip
    undocumented = {
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key, inner in getattr(field.annotation, "model_fields", {}).items()
        if inner.description is None and key not in plain
    }
    assert not undocumented


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("~/runs/a", "write file:///"),
        ("file://~/runs", "write file:///"),
        ("runs/a", "a folder here is file:///"),
        ("s3a://bucket/run", "write s3://BUCKET/FOLDER"),
        ("s3:///run", "names no bucket"),
        ("s3://bucket/../run", r"holds \.\."),
        ("file:///data/./run", r"holds \.,"),
        ("s3://bucket//run", "holds //"),
        ("file:///~/runs", "nobody expands ~ .*write file:///"),
        ("s3://$BUCKET/run", r"nobody expands \$BUCKET"),
        ("file:///${HOME}/run", r"nobody expands \$\{HOME\}"),
        ("s3://bucket/run ", "ends with a space"),
    ],
)
def test_a_url_that_means_another_place_elsewhere_is_refused_with_what_to_write(url: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        check_url(url)


def test_a_run_has_a_folder_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"run.url: s3://b/x is data.url"):
        parse_config(
            "{run: {url: s3://b/x}, data: {url: s3://b/x/, image_size: 32}, train: {steps: 1, global_batch: 12}}"
        )
