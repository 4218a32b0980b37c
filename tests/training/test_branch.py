"""run.init_from before anything starts: what a recipe leaves open is taken from the origin, what differs is refused."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_dist import snapshot, storage
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.schedules import make_betas
from ddpm_dist.errors import ConfigError, SnapshotError
from ddpm_dist.recipe import dump_config, parse_config
from ddpm_dist.snapshot.fitting import Task, changes, fit
from ddpm_dist.training.branch import resolve, task_of
from tests.models.networks import distance, inputs, random_unet, randomize, tiny_config

LINEAR = make_betas("linear", 1000)
GOOGLE = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
          "attention_head_dim": None}  # fmt: skip
SCRIPT = {"downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "attention_head_dim": 8}
"""diffusers' two public families; their weights have the same names and shapes."""


def recipe(tmp_path: Path, origin: str, model: str = "", diffusion: str = "", *overrides: str) -> Any:
    """A recipe that says nothing of the network but what the given lines say."""
    text = f"""
    run: {{url: "file://{tmp_path}/new", init_from: "{origin}"}}
    data: {{url: "memory://data", image_size: 16}}
    model: {{channels: 16, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [8], {model}}}
    diffusion: {{{diffusion}}}
    train: {{steps: 1, global_batch: 4}}
    """
    return parse_config(text, ["model.norm_groups=8", *overrides] if "norm_groups" not in model else overrides)


def foreign(folder: Path, **settings: Any) -> tuple[str, UNet2DModel]:
    unet = UNet2DModel(**{k: v for k, v in (tiny_config().to_diffusers() | settings).items() if k != "_class_name"})
    randomize(unet)
    DDPMPipeline(unet, DDPMScheduler(variance_type="fixed_small")).save_pretrained(folder)
    return f"file://{folder}", unet.eval()


def ours(folder: Path, diffusion: GaussianDiffusion | None = None, **changes: Any) -> str:
    diffusion = diffusion or GaussianDiffusion(LINEAR)
    unet = random_unet(tiny_config(learned=diffusion.learns_variance, **changes))
    snapshot.save_snapshot(f"file://{folder}", unet, unet.config, diffusion, {"kind": "ema"})
    return f"file://{folder}"


@pytest.mark.parametrize("family", [GOOGLE, SCRIPT], ids=["google", "script"])
def test_both_families_of_diffusers_are_trained_on_exactly(family, tmp_path, caplog):
    """The recipe leaves padding, sinusoids, shift, eps and heads open; the network that is trained is theirs."""
    url, theirs = foreign(tmp_path / "theirs", **family)
    with caplog.at_level(logging.INFO):
        cfg = resolve(recipe(tmp_path, url))
    network, diffusion = snapshot.build(cfg)
    network.load_state_dict(snapshot.load_snapshot(url)[0].state_dict())
    x, t, _ = inputs(network.config, 2)
    assert distance(network.eval()(x, t), theirs(x, t).sample) < 1e-5
    assert diffusion.variance == "fixedsmall"
    assert ("model.sinusoids: cos_sin" in caplog.text) == (family is SCRIPT)
    again = parse_config(dump_config(cfg))
    assert snapshot.network_of(again) == network.config, "the saved recipe says it all"


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("downsample_padding: 0", "model.downsample_padding: 1 there, 0 here"),
        ("sinusoids: sin_cos", "model.sinusoids: cos_sin there, sin_cos here"),
        ("freq_shift: 1", "model.freq_shift: 0 there, 1 here"),
        ("norm_eps: 1e-6", "model.norm_eps: 1e-05 there, 1e-06 here"),
        ("head_channels: null", "model.head_channels: 8 there, None here"),
        ("heads: 2", "model.head_channels: 8 there, None here"),
        ("norm_groups: 4", "model.norm_groups: 8 there, 4 here"),
        ("scale_shift: true", "model.scale_shift: False there, True here"),
        ("resample: resblock", "model.resample: conv there, resblock here"),
        ("time_scale: 0.5", "model.time_scale: 1.0 there, 0.5 here"),
    ],
)
def test_what_the_recipe_says_otherwise_is_refused_with_both_values(stated, message, tmp_path):
    url, _ = foreign(tmp_path / "theirs", **SCRIPT)
    with pytest.raises(ConfigError, match=r"init_from: .* is of another network or process") as caught:
        resolve(recipe(tmp_path, url, stated))
    assert message in str(caught.value)
    assert "init_changes" in str(caught.value)


