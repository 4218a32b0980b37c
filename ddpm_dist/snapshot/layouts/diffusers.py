"""UNet2DModel's own names in a file without its config, as in Lightning's checkpoints: what is silent is asked."""

from ddpm_dist.snapshot.layouts.base import IMAGE_SIZE, PROCESS, Layout
from ddpm_dist.snapshot.names import modern_names

SILENT = ("model.norm_groups", "model.norm_eps", "model.head_channels", "model.downsample_padding", "model.sinusoids",
          "model.freq_shift")  # fmt: skip

LAYOUT = Layout(
    "UNet2DModel's names",
    "down_blocks.0.resnets.0.time_emb_proj.weight",
    modern_names,
    asks=(*IMAGE_SIZE, *SILENT, *PROCESS),
)
