"""Training states, looked at without DeepSpeed: list, verify, compare, extract."""

from ddpm_dist.commands import scripts

if __name__ == "__main__":
    scripts.inspect_checkpoint()