@pytest.mark.parametrize("stated", ["schedule: cosine", "timesteps: 500", "beta_end: 0.03", "prediction: v"])
def test_another_process_is_refused_unless_it_is_meant(stated, tmp_path, caplog):
    url = ours(tmp_path / "a")
    key = f"diffusion.{stated.partition(':')[0]}"
    with pytest.raises(ConfigError, match=f"{key}: .* there, .* here"):
        resolve(recipe(tmp_path, url, "", stated))
    cfg = resolve(recipe(tmp_path, url, "", stated, f"run.init_changes=[{key}]"))
    assert f"changed, as run.init_changes says: {key}" in caplog.text
    assert str(getattr(cfg.diffusion, key.partition(".")[2])) == stated.partition(": ")[2]


@pytest.mark.parametrize(
    "betas",
    [
        make_betas(name, 200, 1e-3, 0.05)
        for name in ("linear", "scaled_linear", "cosine", "sigmoid", "sigmoid_alpha_bar")
    ]
    + [make_betas("linear", 200, zero_terminal_snr=True), np.linspace(0.01, 0.02, 50) ** 1.1],
)
def test_an_open_process_is_the_origins(betas, tmp_path):
    url = ours(tmp_path / "a", GaussianDiffusion(betas, "v", "fixedsmall"))
    cfg = resolve(recipe(tmp_path, url))
    process = GaussianDiffusion.from_config(cfg.diffusion)
    assert np.array_equal(process.betas, betas)
    assert (process.prediction, process.variance) == ("v", "fixedsmall")


def test_a_run_with_a_state_does_not_need_its_origin(tmp_path, monkeypatch):
    """What was open is as the run's own config says, although the origin is gone."""
    url, _ = foreign(tmp_path / "theirs", **SCRIPT)
    cfg = recipe(tmp_path, url)
    first = resolve(cfg)
    storage.publish(f"{cfg.run.url}/config.yaml", dump_config(first).encode())
    storage.delete_tree(url)
    monkeypatch.setattr("ddpm_dist.training.branch.newest_state", lambda run_url: f"{run_url}/checkpoints/x")
    assert resolve(cfg) == first


def test_a_network_that_no_recipe_describes_is_refused(tmp_path):
    unet = random_unet(dataclasses.replace(tiny_config(), add_attention=False))
    snapshot.save_snapshot(f"file://{tmp_path}/a", unet, unet.config, GaussianDiffusion(LINEAR), {})
    with pytest.raises(ConfigError, match=r"no recipe describes its network.*\n.*add_attention: False there"):
        resolve(recipe(tmp_path, f"file://{tmp_path}/a"))


def test_changes_that_are_none_and_files_are_refused(tmp_path):
    url = ours(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"init_changes: model\.hats is not among what is compared: data\.channels"):
        resolve(recipe(tmp_path, url, "", "", "run.init_changes=[model.hats]"))
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(SnapshotError, match=r"weights\.pt: a file and no snapshot; ddpm-convert"):
        resolve(recipe(tmp_path, f"file://{tmp_path}/weights.pt"))


def test_changes_without_an_origin_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.init_changes: names differences"):
        resolve(recipe(tmp_path, "", "", "", "run.init_from=null", "run.init_changes=[model.heads]"))


# Another task


def task(learned: str | None = None, num_classes: int | None = None, null: int | None = None, size: int = 16) -> Task:
    config = tiny_config(learned=learned is not None, num_classes=num_classes)
    process = GaussianDiffusion(LINEAR, "eps", learned or "fixedlarge")
    return Task(dataclasses.replace(config, sample_size=size), process, num_classes if null is None else null)


