"""Draws images from a snapshot, on all workers of a Ray cluster that are free."""

from ddpm_dist.commands import scripts

if __name__ == "__main__":
    scripts.sample()
