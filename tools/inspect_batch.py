"""Shows the samples of one global batch: what to look at behind a loss spike."""

from ddpm_dist.commands import scripts

if __name__ == "__main__":
    scripts.inspect_batch()
