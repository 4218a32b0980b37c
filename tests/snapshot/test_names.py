"""Weights under other names: the official code's variables and diffusers' legacy attention."""

import numpy as np
import pytest
import torch

from ddpm_dist.config import ModelConfig
from ddpm_dist.errors import SnapshotError
from ddpm_dist.models.config import UNetConfig
from ddpm_dist.models.unet import UNet
from ddpm_dist.snapshot.names import EMA_SUFFIX, from_official, load_into, modern_names
from tests.models.networks import random_unet, tiny_config
from tests.models.official import official_variables

THREE_LEVELS = UNetConfig.from_recipe(
    ModelConfig(channels=16, channel_mult=(1, 2, 2), attention_resolutions=(8,), norm_groups=4), 16, 3, False
)


def slots(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What a training checkpoint holds besides weights."""
    return {
        "model/conv_in/W/Adam": np.zeros(shape),
        "model/conv_in/W/Adam_1": np.zeros(shape),
        "global_step": np.array(5),
        "beta1_power": np.array(0.9),
    }


@pytest.mark.parametrize("ema", [True, False])
def test_official_variables_become_the_weights(ema):
    """A file with both kinds: each choice takes its own; the attention's [in, out] and HWIO are turned round."""
    averaged, raw = random_unet(THREE_LEVELS, 1), random_unet(THREE_LEVELS, 2)
    variables = official_variables(raw.state_dict(), THREE_LEVELS)
    variables = {f"{name}:0" if "/mid/" in name else name: value for name, value in variables.items()}
    shadows = official_variables(averaged.state_dict(), THREE_LEVELS)
    variables |= {name + EMA_SUFFIX: value for name, value in shadows.items()}
    variables |= slots(variables["model/conv_in/W"].shape)
    unet = UNet(THREE_LEVELS)
    load_into(unet, from_official(variables, THREE_LEVELS, ema), "a.npz")
    expected = (averaged if ema else raw).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in unet.state_dict().items())


def test_the_papers_network_has_every_official_name():
    config = UNetConfig.from_recipe(ModelConfig(), 32, 3, learned_variance=False)
    unet = UNet(config)
    variables = official_variables(unet.state_dict(), config)
    assert sum(value.size for value in variables.values()) == 35_746_307
    names = from_official(variables, config, ema=False).keys()
    assert names == unet.state_dict().keys()
    assert {"model/up_1/attn_2/proj_out/W", "model/up_3/upsample/conv/b", "model/down_1/block_0/nin_shortcut/W"} <= (
        variables.keys()
    )


def test_missing_shadows_are_not_replaced_by_raw_weights():
    unet = random_unet(THREE_LEVELS)
    variables = official_variables(unet.state_dict(), THREE_LEVELS)
    with pytest.raises(SnapshotError, match="without the suffix /ExponentialMovingAverage"):
        from_official(variables, THREE_LEVELS, ema=True)
    with pytest.raises(SnapshotError, match="with the suffix /ExponentialMovingAverage"):
        from_official({name + EMA_SUFFIX: value for name, value in variables.items()}, THREE_LEVELS, ema=False)


def test_a_variable_that_is_missing_is_named():
    variables = official_variables(random_unet(THREE_LEVELS).state_dict(), THREE_LEVELS)
    del variables["model/up_2/block_1/temb_proj/b"]
    with pytest.raises(SnapshotError, match=r"a\.npz lacks up_blocks\.0\.resnets\.1\.time_emb_proj\.bias:"):
        load_into(UNet(THREE_LEVELS), from_official(variables, THREE_LEVELS, ema=False), "a.npz")


def test_weights_of_another_network_are_refused_by_name_or_shape():
    unet = UNet(tiny_config())
    weights = dict(unet.state_dict())
    with pytest.raises(SnapshotError, match=r"has unknown extra"):
        load_into(unet, weights | {"extra": torch.zeros(1)}, "file")
    with pytest.raises(SnapshotError, match=r"conv_in\.bias has the shape \(3,\); its config makes it \(16,\)"):
        load_into(unet, weights | {"conv_in.bias": torch.zeros(3)}, "file")


def test_legacy_attention_as_convolutions():
    """Names of 2022's files; some held the projections as 1×1 convolutions. Other names stay as they are."""
    weight = torch.randn(4, 4)
    old = {
        "mid_block.attentions.0.query.weight": weight[:, :, None, None],
        "mid_block.attentions.0.proj_attn.bias": weight[0],
        "down_blocks.0.resnets.0.conv_shortcut.weight": weight[:, :, None, None],
        "time_embedding.linear_1.weight": weight,
    }
    new = modern_names(old)
    assert list(new) == [
        "mid_block.attentions.0.to_q.weight",
        "mid_block.attentions.0.to_out.0.bias",
        "down_blocks.0.resnets.0.conv_shortcut.weight",
        "time_embedding.linear_1.weight",
    ]
    assert torch.equal(new["mid_block.attentions.0.to_q.weight"], weight)
    assert new["down_blocks.0.resnets.0.conv_shortcut.weight"].shape == (4, 4, 1, 1)
