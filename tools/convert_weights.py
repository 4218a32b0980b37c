"""Weights of others -> a snapshot of ours: diffusers folders, and the official code's variables as an .npz."""

from ddpm_dist.commands import scripts

if __name__ == "__main__":
    scripts.convert_weights()
