"""Snapshots: round trips, what diffusers makes of ours, what we make of theirs, and every way to be no snapshot."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_dist import storage
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.schedules import make_betas
from ddpm_dist.errors import SnapshotError
from ddpm_dist.recipe import parse_config
from ddpm_dist.snapshot import folder as snapshot
from tests.models.networks import distance, inputs, random_unet, tiny_config

LINEAR = make_betas("linear", 1000)


def save(url: str, diffusion: GaussianDiffusion | None = None, **changes):
    """Publishes a tiny random network; returns it."""
    diffusion = diffusion or GaussianDiffusion(LINEAR)
    unet = random_unet(tiny_config(learned="learned" in diffusion.variance, **changes))
    info = {"kind": "ema", "step": 500, "images_seen": 64000, "config": "run: {}\n"}
    snapshot.save_snapshot(url, unet, unet.config, diffusion, info)
    return unet


def edit(path: Path, **changes) -> None:
    """Changes a JSON file; the value `...` removes its key."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def foreign(folder: Path, scheduler=None) -> UNet2DModel:
    """A folder that diffusers wrote."""
    settings = tiny_config().to_diffusers()
    settings.pop("_class_name")
    torch.manual_seed(0)
    unet = UNet2DModel(**settings).eval()
    DDPMPipeline(unet, scheduler or DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder)
    return unet


@pytest.mark.parametrize("place", ["file", "memory", "s3"])
def test_round_trip(place, tmp_path, request):
    url = {"file": f"file://{tmp_path}/a b", "memory": "memory://snapshots/1"}.get(place)
    url = url or request.getfixturevalue("bucket_url")
    unet = save(url, num_classes=4)
    again, diffusion = snapshot.load_snapshot(url)
    assert again.config == unet.config
    assert not again.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in unet.state_dict().items())
    assert np.array_equal(diffusion.betas, LINEAR)
    assert (diffusion.prediction, diffusion.variance) == ("eps", "fixedlarge")
    info = snapshot.load_info(url)
    assert (info["kind"], info["step"], info["images_seen"], info["config"]) == ("ema", 500, 64000, "run: {}\n")
    assert (info["image_size"], info["channels"], info["null_label"], info["portable"]) == (16, 3, 4, True)
    assert info["num_classes"] == 4


def test_bytes_and_id_depend_on_contents_alone(tmp_path):
    one, two, other = (f"file://{tmp_path}/{name}" for name in ("one", "two", "other"))
    unet = save(one)
    shuffled = dict(reversed(unet.to(memory_format=torch.channels_last).state_dict().items()))
    snapshot.save_snapshot(two, shuffled, unet.config, GaussianDiffusion(LINEAR), {"step": 501})
    for name in storage.list_objects(one):
        same = storage.read(storage.join(one, name)) == storage.read(storage.join(two, name))
        assert same == (name != snapshot.OURS), name
    assert snapshot.snapshot_id(one) == snapshot.snapshot_id(two)
    for changed in (
        {"weights": {**shuffled, "conv_in.bias": shuffled["conv_in.bias"] + 1}},
        {"diffusion": GaussianDiffusion(LINEAR, "v")},
        {"info": {"null_label": 1}},
    ):
        given = {"weights": shuffled, "diffusion": GaussianDiffusion(LINEAR), "info": {}} | changed
        snapshot.save_snapshot(other, given["weights"], unet.config, given["diffusion"], given["info"])
        assert snapshot.snapshot_id(other) != snapshot.snapshot_id(one)


def test_a_broken_off_save_is_no_snapshot(tmp_path, monkeypatch):
    """Whichever write fails, the folder has no index: neither a new one nor that of other weights before."""
    url, publish = f"file://{tmp_path}", storage.publish
    for replaces in (False, True):
        for writes in range(5):
            if replaces:
                save(url)
            left = iter(range(writes))

            def limited(*args, left=left):
                if next(left, None) is None:
                    raise OSError("power cut")
                publish(*args)

            with monkeypatch.context() as patch:
                patch.setattr(storage, "publish", limited)
                with pytest.raises(OSError, match="power cut"):
                    save(url, GaussianDiffusion(LINEAR, "v"))
            with pytest.raises(SnapshotError, match="not a snapshot"):
                snapshot.load_snapshot(url)
            storage.delete_tree(url)


