"""Writes a data set: WebDataset shards and their index, at any URL."""

from ddpm_dist.commands import scripts

if __name__ == "__main__":
    scripts.make_shards()
