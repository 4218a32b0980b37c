"""What is wrong with a cluster before it costs a night: a check is one function with its remedy beside it.

It looks, tries and measures a little on each node, between nodes and at the store, and leaves nothing behind. It never
changes a setting, starts a Ray or a training, and its rows hold no secret.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.doctor.examination import Examination as Examination, examine as examine
    from ddpm_dist.doctor.rows import Row as Row, State as State
    from ddpm_dist.doctor.show import as_json as as_json, as_report as as_report, as_table as as_table
    from ddpm_dist.doctor.store import try_store as try_store

__all__, _asked = lazily(
    __name__,
    examination="Examination examine",
    rows="Row State",
    show="as_json as_report as_table",
    store="try_store",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
