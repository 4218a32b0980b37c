"""Features, distances, bits/dim and the report: what a snapshot is worth, each number beside its floor.

Order, job, follower and report, from images to a table. The room changes a run only in its folder `evaluation/`, and
never compares what isn't the same question.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.evaluation.order import Order as Order, check_used as check_used
    from ddpm_dist.evaluation.report import write_report as write_report
    from ddpm_dist.evaluation.samples import instead as instead

__all__, _asked = lazily(
    __name__,
    modules="follow job",
    order="Order check_used",
    report="write_report",
    samples="instead",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
