"""Files of other programs: each original network, with random weights, computes what its conversion computes."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from ddpm_dist.errors import ConfigError, SnapshotError
from ddpm_dist.snapshot.foreign import Foreign, read_file
from ddpm_dist.snapshot.told import Told
from tests.models.networks import distance, random_unet, randomize, tiny_config
from tests.snapshot.originals import W8, OpenAi, Pesser

PROCESS = ("diffusion.timesteps=1000", "diffusion.schedule=linear", "diffusion.variance=fixedlarge")
SIZE = "data.image_size=16"
NARROW = {"ch": 32, "mult": (1, 2, 2), "blocks": 2}


def saved(path: Path, value: Any) -> str:
    torch.save(value, path)
    return path.as_uri()


def check(found: Foreign, original: nn.Module, classes: int = 0, size: int = 16) -> None:
    """Outputs within 1e-5 of the largest; with every weight at work."""
    torch.manual_seed(1)
    x, t = torch.randn(3, 3, size, size), torch.tensor([0, 412, 999])
    y = torch.tensor([0, classes - 1, 1]) if classes else None
    with torch.no_grad():
        theirs = original.eval()(x, t, y) if classes else original.eval()(x, t)
        assert theirs.std() > 0.05, "the comparison would be empty"
        assert distance(found.unet(x, t, y), theirs) < 1e-5


@pytest.mark.parametrize("attention", [(8,), (16, 4), ()], ids=str)
def test_pessers_official_weights(attention, tmp_path):
    original = randomize(Pesser(**NARROW, attention=attention, size=16))
    url = saved(tmp_path / "model-790000.ckpt", original.state_dict())
    found = read_file(url, Told(None, (SIZE, *PROCESS), "ema"))
    check(found, original)
    assert (found.kind, found.diffusion.variance) == ("ema", "fixedlarge")


def test_a_fork_of_ddim_with_module_names(tmp_path):
    """[model, optimizer, epoch, step, average], the model's names with `module.`."""
    raw, average = (randomize(Pesser(32, (1, 2), 1, (8,), 16), seed) for seed in (0, 1))
    states = [{f"module.{n}": v for n, v in raw.state_dict().items()}, {"state": {0: {"step": 1}}}, 3, 1000,
              average.state_dict()]  # fmt: skip
    url = saved(tmp_path / "ckpt.pth", states)
    check(read_file(url, Told(None, (SIZE, *PROCESS))), average)
    found = read_file(url, Told(None, (SIZE, *PROCESS), "raw"))
    check(found, raw)
    assert found.kind == "raw"


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_w86763777s_checkpoint(weights, tmp_path):
    """Interleaved sinusoids, eps 1e-5, symmetric padding; T is the height of the fixed table."""
    nets = {
        "ema": randomize(W8(1000, 32, (1, 2, 2), (1,), 2), 1),
        "raw": randomize(W8(1000, 32, (1, 2, 2), (1,), 2), 2),
    }
    for net in nets.values():  # `randomize` has drawn the table as well; it is fixed
        net.time_embedding.timembedding[0] = W8(1000, 32, (1,), (), 1).time_embedding.timembedding[0]
    optim = torch.optim.Adam(nets["raw"].parameters()).state_dict()
    scheduler = {"base_lrs": [2e-4], "last_epoch": 7, "lr_lambdas": [None]}
    checkpoint = {"net_model": nets["raw"].state_dict(), "ema_model": nets["ema"].state_dict(), "sched": scheduler,
                  "optim": optim, "step": 7, "x_T": torch.randn(4, 3, 16, 16)}  # fmt: skip
    url = saved(tmp_path / "ckpt.pt", checkpoint)
    found = read_file(url, Told(None, (SIZE, "diffusion.variance=fixedlarge"), weights))
    check(found, nets[weights])
    assert (found.kind, found.diffusion.timesteps) == (weights, 1000)
    with pytest.raises(ConfigError, match=r"diffusion\.timesteps: 1000 there, 500 was said"):
        read_file(url, Told(None, (SIZE, "diffusion.variance=fixedlarge", "diffusion.timesteps=500")))


