"""The ε-network: tensors in, tensors out, with `UNet2DModel`'s parameter names.

Single-device code: parallelism is applied from outside. It never hears of data, engines, schedules or files.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.models.arithmetic import SLOW_BF16 as SLOW_BF16
    from ddpm_dist.models.config import (
        UNetConfig as UNetConfig,
        current_keys as current_keys,
        unknown_keys as unknown_keys,
    )
    from ddpm_dist.models.unet import UNet as UNet

__all__, _asked = lazily(
    __name__,
    config="UNetConfig current_keys unknown_keys",
    unet="UNet",
    arithmetic="SLOW_BF16",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
