"""The mathematics of diffusion: paths and processes, losses and the draw of times, samplers, likelihood.

Pure functions of tensors; the network is any callable network(x [B,C,H,W], t [B], labels [B] or None). Everything
stands on a path's alpha(t) and sigma(t): a table of betas is one, EDM's noise levels and the straight line others.
A table's times are counted from 0: index t here is t + 1 in Ho et al. 2020, x_{-1} is the image itself.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.diffusion.continuous import ContinuousDiffusion as ContinuousDiffusion, make_process as make_process
    from ddpm_dist.diffusion.denoiser import Guide as Guide, Network as Network, check_guide as check_guide
    from ddpm_dist.diffusion.gaussian import GaussianDiffusion as GaussianDiffusion
    from ddpm_dist.diffusion.likelihood import bits_per_dim as bits_per_dim
    from ddpm_dist.diffusion.losses import drop_labels as drop_labels, training_losses as training_losses
    from ddpm_dist.diffusion.ode import log_likelihood as log_likelihood
    from ddpm_dist.diffusion.process import Process as Process
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
    from ddpm_dist.diffusion.times import (
        QUARTILES as QUARTILES,
        LossHistory as LossHistory,
        bins_of as bins_of,
        draw_t as draw_t,
        quartile_means as quartile_means,
    )

__all__, _asked = lazily(
    __name__,
    modules="editing",
    process="Process",
    gaussian="GaussianDiffusion",
    continuous="ContinuousDiffusion make_process",
    schedules="SCHEDULES make_betas rescale_zero_terminal_snr",
    losses="drop_labels training_losses",
    times="QUARTILES LossHistory bins_of draw_t quartile_means",
    samplers="check_settings sample trajectory",
    likelihood="bits_per_dim",
    ode="log_likelihood",
    denoiser="Guide Network check_guide",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
