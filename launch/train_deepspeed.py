"""Trains under DeepSpeed's launcher: `deepspeed [--hostfile FILE] launch/train_deepspeed.py --config FILE …`."""

from ddpm_dist.commands import scripts

if __name__ == "__main__":
    scripts.train_deepspeed()