def test_publishing_the_same_again_never_withdraws_it(tmp_path, monkeypatch):
    url = f"file://{tmp_path}"
    save(url)
    monkeypatch.setattr(storage, "delete", lambda url: pytest.fail(f"{url} was deleted"))
    save(url)


def test_low_precision_weights_are_stored_in_float32(tmp_path):
    unet = random_unet(tiny_config()).bfloat16()
    snapshot.save_snapshot(f"file://{tmp_path}", unet, unet.config, GaussianDiffusion(LINEAR), {})
    stored = safetensors.torch.load_file(tmp_path / snapshot.WEIGHTS)
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert torch.equal(stored["conv_in.weight"].bfloat16(), unet.conv_in.weight)


@pytest.mark.parametrize("variance", ["fixedsmall", "fixedlarge", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
def test_diffusers_opens_ours(prediction, variance, tmp_path):
    """The pipeline opens, its scheduler has our betas, and one step from t gives our mean and variance."""
    diffusion = GaussianDiffusion(LINEAR, prediction, variance)
    unet = save(f"file://{tmp_path}", diffusion).eval()
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    x, _, _ = inputs(unet.config, 1)
    t = 400
    theirs = pipeline.unet(x, t).sample
    ours = unet(x, torch.tensor([t]))
    assert distance(theirs, ours) < 1e-5
    steps = [pipeline.scheduler.step(theirs, t, x, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    noise = [torch.randn(x.shape, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    reverse = diffusion.p_mean_variance(ours, x, torch.tensor([t]), clip=lambda image: image.clamp(-1, 1))
    for step, eps in zip(steps, noise, strict=True):
        expected = reverse.mean + reverse.variance.sqrt() * eps
        torch.testing.assert_close(step.prev_sample, expected.float(), rtol=1e-4, atol=1e-5)
    pipeline.scheduler.set_timesteps(1000)
    assert pipeline.scheduler.timesteps.tolist() == list(range(999, -1, -1))
    assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "quadratic", "cosine", "sigmoid", "linear_to_zero"])
def test_schedules_travel_exactly(schedule, tmp_path):
    """Ours come back bit for bit; diffusers, lacking most by name, reads them as trained_betas in float32."""
    zero = schedule == "linear_to_zero"
    betas = make_betas("linear" if zero else schedule, 200, 1e-3, 0.05, zero_terminal_snr=zero)
    save(f"file://{tmp_path}", GaussianDiffusion(betas, "v"))
    assert np.array_equal(snapshot.load_snapshot(f"file://{tmp_path}")[1].betas, betas)
    theirs = DDPMPipeline.from_pretrained(tmp_path).scheduler
    np.testing.assert_allclose(theirs.betas.numpy(), betas, rtol=1e-6)


@pytest.mark.parametrize(("prediction", "variance"), [("x_prev", "fixedlarge"), ("eps", "learned")])
def test_what_diffusers_lacks_is_marked_and_refused_there(prediction, variance, tmp_path):
    url = f"file://{tmp_path}"
    unet = save(url, GaussianDiffusion(LINEAR, prediction, variance))
    info = snapshot.load_info(url)
    assert not info["portable"]
    assert "diffusers has no" in info["not_portable_because"]
    assert snapshot.read_index(url)["_class_name"] == "DdpmDistPipeline"
    with pytest.raises(Exception, match=r"DdpmDist|ddpm_dist"):
        DDPMPipeline.from_pretrained(tmp_path)
    again, diffusion = snapshot.load_snapshot(url)
    assert (diffusion.prediction, diffusion.variance) == (prediction, variance)
    x, t, _ = inputs(unet.config, 2)
    assert torch.equal(again(x, t), unet.eval()(x, t))


def test_classes_open_in_diffusers_through_the_model(tmp_path):
    unet = save(f"file://{tmp_path}", num_classes=4).eval()
    theirs = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    x, t, _ = inputs(unet.config, 3)
    labels = torch.tensor([0, 3, snapshot.load_info(f"file://{tmp_path}")["null_label"]])
    assert distance(theirs(x, t, labels).sample, unet(x, t, labels)) < 1e-5


@pytest.mark.parametrize(
    "scheduler",
    [
        {"beta_schedule": "linear", "variance_type": "fixed_small"},
        {"beta_schedule": "scaled_linear", "variance_type": "fixed_small_log", "prediction_type": "sample"},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"beta_schedule": "sigmoid", "num_train_timesteps": 300},
        {"beta_schedule": "linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"trained_betas": [0.1, 0.2, 0.3]},
    ],
    ids=lambda settings: next(iter(settings.values())) if "beta_schedule" in settings else "trained",
)
def test_theirs_opens_here(scheduler, tmp_path):
    theirs = DDPMScheduler(**scheduler)
    unet = foreign(tmp_path, theirs)
    ours, diffusion = snapshot.load_snapshot(f"file://{tmp_path}")
    x, t, _ = inputs(ours.config, 2)
    assert distance(ours(x, t), unet(x, t).sample) < 1e-5
    np.testing.assert_allclose(diffusion.betas, theirs.betas.double(), rtol=2e-5, atol=1e-6)
    assert diffusion.prediction == {"sample": "x_start", "v_prediction": "v"}.get(theirs.config.prediction_type, "eps")
    assert diffusion.variance == "fixedsmall"
    info = snapshot.load_info(f"file://{tmp_path}")
    assert (info["image_size"], info["channels"], info["null_label"], info["step"]) == (16, 3, None, None)


def test_a_foreign_id_is_of_its_contents(tmp_path):
    foreign(tmp_path / "a")
    foreign(tmp_path / "b")
    one, two = (snapshot.snapshot_id(f"file://{tmp_path}/{name}") for name in "ab")
    assert one == two
    edit(tmp_path / "b/scheduler/scheduler_config.json", variance_type="fixed_small")
    assert snapshot.snapshot_id(f"file://{tmp_path}/b") != one
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        before = snapshot.snapshot_id(f"file://{tmp_path}/a")
        (tmp_path / "a/unet" / name).write_bytes(b"other")
        assert snapshot.snapshot_id(f"file://{tmp_path}/a") != before


def test_the_first_hosted_layout_opens_here(tmp_path):
    """As google/ddpm-*: everything in one folder, torch.save, legacy attention names, no prediction_type."""
    unet = foreign(tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    (old / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    (tmp_path / "new/unet/config.json").rename(old / "config.json")
    (tmp_path / "new/scheduler/scheduler_config.json").rename(old / "scheduler_config.json")
    edit(old / "scheduler_config.json", prediction_type=...)
    edit(old / "config.json", dropout=..., attn_norm_num_groups=..., class_embed_type=..., downsample_type=...)
    legacy = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, value in unet.state_dict().items():
        for modern, former in legacy.items():
            name = name.replace(f".{modern}.", f".{former}.")
        weights[name] = value
    assert any(".proj_attn." in name for name in weights)
    torch.save(weights, old / "diffusion_pytorch_model.bin")
    ours, diffusion = snapshot.load_snapshot(f"file://{old}")
    x, t, _ = inputs(ours.config, 2)
    assert distance(ours(x, t), unet(x, t).sample) < 1e-5
    assert diffusion.prediction == "eps"


@pytest.mark.parametrize(
    "key",
    [
        "norm_eps",
        "flip_sin_to_cos",
        "downsample_padding",
        "freq_shift",
        "attention_head_dim",
        "norm_num_groups",
        "layers_per_block",
        "act_fn",
        "center_input_sample",
        "mid_block_scale_factor",
        "time_embedding_type",
    ],
)
def test_a_setting_that_shapes_do_not_tell_must_be_there(key, tmp_path):
    foreign(tmp_path)
    edit(tmp_path / "unet/config.json", **{key: ...})
    with pytest.raises(SnapshotError, match=rf"unet/config\.json: no {key}"):
        snapshot.load_snapshot(f"file://{tmp_path}")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ("unet/config.json", {"center_input_sample": True}, "center_input_sample is True"),
        ("unet/config.json", {"mid_block_scale_factor": 2}, "mid_block_scale_factor is 2"),
        ("unet/config.json", {"mid_block_type": None}, "mid_block_type is None"),
        ("unet/config.json", {"time_embedding_dim": 32}, "time_embedding_dim is 32"),
        ("unet/config.json", {"downsample_padding": 2}, "downsample_padding is 2; known are 0, 1"),
        ("unet/config.json", {"downsample_type": "fir"}, "downsample_type is 'fir'"),
        ("unet/config.json", {"upsample_type": "fir"}, "upsample_type is 'fir'"),
        ("unet/config.json", {"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift is 'ada_group'"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "'SkipDownBlock2D'"),
        ("unet/config.json", {"block_out_channels": [16]}, "differ in length"),
        ("unet/config.json", {"sample_size": [16, 24]}, r"sample_size is \[16, 24\] .*images are square"),
        ("unet/config.json", {"sample_size": None}, "sample_size is None"),
        ("scheduler/scheduler_config.json", {"variance_type": "learned_range"}, "out_channels is 3, but .* gives 6"),
        ("unet/config.json", {"block_out_channels": [16, 48]}, r"has the shape \(32,.*config makes it \(48,"),
        ("unet/config.json", {"num_class_embeds": 5}, r"lacks class_embedding\.weight"),
        ("unet/config.json", {"layers_per_block": 2}, "lacks down_blocks.0.resnets.1.* more"),
        ("unet/config.json", {"attention_head_dim": 5}, "attention_head_dim: 5 doesn't divide 32"),
        ("unet/config.json", {"block_out_channels": None}, "block_out_channels is None"),
        ("unet/config.json", {"block_out_channels": ["16", "32"]}, r"block_out_channels\.0 is '16'"),
        ("unet/config.json", {"norm_eps": "1e-5"}, "norm_eps is '1e-5'"),
        ("unet/config.json", {"norm_eps": -1}, "norm_eps is -1"),
        ("unet/config.json", {"flip_sin_to_cos": None}, "flip_sin_to_cos is None"),
        ("unet/config.json", {"flip_sin_to_cos": "false"}, "flip_sin_to_cos is 'false'"),
        ("unet/config.json", {"attention_head_dim": 0}, "attention_head_dim is 0"),
        ("unet/config.json", {"sample_size": 15}, "sample_size is 15, which can't be halved 1 times"),
        ("unet/config.json", {"freq_shift": 8}, "block_out_channels: 16 are too few"),
        ("scheduler/scheduler_config.json", {"trained_betas": ["a"]}, "trained_betas are not a list of numbers"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10.5}, "num_train_timesteps is 10.5"),
        ("scheduler/scheduler_config.json", {"beta_start": None}, "beta_start is None"),
        ("scheduler/scheduler_config.json", {"prediction_type": ["v"]}, "prediction_type is"),
        ("scheduler/scheduler_config.json", {"variance_type": ...}, "no variance_type"),
        ("scheduler/scheduler_config.json", {"variance_type": "learned"}, "'learned'; known are"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "laplace"}, "'laplace'.*known are linear"),
        ("scheduler/scheduler_config.json", {"beta_end": ...}, "no beta_end"),
        ("scheduler/scheduler_config.json", {"prediction_type": "noise"}, "'noise'"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.5, 2.0]}, "scheduler_config.json: .*beta"),
    ],
)
def test_configs_that_do_not_fit_are_refused_by_name(file, changes, message, tmp_path):
    foreign(tmp_path)
    edit(tmp_path / file, **changes)
    with pytest.raises(SnapshotError, match=message):
        snapshot.load_snapshot(f"file://{tmp_path}")


def test_swish_is_silu(tmp_path):
    unet = foreign(tmp_path)
    edit(tmp_path / "unet/config.json", act_fn="swish", time_embedding_dim=4 * unet.config.block_out_channels[0])
    ours, _ = snapshot.load_snapshot(f"file://{tmp_path}")
    x, t, _ = inputs(ours.config, 2)
    assert distance(ours(x, t), unet(x, t).sample) < 1e-5


def test_damage_is_named(tmp_path):
    url = f"file://{tmp_path}"
    save(url)
    weights = tmp_path / snapshot.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(SnapshotError, match=r"diffusion_pytorch_model\.safetensors: damaged"):
        snapshot.load_snapshot(url)
    weights.unlink()
    with pytest.raises(SnapshotError, match=r"has no weights .*; it has "):
        snapshot.load_snapshot(url)
    (tmp_path / snapshot.OURS).write_text("{")
    with pytest.raises(SnapshotError, match=r"ddpm_dist\.json: not JSON"):
        snapshot.load_info(url)
    (tmp_path / snapshot.OURS).write_text('{"files": {}}')
    with pytest.raises(SnapshotError, match="format None"):
        snapshot.load_info(url)
    (tmp_path / snapshot.OURS).write_text('{"format": 99}')
    with pytest.raises(SnapshotError, match="format 99"):
        snapshot.load_info(url)


@pytest.mark.parametrize("name", [snapshot.UNET_CONFIG, snapshot.SCHEDULER_CONFIG])
def test_a_changed_config_is_damage(name, tmp_path):
    save(f"file://{tmp_path}")
    edit(tmp_path / name, norm_eps=1e-5, beta_end=0.03)
    with pytest.raises(SnapshotError, match=rf"{name}: damaged"):
        snapshot.load_snapshot(f"file://{tmp_path}")


def test_parts_are_read_alone_but_of_a_whole_snapshot_only(tmp_path):
    url = f"file://{tmp_path}"
    unet = save(url, GaussianDiffusion(LINEAR, "v", "learned_range"))
    assert snapshot.network_in(url) == unet.config
    diffusion = snapshot.diffusion_in(url)
    assert (diffusion.prediction, diffusion.variance, diffusion.timesteps) == ("v", "learned_range", 1000)
    (tmp_path / snapshot.INDEX).unlink()
    for read in (snapshot.network_in, snapshot.diffusion_in):
        with pytest.raises(SnapshotError, match="not a snapshot"):
            read(url)


def test_weights_of_another_network_are_not_written(tmp_path):
    unet, url = random_unet(tiny_config()), f"file://{tmp_path}"
    state = unet.state_dict()
    lacking = {name: value for name, value in state.items() if name != "conv_in.bias"}
    for wrong in (lacking, state | {"extra": torch.zeros(1)}, state | {"conv_in.bias": torch.zeros(3)}):
        with pytest.raises(SnapshotError, match=r"not written: .* 1 differ, the first is (conv_in\.bias|extra)"):
            snapshot.save_snapshot(url, wrong, unet.config, GaussianDiffusion(LINEAR), {})
    assert not storage.list_objects(url)


def test_pickled_code_is_not_run(tmp_path):
    foreign(tmp_path)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": print}, tmp_path / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(SnapshotError, match="no weights can be read"):
        snapshot.load_snapshot(f"file://{tmp_path}")


def test_build_follows_the_recipe():
    text = """
    run: {url: "memory://run", seed: 5}
    data: {url: "memory://data", image_size: 16, channels: 1}
    model: {channels: 16, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [8], norm_groups: 8}
    diffusion: {variance: learned_range, loss: hybrid, timesteps: 100}
    train: {steps: 1, global_batch: 4}
    """
    unet, diffusion = snapshot.build(parse_config(text))
    same, _ = snapshot.build(parse_config(text))
    other, _ = snapshot.build(parse_config(text, ["run.seed=6"]))
    assert (unet.config.in_channels, unet.config.out_channels) == (1, 2)
    assert (diffusion.timesteps, diffusion.variance) == (100, "learned_range")
    assert snapshot.build(parse_config(text, ["diffusion.variance=learned"]))[0].config.out_channels == 2
    assert snapshot.build(parse_config(text, ["model.checkpoint_levels=[1]"]))[0].checkpoint_levels == {1}
    assert torch.equal(unet.conv_in.weight, same.conv_in.weight)
    assert not torch.equal(unet.conv_in.weight, other.conv_in.weight)
