"""What a layout of others is: names -> ours, what every file of it means, and what no file of it tells."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ddpm_dist.errors import SnapshotError

Weights = Mapping[str, Tensor]

IMAGE_SIZE = ("data.image_size",)
PROCESS = ("diffusion.timesteps", "diffusion.schedule", "diffusion.prediction", "diffusion.variance")


@dataclass(frozen=True)
class Layout:
    """A family of files. Keys are those of a recipe."""

    name: str
    marker: str
    """A parameter that files of it have, and files of others haven't."""
    rename: Callable[[Weights], dict[str, Tensor]]
    """Its names -> ours. Attention that is one product (`to_qkv`) stays so, until the heads are known."""
    tells: Mapping[str, Any] = field(default_factory=dict)
    asks: tuple[str, ...] = (*IMAGE_SIZE, *PROCESS)
    tells_more: Callable[[Weights], dict[str, Any]] = lambda weights: {}
    """What a file's other tensors say."""


def structure(weights: Weights) -> dict[str, Any]:
    """Keys of a recipe that shapes and names of ours tell; `levels` are those with attention."""
    channels, inputs = weights["conv_in.weight"].shape[:2]
    width = weights["time_embedding.linear_1.weight"].shape[1]
    if width != channels:
        raise SnapshotError(
            f"its time embedding has {width} sinusoids and its first level {channels} channels; here they are one"
        )
    levels = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("down_blocks."))
    first = [weights[f"down_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in range(levels)]
    blocks = {name.split(".")[3] for name in weights if name.startswith("down_blocks.0.resnets.")}
    attention = {int(n.split(".")[1]) for n in weights if n.startswith("down_blocks.") and ".attentions." in n}
    embedding = weights["down_blocks.0.resnets.0.time_emb_proj.weight"]
    return {
        "data.channels": inputs,
        "model.channels": channels,
        "model.channel_mult": [out // channels for out in first],
        "model.num_res_blocks": len(blocks),
        "model.scale_shift": embedding.shape[0] == 2 * first[0],
        "model.resample": "resblock" if any(".downsamplers.0.norm1." in name for name in weights) else "conv",
        "levels": sorted(attention),
    }


def renamed(weights: Weights, table: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Weights by the names that a table gives; those that it gives none are left out."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        ours = table(name)
        if ours is not None:
            in_attention = ".attentions." in ours and "norm" not in ours
            found[ours] = value.flatten(1) if in_attention and value.ndim > 2 else value
    return found
