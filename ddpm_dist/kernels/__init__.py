"""Kernels in Triton for GPUs: what runs there instead of several operations of torch's.

Each module is one kernel and what launches it; whether it is used is decided in `device.py`, and the eager way stands
beside the call. Nothing here is imported where Triton isn't installed or there is no GPU. It never holds a parameter or
a setting.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.kernels.noise import normal as normal, words as words
    from ddpm_dist.kernels.normalisation import group_norm as group_norm, group_norm_backward as group_norm_backward

__all__, _asked = lazily(__name__, normalisation="group_norm group_norm_backward", noise="normal words")
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
