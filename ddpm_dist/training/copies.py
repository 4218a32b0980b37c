"""At which steps a run takes copies in memory that outlives its ranks: all ranks at the same ones, or none of them.

A copy is of use only if every rank has it. So a rank that has no room for the next one, as the store hasn't taken an
earlier one yet, tells the others, and all leave it out.
"""

import logging

from ddpm_dist.config import Config
from ddpm_dist.state import StateStore

log = logging.getLogger(__name__)


class CopySteps:
    """store: says whether there is room. Without memory that outlives the ranks no step is one."""

    def __init__(self, cfg: Config, store: StateStore) -> None:
        self._every, self._store = cfg.checkpoint.memory_every_steps, store
        self.now = False
        """Whether the step that was planned last is one."""
        self.skipped = 0
        """How many were left out so far."""

    def plan(self, step: int, saving: bool, full: bool) -> bool:
        """Decides for the end of a step; the result is for `full` of the next one, after all ranks have told it.

        saving: the store gets this step, which is a copy as well. full: some rank had no room for one more.
        """
        due = self._every is not None and self._store.outlives and step % self._every == 0 and not saving
        self.now = due and not full
        self.skipped += due and full
        return not self._store.room_after(self.now or saving)
