"""The mathematics of diffusion: schedules, the forward and reverse process, losses, samplers, likelihood.

Pure functions of tensors; the network is any callable network(x [B,C,H,W], t [B], labels [B] or None).
Times are counted from 0: index t here is t + 1 in Ho et al. 2020, x_{-1} is the image itself.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.diffusion.denoiser import Network as Network
    from ddpm_dist.diffusion.gaussian import GaussianDiffusion as GaussianDiffusion
    from ddpm_dist.diffusion.likelihood import bits_per_dim as bits_per_dim
    from ddpm_dist.diffusion.losses import (
        QUARTILES as QUARTILES,
        LossHistory as LossHistory,
        draw_t as draw_t,
        drop_labels as drop_labels,
        quartile_means as quartile_means,
        training_losses as training_losses,
    )
    from ddpm_dist.diffusion.samplers import (
        check_settings as check_settings,
        sample as sample,
        trajectory as trajectory,
    )
    from ddpm_dist.diffusion.schedules import (
        SCHEDULES as SCHEDULES,
        make_betas as make_betas,
        rescale_zero_terminal_snr as rescale_zero_terminal_snr,
    )

__all__, _asked = lazily(
    __name__,
    modules="editing",
    gaussian="GaussianDiffusion",
    schedules="SCHEDULES make_betas rescale_zero_terminal_snr",
    losses="QUARTILES LossHistory draw_t drop_labels quartile_means training_losses",
    samplers="check_settings sample trajectory",
    likelihood="bits_per_dim",
    denoiser="Network",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
