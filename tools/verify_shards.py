"""Checks a data set against its index, and every image, and says what is wrong."""

from ddpm_dist.commands import scripts

if __name__ == "__main__":
    scripts.verify_shards()
