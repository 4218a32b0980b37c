"""Trains on a Ray cluster: `ray job submit --working-dir . -- python launch/train.py --config FILE key=value …`."""

from ddpm_dist.commands import scripts

if __name__ == "__main__":
    scripts.train()
