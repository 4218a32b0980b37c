"""The U-Net against diffusers' UNet2DModel, through files both ways; its initialisation; how it runs."""

import dataclasses
import math
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding

from ddpm_dist.config import ModelConfig
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.schedules import make_betas
from ddpm_dist.errors import ConfigError
from ddpm_dist.models.config import UNetConfig
from ddpm_dist.models.layers import GroupNormSiLU, timestep_embedding
from ddpm_dist.models.unet import UNet
from ddpm_dist.snapshot import load_snapshot, save_snapshot
from tests.models.networks import distance, inputs, random_unet, randomize, tiny_config

PAPER_256 = {"channel_mult": (1, 1, 2, 2, 4, 4)}
ADM = {"scale_shift": True, "resample": "resblock", "head_channels": 8, "num_classes": 10}

NETWORKS = {
    "cifar10": (ModelConfig(), 32, 3, False),
    "narrow256": (ModelConfig(channels=16, norm_groups=4, **PAPER_256), 256, 3, False),
    "classes": (ModelConfig(channels=32, norm_groups=8, channel_mult=(1, 2), num_classes=10), 32, 3, False),
    "scale_shift": (ModelConfig(channels=32, norm_groups=8, channel_mult=(1, 2), scale_shift=True), 32, 3, False),
    "heads": (ModelConfig(channels=32, norm_groups=8, channel_mult=(1, 2, 2), head_channels=8), 32, 1, False),
    "resblock": (ModelConfig(channels=32, norm_groups=8, channel_mult=(1, 2, 2), resample="resblock"), 32, 3, False),
    "adm": (
        ModelConfig(channels=32, norm_groups=8, channel_mult=(1, 2, 2), attention_resolutions=(16, 8), **ADM),
        32,
        3,
        True,
    ),
}
QUIRKS = {
    "openai": {"flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "downsample_padding": 1},
    "mid_without_norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": None},
    "mid_without_attention": {"add_attention": False},
    "no_attention_up": {"up_block_types": ("UpBlock2D", "UpBlock2D")},
    "odd_groups": {"attn_norm_num_groups": 4, "norm_num_groups": 2},
}
"""Settings of UNet2DModel that no recipe of ours makes, but files of others have."""


def network_config(name: str) -> UNetConfig:
    model, size, channels, learned = NETWORKS[name]
    return UNetConfig.from_recipe(model, size, channels, learned)


def diffusers_unet(config: UNetConfig) -> UNet2DModel:
    settings = config.to_diffusers()
    settings.pop("_class_name")
    return UNet2DModel(**settings)


def check_equal(ours: UNet, theirs: UNet2DModel, batch: int) -> None:
    """Outputs within 1e-5 and all gradients within 1e-4, relative to the largest value of each."""
    x, t, labels = inputs(ours.config, batch)
    ours.train()
    theirs.train()
    results = []
    for network, call in ((ours, lambda x: ours(x, t, labels)), (theirs, lambda x: theirs(x, t, labels).sample)):
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (out * probe).sum().backward()
        results.append((out.detach(), leaf.grad, {n: p.grad for n, p in network.named_parameters()}))
    (out, x_grad, grads), (their_out, their_x_grad, their_grads) = results
    assert their_out.abs().mean() > 0.05, "the comparison would be empty"
    assert distance(out, their_out) < 1e-5
    assert distance(x_grad, their_x_grad) < 1e-4
    assert grads.keys() == their_grads.keys()
    for name, their_grad in their_grads.items():
        # The key's bias moves all logits of a query alike: its gradient is zero up to rounding.
        if not name.endswith("to_k.bias"):
            assert distance(grads[name], their_grad) < 1e-4, name


@pytest.mark.parametrize("name", NETWORKS)
def test_ours_opens_in_diffusers_and_agrees(name, tmp_path):
    config = network_config(name)
    ours = random_unet(config)
    variance = "learned_range" if name == "adm" else "fixedlarge"
    save_snapshot(
        f"file://{tmp_path}", ours, config, GaussianDiffusion(make_betas("linear", 1000), "eps", variance), {}
    )
    theirs = DDPMPipeline.from_pretrained(tmp_path).unet
    shutil.rmtree(tmp_path)
    check_equal(ours, theirs, batch=1 if name in ("cifar10", "narrow256") else 3)


