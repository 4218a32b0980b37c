"""An average of any width, after the run, from the power averages that the run kept (ema.power)."""

from ddpm_dist.commands import scripts

if __name__ == "__main__":
    scripts.posthoc_ema()
