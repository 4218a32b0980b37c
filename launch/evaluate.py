"""Compares samples with data: Fréchet distances and more, each beside its real-against-real floor."""

from ddpm_dist.commands import scripts

if __name__ == "__main__":
    scripts.evaluate()
