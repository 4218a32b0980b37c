"""tools/convert_weights.py: what it writes computes what the source did, and diffusers opens it."""

import io

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_dist import storage
from ddpm_dist.commands.convert_weights import main, output_checksum
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.schedules import make_betas
from ddpm_dist.errors import ConfigError, SnapshotError
from ddpm_dist.snapshot import load_info, load_snapshot, save_snapshot
from ddpm_dist.snapshot.names import EMA_SUFFIX
from tests.models.networks import distance, inputs, random_unet, randomize, tiny_config
from tests.models.official import official_variables
from tests.snapshot.originals import OpenAi, Pesser

RECIPE = """
run: {url: "memory://run"}
data: {url: "memory://data", image_size: 16}
model: {channels: 16, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [8], norm_groups: 8}
train: {steps: 1, global_batch: 4}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def publish_npz(url: str, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    storage.publish(url, buffer.getvalue())


@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_an_official_npz_in_a_bucket(kind, recipe, bucket_url, tmp_path, capsys):
    unet = random_unet(tiny_config())
    suffix = EMA_SUFFIX if kind == "ema" else ""
    variables = official_variables(unet.state_dict(), unet.config)
    publish_npz(f"{bucket_url}/cifar.npz", {name + suffix: value for name, value in variables.items()})
    out = f"file://{tmp_path}/out"
    main([f"{bucket_url}/cifar.npz", out, "--config", recipe, "--weights", kind, "diffusion.variance=fixedsmall"])
    x, t, _ = inputs(unet.config, 2)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert distance(pipeline.unet(x, t).sample, unet.eval()(x, t)) < 1e-5
    assert pipeline.scheduler.config.variance_type == "fixed_small"
    assert load_info(out)["kind"] == kind

    printed = capsys.readouterr().out.split("checksum ")[1].split()
    assert [float(number) for number in printed] == pytest.approx(load_info(out)["output_checksum"], rel=1e-4)
    main([out, f"{out}2", "--checksum", *printed])  # a second conversion, held against the first
    with pytest.raises(SnapshotError, match=r"output checksum .*; --checksum is 1 2 3 4"):
        main([out, f"{out}3", "--checksum", "1", "2", "3", "4"])
    with pytest.raises(SnapshotError, match="not a snapshot"):
        load_info(f"{out}3")


def test_the_checksum_notices_each_silent_setting():
    """Settings that load the same shapes but compute something else change the four numbers."""
    plain = random_unet(tiny_config())
    reference = output_checksum(plain, 1000)
    again = random_unet(tiny_config())
    assert output_checksum(again, 1000) == reference
    for changes in ({"norm_eps": 1e-3}, {"flip_sin_to_cos": True}, {"downsample_padding": 1}, {"freq_shift": 0},
                    {"attention_head_dim": 8}):  # fmt: skip
        other = random_unet(type(plain.config)(**(vars(plain.config) | changes)))
        assert not np.allclose(output_checksum(other, 1000), reference, rtol=1e-3, atol=1e-6), changes


def test_a_folder_of_diffusers(tmp_path):
    settings = tiny_config(num_classes=2).to_diffusers()
    settings.pop("_class_name")
    theirs = UNet2DModel(**settings)
    DDPMPipeline(theirs, DDPMScheduler(variance_type="fixed_large")).save_pretrained(tmp_path / "theirs")
    main([f"file://{tmp_path}/theirs", f"file://{tmp_path}/ours"])
    ours, _ = load_snapshot(f"file://{tmp_path}/ours")
    x, t, labels = inputs(ours.config, 2)
    assert distance(ours(x, t, labels), theirs.eval()(x, t, labels).sample) < 1e-5
    assert load_info(f"file://{tmp_path}/ours")["null_label"] is None  # theirs don't say which row it is, if any


def test_bad_input_is_named(recipe, tmp_path):
    npz, out = f"file://{tmp_path}/a.npz", f"file://{tmp_path}/out"
    with pytest.raises(ConfigError, match="source and destination are the same"):
        main([out, out + "/"])
    with pytest.raises(ConfigError, match=r"--config: .*give its recipe"):
        main([npz, out])
    storage.publish(npz, b"not a zip")
    with pytest.raises(SnapshotError, match=r"a\.npz: not an \.npz"):
        main([npz, out, "--config", recipe])
    publish_npz(npz, {"objects": np.array([torch.nn.ReLU()], dtype=object)})
    with pytest.raises(SnapshotError, match=r"a\.npz: not an \.npz of plain arrays"):
        main([npz, out, "--config", recipe])
    unet = random_unet(tiny_config())
    publish_npz(npz, official_variables(unet.state_dict(), unet.config))
    with pytest.raises(SnapshotError, match=r"lacks down_blocks\.0\.resnets\.1"):
        main([npz, out, "--config", recipe, "--weights", "raw", "model.num_res_blocks=2"])
    with pytest.raises(SnapshotError, match="not a snapshot"):
        main([f"file://{tmp_path}/nothing", out])


def test_arguments_without_effect_and_a_snapshot_in_the_way_are_refused(recipe, tmp_path):
    url = f"file://{tmp_path}"
    unet = random_unet(tiny_config())
    save_snapshot(f"{url}/theirs", unet, unet.config, GaussianDiffusion(make_betas("linear", 20)), {})
    for extra in (["--config", recipe], ["--weights", "raw"], ["model.channels=64"]):
        with pytest.raises(ConfigError, match="are for files that don't tell all"):
            main([f"{url}/theirs", f"{url}/ours", *extra])
    main([f"{url}/theirs", f"{url}/ours"])
    with pytest.raises(ConfigError, match="holds a snapshot already"):
        main([f"{url}/theirs", f"{url}/ours"])


def test_what_a_scheduler_says_of_sampling_is_said_to_be_left(tmp_path, capsys):
    unet = random_unet(tiny_config())
    save_snapshot(f"file://{tmp_path}/a", unet, unet.config, GaussianDiffusion(make_betas("linear", 20)), {})
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "a")
    pipeline.scheduler = DDPMScheduler(variance_type="fixed_large", clip_sample=False, timestep_spacing="trailing")
    pipeline.save_pretrained(tmp_path / "b")
    main([f"file://{tmp_path}/b", f"file://{tmp_path}/c"])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not kept")]
    assert [line.split(";")[0] for line in said] == [
        "not kept: its scheduler's clip_sample: False",
        "not kept: its scheduler's timestep_spacing: trailing",
    ]


@pytest.mark.parametrize("wrong", ["empty", "npy", "strings", "nan"])
def test_what_is_no_npz_of_numbers_is_refused(wrong, recipe, tmp_path):
    unet, path = random_unet(tiny_config()), tmp_path / "weights.npz"
    variables = official_variables(unet.state_dict(), unet.config)
    if wrong == "empty":
        path.write_bytes(b"")
    elif wrong == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        some = next(iter(variables))
        value = np.full(variables[some].shape, "x" if wrong == "strings" else np.nan)
        publish_npz(path.as_uri(), {**variables, some: value})
    with pytest.raises(SnapshotError, match="not finite" if wrong == "nan" else "not an .npz of plain arrays"):
        main([path.as_uri(), f"file://{tmp_path}/out", "--config", recipe, "--weights", "raw"])
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_program_becomes_a_snapshot(tmp_path, capsys):
    """The official weights in torch, by the recipe's name and a key; and one that no diffusers can express."""
    url = f"file://{tmp_path}"
    original = randomize(Pesser(32, (1, 2), 1, (8,), 16)).eval()
    torch.save(original.state_dict(), tmp_path / "model-790000.ckpt")
    said = ["data.image_size=16", "diffusion.timesteps=1000", "diffusion.schedule=linear"]
    main([f"{url}/model-790000.ckpt", f"{url}/a", "--weights", "ema", *said, "diffusion.variance=fixedlarge"])
    assert "pesser/pytorch_diffusion, ema" in capsys.readouterr().out
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "a")
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    assert distance(pipeline.unet(x, t).sample, original(x, t)) < 1e-5
    assert load_info(f"{url}/a")["kind"] == "ema"
    with pytest.raises(ConfigError, match=r"model\.channel_mult: \[1, 2\] there, \[1, 2, 2, 2\] was said"):
        main([f"{url}/model-790000.ckpt", f"{url}/b", "--config", "cifar10", "data.image_size=16"])

    original = randomize(OpenAi(32, (1, 2, 3), 1, (8, 4), size=16, heads=4, rescale=0.5, learn_sigma=True)).eval()
    torch.save(original.state_dict(), tmp_path / "model.pt")
    said = ["data.image_size=16", "diffusion.timesteps=2000", "diffusion.schedule=cosine", "model.time_scale=0.5",
            "diffusion.prediction=eps"]  # fmt: skip
    main([f"{url}/model.pt", f"{url}/c", "--qkv", "together", "model.heads=4", *said])
    unet, diffusion = load_snapshot(f"{url}/c")
    assert distance(unet(x, 2 * t), original(x, 2 * t)) < 1e-5
    assert diffusion.variance == "learned_range"
    info = load_info(f"{url}/c")
    assert not info["portable"]
    assert "UNet2DModel has no number of attention heads" in info["not_portable_because"]
    with pytest.raises(Exception, match=r"DdpmDist|ddpm_dist"):
        DDPMPipeline.from_pretrained(tmp_path / "c")


def test_a_recipe_that_the_official_code_never_had_is_refused(recipe, tmp_path):
    """Its variables fit by name and shape whatever the recipe says of sinusoids and padding."""
    unet = random_unet(tiny_config())
    publish_npz(f"file://{tmp_path}/a.npz", official_variables(unet.state_dict(), unet.config))
    for said in ("model.norm_eps=1e-5", "model.sinusoids=cos_sin", "model.freq_shift=0", "model.downsample_padding=1",
                 "model.head_channels=8"):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{said.partition('=')[0]}: .* there, .* was said"):
            main([f"file://{tmp_path}/a.npz", f"file://{tmp_path}/b", "--config", recipe, "--weights", "raw", said])
