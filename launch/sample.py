"""Draws images from a snapshot, on all workers of a Ray cluster that are free.

    ray job submit --working-dir . -- python launch/sample.py --config configs/digits.yaml --num-samples 1797
    python launch/sample.py --snapshot s3://bucket/run/snapshots/000010000 --out s3://bucket/samples \
        --num-samples 50000 --workers 1:8 sampling.sampler=ddim sampling.steps=50 cluster.gpus_per_worker=1

With --config, the snapshot is the run's newest and the images go to <run.url>/samples/. A job that is started
again does what is missing. `--sweep sampling.steps=10,50,100` makes one folder for each value, with one pool.
"""

if __name__ == "__main__":
    from ddpm_dist import interrupt

    interrupt.leave_quietly()

from collections.abc import Sequence

from ddpm_dist import cli
from ddpm_dist.commands import sample as command


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__ or "")
    for result in command.run(parser.parse_intermixed_args(arguments)):
        print(command.describe(result), flush=True)


if __name__ == "__main__":
    cli.run(main)
