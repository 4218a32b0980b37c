"""What would keep a run from working on these nodes, and what mends it."""

from ddpm_dist.commands import scripts

if __name__ == "__main__":
    scripts.doctor()
