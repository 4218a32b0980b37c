"""Folders of diffusers of every age and shape, and what they say that isn't a DDPM."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_dist.errors import ConfigError, SnapshotError
from ddpm_dist.snapshot import (
    Told,
    diffusion_in,
    in_cache,
    load_info,
    load_snapshot,
    notes_on,
    read_folder,
    snapshot_id,
)
from tests.models.networks import distance, inputs, randomize, tiny_config

SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline of diffusers."""
    settings = {k: v for k, v in tiny_config().to_diffusers().items() if k != "_class_name"}
    unet = randomize(UNet2DModel(**settings))
    DDPMPipeline(unet, DDPMScheduler(variance_type="fixed_large")).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def expected(folder: Path) -> tuple[torch.Tensor, Any]:
    x, t, _ = inputs(tiny_config(), 2)
    return UNet2DModel.from_pretrained(folder / "unet").eval()(x, t).sample, (x, t)


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "prediction"),
    [
        ({"prediction_type": ..., "predict_epsilon": False}, "x_start"),
        ({"prediction_type": ..., "predict_epsilon": True}, "eps"),
        ({"prediction_type": "sample", "predict_epsilon": False}, "x_start"),
        ({"prediction_type": ...}, "eps"),
    ],
)
def test_predict_epsilon(changes, prediction, folder):
    edit(folder / SCHEDULER, **changes)
    assert diffusion_in(folder.as_uri()).prediction == prediction


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predict_epsilon": False}, "predict_epsilon is False, but prediction_type is 'epsilon'"),
        ({"predict_epsilon": "no"}, "predict_epsilon is 'no'"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "another process .*flow matching"),
        ({"_class_name": "EDMAncestralScheduler"}, "another process .*EDM"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "another process .*consistency"),
        ({"_class_name": "LCMScheduler"}, "another process .*consistency"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "another process .*continuous time"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "another process .*flow matching"),
        ({"prediction_type": "flow_prediction"}, "another process .*flow matching"),
        ({"_class_name": "IPNDMScheduler"}, "_class_name is 'IPNDMScheduler', of which process isn't known"),
    ],
)
def test_other_processes_are_refused(changes, message, folder):
    edit(folder / SCHEDULER, **changes)
    with pytest.raises(SnapshotError, match=message):
        load_snapshot(folder.as_uri())


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "UniPCMultistep",
                                  "DPMSolverMultistep", "HeunDiscrete", "LMSDiscrete", "DEISMultistep"])  # fmt: skip
def test_samplers_of_the_same_process_need_no_variance(name, folder):
    """As diffusers writes them; what they say of sampling is said."""
    import diffusers

    scheduler = getattr(diffusers, f"{name}Scheduler")(beta_start=1e-4, beta_end=0.02)
    scheduler.save_pretrained(folder / "scheduler")
    theirs, given = expected(folder)
    network, diffusion = load_snapshot(folder.as_uri())
    assert distance(network(*given), theirs) < 1e-5
    assert (diffusion.prediction, diffusion.variance, diffusion.timesteps) == ("eps", "fixedsmall", 1000)
    assert any(f"its scheduler is {name}Scheduler" in note for note in notes_on(folder.as_uri()))


def test_a_log_of_the_large_variance_is_the_large_variance(folder):
    edit(folder / SCHEDULER, variance_type="fixed_large_log")
    assert diffusion_in(folder.as_uri()).variance == "fixedlarge"


def test_unknown_keys_are_said(folder):
    edit(folder / SCHEDULER, noise_offset=0.1, clip_sample=False)
    edit(folder / "unet/config.json", use_fancy_attention=True, inv_gamma=1.0)
    assert notes_on(folder.as_uri()) == [
        "its scheduler's clip_sample: False",
        "its scheduler's noise_offset: 0.1, which is unknown here",
        "its network's use_fancy_attention: True, which is unknown here",
    ]


