"""What a run needs and takes, before it starts."""

from ddpm_dist.commands import scripts

if __name__ == "__main__":
    scripts.plan()