@pytest.mark.parametrize("name", [*NETWORKS, *QUIRKS])
def test_theirs_opens_here_and_agrees(name, tmp_path):
    if name in QUIRKS:
        config = dataclasses.replace(tiny_config(), **QUIRKS[name])
    else:
        config = network_config(name)
    theirs = randomize(diffusers_unet(config))
    scheduler = DDPMScheduler(variance_type="learned_range" if name == "adm" else "fixed_large")
    DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path)
    ours, _ = load_snapshot(f"file://{tmp_path}")
    shutil.rmtree(tmp_path)
    assert ours.config == config
    check_equal(ours, theirs, batch=1 if name in ("cifar10", "narrow256") else 3)


@pytest.mark.parametrize(("model", "size", "count"), [({}, 32, 35_746_307), (PAPER_256, 256, 113_673_219)])
def test_parameter_counts_of_the_paper(model, size, count):
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_recipe(ModelConfig(**model), size, 3, learned_variance=False))
    assert sum(parameter.numel() for parameter in unet.parameters()) == count


def test_the_papers_config_is_that_of_the_hosted_file():
    """google/ddpm-cifar10-32's config.json, read by hand."""
    assert network_config("cifar10").to_diffusers().items() >= {
        "act_fn": "silu", "attention_head_dim": None, "block_out_channels": [128, 256, 256, 256],
        "center_input_sample": False, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-6,
        "norm_num_groups": 32, "sample_size": 32, "time_embedding_type": "positional",
    }.items()  # fmt: skip


def test_dropout_falls_where_diffusers_has_it():
    # Without attention: behind it, diffusers' activations have another memory layout, and with it other masks.
    config = dataclasses.replace(tiny_config(dropout=0.3, attention_resolutions=()), add_attention=False)
    ours, theirs = random_unet(config).train(), diffusers_unet(config).train()
    theirs.load_state_dict(ours.state_dict())
    x, t, _ = inputs(config, 2)
    torch.manual_seed(0)
    out = ours(x, t)
    torch.manual_seed(0)
    assert distance(out, theirs(x, t).sample) < 1e-5
    assert distance(ours.eval()(x, t), out) > 1e-2