OPENAI: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "improved, heads": ({"heads": 4, "scale_shift": True, "learn_sigma": True}, ("model.heads=4",)),
    "improved, T 4000": (
        {"heads": 4, "learn_sigma": True, "rescale": 0.25},
        ("model.heads=4", "model.time_scale=0.25", "diffusion.timesteps=4000", "diffusion.schedule=cosine"),
    ),
    "improved, plain": ({"heads": 1}, ("model.heads=1", "diffusion.variance=fixedlarge")),
    "guided, uncond": (
        {"head_channels": 16, "scale_shift": True, "updown": True, "learn_sigma": True},
        ("model.head_channels=16",),
    ),
    "guided, classes": (
        {"head_channels": 16, "scale_shift": True, "updown": True, "learn_sigma": True, "classes": 5},
        ("model.head_channels=16",),
    ),
    "guided 64, new order": (
        {
            "head_channels": 16,
            "scale_shift": True,
            "updown": True,
            "learn_sigma": True,
            "new_order": True,
            "classes": 5,
        },
        ("model.head_channels=16",),
    ),
}


@pytest.mark.parametrize("name", OPENAI)
def test_openais_files(name, tmp_path):
    flags, said = OPENAI[name]
    original = randomize(OpenAi(32, (1, 2, 3), 2, (8, 4), size=16, **flags))
    url = saved(tmp_path / "model.pt", original.state_dict())
    stated = {one.partition("=")[0] for one in said}
    process = [one for one in (*PROCESS[:2], "diffusion.prediction=eps") if one.partition("=")[0] not in stated]
    found = read_file(url, Told(None, (SIZE, *process, *said), None, "apart" if flags.get("new_order") else "together"))
    check(found, original, flags.get("classes", 0))
    assert found.diffusion.variance == ("learned_range" if flags.get("learn_sigma") else "fixedlarge")
    assert found.unet.config.timestep_scale == flags.get("rescale", 1.0)


def test_the_order_of_q_k_and_v_matters_and_is_asked(tmp_path):
    original = randomize(OpenAi(32, (1, 2), 1, (8,), size=16, heads=4, new_order=True))
    url = saved(tmp_path / "model.pt", original.state_dict())
    with pytest.raises(ConfigError) as caught:
        read_file(url, Told())
    for key in ("data.image_size", "diffusion.timesteps", "diffusion.schedule", "diffusion.prediction",
                "diffusion.variance", "model.head_channels", "--qkv"):  # fmt: skip
        assert f"\n  {key}: " in str(caught.value)
    with pytest.raises(ConfigError, match=r"\n  model\.time_scale: 1000 / T"):
        read_file(url, Told(None, ("diffusion.timesteps=4000",)))
    said = (SIZE, *PROCESS, "diffusion.prediction=eps", "model.heads=4")
    outputs = [read_file(url, Told(None, said, None, order)).unet(torch.ones(1, 3, 16, 16), torch.tensor([5]))
               for order in ("together", "apart")]  # fmt: skip
    assert distance(*outputs) > 1e-3