def fitted(theirs: Task, to: Task) -> tuple[Any, Any]:
    """(network of `theirs` with random weights, network of `to` with them fitted)."""
    before, after = random_unet(theirs.network).eval(), random_unet(to.network).eval()
    after.load_state_dict(fit(dict(before.named_parameters()), theirs, to))
    return before, after


def test_new_classes_begin_as_no_class():
    theirs, to = task(), task(num_classes=3)
    before, after = fitted(theirs, to)
    x, t, _ = inputs(theirs.network, 4)
    assert torch.equal(after(x, t, torch.tensor([0, 1, 2, 3])), before(x, t))
    assert changes(theirs, to) == ["3 classes and the null class are new; each begins as no class"]


@pytest.mark.parametrize(("count", "kept"), [(6, 4), (4, 4), (2, 0)])
def test_other_classes(count, kept):
    theirs, to = task(num_classes=4), task(num_classes=count)
    before, after = fitted(theirs, to)
    x, t, _ = inputs(theirs.network, 1)
    for label in range(count + 1):
        same_as = label if label < kept else 4
        assert torch.equal(after(x, t, torch.tensor([label])), before(x, t, torch.tensor([same_as])))
    assert len(changes(theirs, to)) == (count != 4)


def test_no_classes_is_what_the_null_class_gave():
    theirs, to = task(num_classes=4), task()
    before, after = fitted(theirs, to)
    x, t, _ = inputs(to.network, 2)
    assert distance(after(x, t), before(x, t, torch.tensor([4, 4]))) < 1e-5
    with pytest.raises(ConfigError, match="none that means no class"):
        changes(dataclasses.replace(theirs, null_label=None), to)


@pytest.mark.parametrize("fixed", ["fixedlarge", "fixedsmall"])
def test_a_variance_that_is_going_to_be_learned_begins_as_the_fixed_one(fixed):
    theirs, to = task(), task("learned_range")
    theirs = dataclasses.replace(theirs, diffusion=GaussianDiffusion(LINEAR, "eps", fixed))
    before, after = fitted(theirs, to)
    x, t, _ = inputs(theirs.network, 3)
    reverse = [one.diffusion.p_mean_variance(net(x, t), x, t) for one, net in ((theirs, before), (to, after))]
    torch.testing.assert_close(reverse[0].mean, reverse[1].mean)
    torch.testing.assert_close(reverse[0].log_variance.expand_as(x), reverse[1].log_variance)
    back = fit(dict(after.named_parameters()), to, theirs)
    assert all(torch.equal(value, back[name]) for name, value in before.named_parameters())
    with pytest.raises(ConfigError, match="learned can't begin from fixed"):
        changes(theirs, task("learned"))


def test_tasks_are_said_and_never_silent(tmp_path, caplog):
    url = ours(tmp_path / "a", num_classes=4)
    overrides = ["diffusion.variance=learned_range", "diffusion.loss=hybrid", "data.image_size=32",
                 "model.attention_resolutions=[16]", "model.num_classes=7"]  # fmt: skip
    with caplog.at_level(logging.INFO):
        cfg = resolve(recipe(tmp_path, url, "", "", *overrides))
    for said in ("images of 32 px instead of 16", "7 classes instead of 4: the first 4 stay", "begins as fixedlarge"):
        assert said in caplog.text
    assert task_of(cfg).network.out_channels == 6


def test_an_open_number_of_classes_is_the_origins(tmp_path):
    assert resolve(recipe(tmp_path, ours(tmp_path / "a", num_classes=4))).model.num_classes == 4


def test_levels_and_not_resolutions_have_attention(tmp_path):
    """At another size, a level's resolution is another one."""
    url = ours(tmp_path / "a")
    cfg = recipe(
        tmp_path, url, "", "", "data.image_size=32", "model.attention_resolutions=[8]", "model.channel_mult=[1,2,2]"
    )
    with pytest.raises(ConfigError, match=r"attention_resolutions: \[16\] there, \[8\] here"):
        resolve(cfg)