def test_sinusoids_are_the_papers():
    """get_timestep_embedding of the official code, written out in float64."""
    t, channels = [0, 1, 487, 999], 6
    expected = [
        [f(time * 10000.0 ** (-i / 2)) for f in (math.sin, math.cos) for i in range(3)] for time in t
    ]  # half = 3, exponents i / (half - 1)
    torch.testing.assert_close(timestep_embedding(torch.tensor(t), channels), torch.tensor(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize(("flip", "shift"), [(False, 1), (True, 0)])
def test_sinusoids_of_odd_width_are_diffusers(flip, shift):
    t = torch.tensor([0, 1, 487, 999])
    theirs = get_timestep_embedding(t, 7, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    torch.testing.assert_close(timestep_embedding(t, 7, flip, shift), theirs)


def test_without_gradients_the_same_is_computed():
    unet = random_unet(tiny_config(dropout=0.2)).eval()
    x, t, _ = inputs(unet.config, 2)
    with torch.no_grad():
        plain = unet(x, t)
    assert distance(plain, unet(x, t)) < 1e-6


def test_settings_of_a_recipe_reach_the_network():
    unet = UNet(tiny_config(norm_eps=1e-3, dropout=0.25, norm_groups=4))
    norms = [module for module in unet.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {(norm.eps, norm.num_groups) for norm in norms} == {(1e-3, 4)}
    assert {module.p for module in unet.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}


def test_bf16_keeps_neighbouring_times_apart():
    """bf16 rounds 998 and 999 to one number, so the sinusoids must be computed before the cast."""
    config = tiny_config()
    unet = random_unet(config).eval()
    x, _, _ = inputs(config, 2)
    x = x[:1].expand(2, -1, -1, -1)
    exact = unet(x, torch.tensor([998, 999]))
    low = unet.bfloat16()(x, torch.tensor([998, 999]))
    assert low.dtype == torch.bfloat16
    assert distance(low.float(), exact) < 0.05
    assert not torch.equal(low[0], low[1])


def test_fractional_times_are_allowed():
    config = tiny_config()
    unet = random_unet(config).eval()
    x, _, _ = inputs(config, 1)
    whole, between = unet(x, torch.tensor([5])), unet(x, torch.tensor([5.5]))
    assert torch.equal(whole, unet(x, torch.tensor([5.0])))
    assert distance(between, whole) > 1e-3


def test_labels_are_wanted_exactly_where_there_are_classes():
    plain, conditional = UNet(tiny_config()).initialize(0), UNet(tiny_config(num_classes=2)).initialize(0)
    x, t = torch.zeros(1, 3, 16, 16), torch.zeros(1)
    assert conditional.config.num_class_embeds == 3  # two classes and the null class
    with pytest.raises(ValueError, match="unconditional"):
        plain(x, t, torch.tensor([0]))
    with pytest.raises(ValueError, match="class-conditional"):
        conditional(x, t)


def test_initialisation_is_xavier_uniform_with_vanishing_branches():
    unet = UNet(network_config("cifar10")).initialize(3)
    weights = unet.state_dict()
    for name in (
        "conv_in", "down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut",
        "down_blocks.1.resnets.0.time_emb_proj", "mid_block.attentions.0.to_q", "time_embedding.linear_2",
    ):  # fmt: skip
        weight = weights[f"{name}.weight"]
        fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(weight)
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * bound < weight.abs().max() <= bound, name
        assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.03, name
        assert abs(weight.mean()) < 0.05 * bound, name
    for name in ("mid_block.resnets.0.conv2", "up_blocks.2.attentions.1.to_out.0", "conv_out"):
        weight = weights[f"{name}.weight"]
        bound = 1e-5 * math.sqrt(6 / sum(torch.nn.init._calculate_fan_in_and_fan_out(weight)))
        assert 0.99 * bound < weight.abs().max() <= bound, name
    assert all(not value.any() for name, value in weights.items() if name.endswith("bias"))
    assert all((value == 1).all() for name, value in weights.items() if "norm" in name and name.endswith("weight"))


def test_initialisation_is_a_function_of_the_seed():
    one, same, other = (UNet(tiny_config(num_classes=4)).initialize(seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])
    assert abs(one["class_embedding.weight"].std() - 1) < 0.2


def saved_bytes(unet: UNet, x: torch.Tensor, t: torch.Tensor) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that autograd keeps for the backward pass (weights not counted), and the gradients."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    unet.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = unet(x, t)
    out.square().sum().backward()
    return sum(kept.values()), {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}


def test_checkpointed_levels_keep_less_and_give_the_same_gradients():
    config = tiny_config(dropout=0.2)
    unet = random_unet(config).train()
    x, t, _ = inputs(config, 2)
    kept, grads = [], []
    for levels in ((), (0,), (1,), (0, 1)):
        unet.checkpoint(levels)
        torch.manual_seed(0)
        size, gradients = saved_bytes(unet, x, t)
        kept.append(size)
        grads.append(gradients)
    assert max(kept[1], kept[2]) < 0.7 * kept[0]
    assert kept[3] < 0.25 * kept[0]
    for gradients in grads[1:]:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, grads[0][name], rtol=1e-5, atol=1e-6)


def test_a_level_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match=r"checkpoint_levels: 2 is not among the levels 0\.\.1"):
        UNet(tiny_config()).checkpoint((0, 2))


def test_channels_last_changes_the_layout_and_nothing_else():
    """The layout of the image decides: convolutions keep it, whatever the weights have."""
    config = tiny_config()
    unet = random_unet(config).eval()
    x, t, _ = inputs(config, 2)
    seen = []
    unet.mid_block.resnets[0].conv1.register_forward_hook(lambda conv, given, out: seen.append(out))
    plain, other = unet(x, t), unet(x.contiguous(memory_format=torch.channels_last), t)
    assert distance(other, plain) < 1e-5
    assert seen[0].is_contiguous()
    assert seen[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled_network_agrees(backend, dtype):
    """Output and gradients, in one graph. inductor, the default of torch.compile, needs a C++ compiler."""
    config = tiny_config()
    unet = random_unet(config).to(dtype)
    x, t, _ = inputs(config, 2)
    results = []
    for network in (unet, torch.compile(unet, backend=backend, fullgraph=True)):
        unet.zero_grad()
        out = network(x, t)
        out.float().square().mean().backward()
        results.append([out.detach().float(), *(p.grad.float().clone() for p in unet.parameters())])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for name, eager, compiled in zip(["output", *dict(unet.named_parameters())], *results, strict=True):
        if not name.endswith("to_k.bias"):
            assert distance(compiled, eager) < tolerance, name


def test_a_second_derivative_is_refused_and_not_wrong():
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad((GroupNormSiLU(2, 4)(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient**2).sum().backward()


def test_levels_to_recompute_may_be_any_iterable():
    assert random_unet(tiny_config()).checkpoint(level for level in (0, 1)).checkpoint_levels == {0, 1}


def test_a_head_has_to_divide_levels_with_attention_alone():
    config = tiny_config(channels=24, norm_groups=8, attention_resolutions=(8,), head_channels=16)
    assert config.checked().attention_channels == [48, 48]
    with pytest.raises(ValueError, match="attention_head_dim: 16 doesn't divide 24"):
        tiny_config(channels=24, norm_groups=8, attention_resolutions=(16,), head_channels=16).checked()