def test_a_recipe_is_held_against_the_file(tmp_path):
    original = randomize(Pesser(32, (1, 2), 1, (8,), 16))
    url = saved(tmp_path / "model.ckpt", original.state_dict())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {}\ndata: {image_size: 16}\nmodel: {channels: 32, channel_mult: [1, 2], num_res_blocks: 1, "
                      "attention_resolutions: [8]}\ndiffusion: {timesteps: 1000, schedule: linear, "
                      "variance: fixedsmall}\nema: {decay: 0.5}\n")  # fmt: skip
    check(read_file(url, Told(str(recipe))), original)
    for said, message in (
        ("model.num_res_blocks=2", "model.num_res_blocks: 1 there, 2 was said"),
        ("model.attention_resolutions=[16]", r"model.attention_resolutions: \[8\] there, \[16\] was said"),
        ("model.norm_eps=1e-5", "model.norm_eps: 1e-06 there, 1e-05 was said"),
        ("model.sinusoids=cos_sin", "model.sinusoids: sin_cos there"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_file(url, Told(str(recipe), (said,)))


@pytest.mark.parametrize("prefix", ["model.", "unet.", "ema_model.", "model.net.module."])
def test_lightning_around_diffusers_network(prefix, tmp_path):
    """UNet2DModel's names, below whatever the module is called; all that is silent is asked for."""
    unet = random_unet(tiny_config(norm_eps=1e-5, sinusoids="cos_sin", freq_shift=0, downsample_padding=1)).eval()
    state = {f"{prefix}{name}": value for name, value in unet.state_dict().items()}
    checkpoint = {"state_dict": state, "pytorch-lightning_version": "2.1.0", "epoch": 1,
                  "optimizer_states": [{"state": {}}],
                  "hyper_parameters": {"lr": 1e-4, "betas": (0.9, 0.99)}}  # fmt: skip
    url = saved(tmp_path / "last.ckpt", checkpoint)
    said = (SIZE, *PROCESS, "diffusion.prediction=eps", "model.norm_eps=1e-5", "model.sinusoids=cos_sin",
            "model.freq_shift=0", "model.downsample_padding=1", "model.norm_groups=8",
            "model.head_channels=null")  # fmt: skip
    found = read_file(url, Told(None, said))
    check(found, unet)
    assert found.kind == ("ema" if "ema" in prefix else None)
    for key in ("model.norm_eps", "model.sinusoids", "diffusion.prediction"):
        with pytest.raises(ConfigError, match=rf"\n  {key}: "):
            read_file(url, Told(None, [one for one in said if not one.startswith(key)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: v for n, v in s.items() if not n.startswith("output_blocks")}, "a classifier and no U-Net"),
        (lambda s: s | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, "takes 6 channels and gives 6"),
        (lambda s: s | {"time_embed.0.weight": torch.zeros(128, 64)}, "64 sinusoids and its first level 32 channels"),
        (lambda s: {n: v for n, v in s.items() if "time_embed.0" not in n}, "some are missing"),
    ],
    ids=["classifier", "upsampler", "512x512", "incomplete"],
)
def test_openais_other_networks_are_told_so(change, message, tmp_path):
    state = OpenAi(32, (1, 2), 1, (8,), size=16, learn_sigma=True).state_dict()
    with pytest.raises(SnapshotError, match=f"by its names of OpenAI's .*{message}"):
        read_file(saved(tmp_path / "model.pt", change(dict(state))), Told())


class HyperParameters:
    """What weights_only doesn't know."""


@pytest.mark.parametrize("value", [argparse.Namespace(lr=1), HyperParameters()])
def test_what_would_run_code_is_refused_with_the_lines_that_save_it_anew(value, tmp_path):
    state = random_unet(tiny_config()).state_dict()
    url = saved(tmp_path / "last.ckpt", {"state_dict": state, "hyper_parameters": value})
    with pytest.raises(SnapshotError, match=r"without running code(.|\n)*torch\.save\(found\.get") as caught:
        read_file(url, Told())
    assert "weights_only=False" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("model.init_conv.weight", "model.downs.0.0.block1.proj.weight"), "another network .*lucidrains"),
        (("time_embed.0.weight", "input_blocks.1.1.transformer_blocks.0.norm1.weight"), "latent diffusion"),
        (("model.map_layer0.weight", "model.enc.32x32_conv.weight"), "NVIDIA's EDM"),
        (("x_embedder.proj.weight", "blocks.0.attn.qkv.weight"), "DiT"),
        (("conv1.weight", "fc.weight"), r"isn't known here; its first parameters are .*Known are pesser"),
        ((), "no state dict"),
    ],
)
def test_other_networks_are_told_so(names, message, tmp_path):
    state = {name: torch.zeros(2) for name in names} | {f"x.{i}": torch.zeros(2) for i in range(8 if names else 0)}
    wrapped = {"step": 3, "model": state, "opt": {"state": {}}, "scaler": None, "version": "2.0"}
    with pytest.raises(SnapshotError, match=message):
        read_file(saved(tmp_path / "model-10.pt", wrapped), Told())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html><body>log in</body></html>", "an HTML page"),
        (b"PK\x03\x04cut off", "no weights can be read"),
        (b"", "no weights can be read"),
    ],
)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_files_that_are_none(data, message, ending, tmp_path):
    path = tmp_path / f"model.{ending}"
    path.write_bytes(data)
    with pytest.raises(SnapshotError, match=message):
        read_file(path.as_uri(), Told())


def test_safetensors_and_half_precision(tmp_path):
    original = randomize(Pesser(32, (1, 2), 1, (8,), 16)).half().float()
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({name: value.half() for name, value in original.state_dict().items()}, path)
    check(read_file(path.as_uri(), Told(None, (SIZE, *PROCESS))), original)