def test_another_network_is_refused_by_its_class(folder):
    edit(folder / "unet/config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(SnapshotError, match="_class_name is 'UNet2DConditionModel', another network"):
        load_snapshot(folder.as_uri())


def test_half_precision_and_shards(folder):
    theirs, given = expected(folder)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for shard, inside in shards.items():
        safetensors.torch.save_file({name: tensors[name] for name in inside}, folder / "unet" / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert distance(load_snapshot(folder.as_uri())[0](*given), theirs) < 1e-5
    (folder / "unet" / min(shards)).unlink()
    with pytest.raises(SnapshotError, match=r"00001-of-00002\.safetensors: missing, and .* names it"):
        load_snapshot(folder.as_uri())
    (folder / f"{WEIGHTS}.index.json").unlink()
    half = {name: value.half() for name, value in tensors.items()}
    safetensors.torch.save_file(half, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    network, _ = load_snapshot(folder.as_uri())
    assert network.conv_in.weight.dtype == torch.float32
    assert distance(network(*given), theirs) < 1e-2


def test_the_oldest_names(folder):
    """image_size, resnet_eps, UNetRes…, mid, downsample_blocks, and each downsampling twice."""
    theirs, given = expected(folder)
    former = {"sample_size": "image_size", "layers_per_block": "num_res_blocks", "block_out_channels": "block_channels",
              "down_block_types": "down_blocks", "up_block_types": "up_blocks", "freq_shift": "downscale_freq_shift",
              "norm_num_groups": "resnet_num_groups", "act_fn": "resnet_act_fn", "norm_eps": "resnet_eps",
              "attention_head_dim": "num_head_channels"}  # fmt: skip
    config = json.loads((folder / "unet/config.json").read_text())
    config = {former.get(name, name): value for name, value in config.items()}
    for name in ("down_blocks", "up_blocks"):
        config[name] = [f"UNetRes{block}" for block in config[name]]
    (folder / "unet/config.json").write_text(json.dumps(config))
    weights = {}
    for name, value in safetensors.torch.load_file(folder / WEIGHTS).items():
        for now, then in (
            ("mid_block.", "mid."),
            ("down_blocks.", "downsample_blocks."),
            ("up_blocks.", "upsample_blocks."),
        ):
            name = then + name.removeprefix(now) if name.startswith(now) else name
        weights[name] = value
        if ".downsamplers.0.conv." in name:
            weights[name.replace(".conv.", ".op.")] = value
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "unet/diffusion_pytorch_model.bin")
    network, _ = load_snapshot(folder.as_uri())
    assert distance(network(*given), theirs) < 1e-5
    assert load_info(folder.as_uri())["image_size"] == 16


def test_a_pointer_of_git_lfs_is_named(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(SnapshotError, match=r"safetensors: a Git LFS pointer"):
        load_snapshot(folder.as_uri())


def test_a_cache_of_links(folder, tmp_path):
    """models--OWNER--NAME/{blobs, refs/main, snapshots/<commit>/…} with links into blobs."""
    theirs, given = expected(folder)
    cache, commit = tmp_path / "models--google--ddpm", "0" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    shutil.copytree(folder, cache / "blobs")
    for path in (p for p in folder.rglob("*") if p.is_file()):
        link = cache / "snapshots" / commit / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(cache / "blobs" / path.relative_to(folder))
    url = in_cache(cache.as_uri())
    assert url == f"{cache.as_uri()}/snapshots/{commit}"
    assert distance(load_snapshot(url)[0](*given), theirs) < 1e-5
    assert snapshot_id(url) == snapshot_id(folder.as_uri())
    with pytest.raises(SnapshotError, match=rf"a Hugging Face cache: give .*snapshots/{commit}"):
        load_snapshot(cache.as_uri())


PROCESS = ("diffusion.timesteps=1000", "diffusion.schedule=linear", "diffusion.prediction=eps",
           "diffusion.variance=fixedsmall")  # fmt: skip


def test_a_checkpoint_of_the_training_script(folder, tmp_path):
    """checkpoint-N/{unet, unet_ema}: the average unless the raw ones are wanted; the process is asked for."""
    theirs, given = expected(folder)
    checkpoint = tmp_path / "checkpoint-500"
    shutil.copytree(folder / "unet", checkpoint / "unet_ema")
    shutil.copytree(folder / "unet", checkpoint / "unet")
    edit(checkpoint / "unet_ema/config.json", decay=0.9999, min_decay=0.0, optimization_step=500, power=0.75,
         update_after_step=0, use_ema_warmup=True, inv_gamma=1.0)  # fmt: skip
    raw = {name: 2 * value for name, value in safetensors.torch.load_file(folder / WEIGHTS).items()}
    safetensors.torch.save_file(raw, checkpoint / WEIGHTS)
    with pytest.raises(ConfigError, match=r"diffusion\.timesteps: (.|\n)*diffusion\.variance: "):
        read_folder(checkpoint.as_uri(), Told())
    found = read_folder(checkpoint.as_uri(), Told(None, PROCESS))
    assert (found.kind, found.diffusion.variance) == ("ema", "fixedsmall")
    assert distance(found.unet(*given), theirs) < 1e-5
    raw_one = read_folder(checkpoint.as_uri(), Told(None, PROCESS, "raw"))
    assert raw_one.kind == "raw"
    assert distance(raw_one.unet(*given), theirs) > 1e-2
    alone = read_folder(f"{checkpoint.as_uri()}/unet_ema", Told(None, PROCESS))
    assert alone.kind == "ema"
    with pytest.raises(SnapshotError, match="--weights raw: it holds ema"):
        read_folder(f"{checkpoint.as_uri()}/unet_ema", Told(None, PROCESS, "raw"))
    with pytest.raises(SnapshotError, match="ddpm-convert makes a snapshot of it"):
        load_snapshot(checkpoint.as_uri())


def test_three_files_and_a_network_alone(folder, tmp_path):
    theirs, given = expected(folder)
    three = tmp_path / "three"
    shutil.copytree(folder / "unet", three)
    found = read_folder(three.as_uri(), Told(None, PROCESS))
    assert found.kind is None
    with pytest.raises(ConfigError, match=r"model\.norm_eps: 1e-06 there, 1e-05 was said"):
        read_folder(three.as_uri(), Told(None, (*PROCESS, "model.norm_eps=1e-5")))
    shutil.copy(folder / SCHEDULER, three)
    found = read_folder(three.as_uri(), Told())
    assert distance(found.unet(*given), theirs) < 1e-5
    assert found.diffusion.variance == "fixedlarge"
    with pytest.raises(ConfigError, match=r"scheduler_config\.json says itself"):
        read_folder(three.as_uri(), Told(None, PROCESS))
    (three / "config.json").unlink()
    with pytest.raises(SnapshotError, match=r"no config\.json, so it isn't known .*it has diffusion_pytorch_model"):
        read_folder(three.as_uri(), Told())
