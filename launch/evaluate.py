"""Compares samples with data: Fréchet distances and more, each beside its real-against-real floor.

    ray job submit --working-dir . -- python launch/evaluate.py --config configs/digits.yaml \
        --samples s3://bucket/run/samples/000003000-seed0
    python launch/evaluate.py --snapshot s3://bucket/run/snapshots/000010000 --data s3://bucket/data \
        --metrics fid,prdc --network inception=s3://bucket/pt_inception-2015-12-05-6726825d.pth --out s3://bucket/eval

    python launch/evaluate.py --follow s3://bucket/run

The last line on stdout is the result as JSON; it is also written to <run.url>/evaluation/results/. With --follow,
each snapshot of a run is evaluated as it comes, and evaluation/report.html shows all of it.
"""

if __name__ == "__main__":
    from ddpm_dist import interrupt

    interrupt.leave_quietly()

from collections.abc import Sequence

from ddpm_dist import cli
from ddpm_dist.commands import evaluate as command


def main(arguments: Sequence[str] | None = None) -> None:
    command.run(command.parser(__doc__ or "").parse_intermixed_args(arguments))


if __name__ == "__main__":
    cli.run(main)
