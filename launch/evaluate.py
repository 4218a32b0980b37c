"""Compares samples with data: Fréchet distances and more, each beside its real-against-real floor.

    ray job submit --working-dir . -- python launch/evaluate.py --config configs/digits.yaml \
        --samples s3://bucket/run/samples/000003000-seed0
    python launch/evaluate.py --snapshot s3://bucket/run/snapshots/000010000 --data s3://bucket/data \
        --metrics fid,prdc --network inception=s3://bucket/pt_inception-2015-12-05-6726825d.pth --out s3://bucket/eval

The last line on stdout is the result as JSON; it is also written to <run.url>/evaluation/results/.
"""

from collections.abc import Sequence

from ddpm_dist import cli
from ddpm_dist.evaluation import command


def main(arguments: Sequence[str] | None = None) -> None:
    result = command.run(command.parser(__doc__ or "").parse_args(arguments))
    print(command.table(result))
    print(command.as_line(result), flush=True)


if __name__ == "__main__":
    cli.run(main)
