"""Writes the index of a WebDataset that exists: one pass over its shards, in parallel, resumable."""

from ddpm_dist.commands import scripts

if __name__ == "__main__":
    scripts.index_shards()
