"""Training states: their format, their writer and reader, and the history of attempts that decides which of them count.

Named float32 pieces and a small JSON, readable at any world size. It never calls a collective in a save, never trusts a
state without its manifest, and never hears of Ray or of what the tensors mean.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.state.format import MANIFEST as MANIFEST, Manifest as Manifest, StateId as StateId
    from ddpm_dist.state.history import latest_step as latest_step, newest_state as newest_state
    from ddpm_dist.state.parts import awaited as awaited
    from ddpm_dist.state.reader import read_full as read_full, read_manifest as read_manifest, verify as verify
    from ddpm_dist.state.store import StateStore as StateStore
    from ddpm_dist.state.trained import read_state as read_state

__all__, _asked = lazily(
    __name__,
    modules="history",
    format="MANIFEST Manifest StateId",
    history="latest_step newest_state",
    reader="read_full read_manifest verify",
    parts="awaited",
    store="StateStore",
    trained="read_state",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
