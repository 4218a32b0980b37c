"""What the attempt before left in memory that outlives it: whether it counts, and that all ranks take the same.

It goes on from there if the newest claim of the run is one of this job's own, and no state in the store is newer. A
claim of anybody else makes void what is in memory, as it does with states that come to the store too late.
"""

import json
import logging
import os
from collections.abc import Sequence

from torch import Tensor

from ddpm_dist.engine import Piece, World, broadcast_object, gather_objects
from ddpm_dist.host_memory import available_bytes
from ddpm_dist.state import format as fmt, history
from ddpm_dist.state.copies import COPIES, Copies, Copy, Description, Memory, layout

log = logging.getLogger(__name__)


class Recall:
    """One rank's view. All methods but those of rank 0's claim are called by all ranks alike."""

    def __init__(self, memory: Memory | None, world: World) -> None:
        self._memory, self._world = memory, world
        self._found: tuple[Copy, Description] | None = None
        self.step: int | None = None
        """That of the copy which all ranks have; None: they have none, or it counts for nothing."""

    def attach(self, copies: Copies, pieces: Sequence[Piece], tensors: dict[str, Sequence[Tensor]]) -> None:
        """Has the copies lie in memory that outlives this process, if each rank has it, with room for them.

        Their bytes on a node are 8 a parameter for each of weights, both moments and the averages, times the node's
        share of the ranks.
        """
        if not all(gather_objects(self._world, self._memory is not None)):
            return
        assert self._memory is not None
        flat = [tensor for kind in tensors.values() for tensor in kind]
        numel = sum(tensor.numel() for tensor in flat)
        lacking = [text for text in gather_objects(self._world, self._lacking(numel, len(tensors))) if text]
        if lacking:
            if self._world.is_first:
                log.warning("%s", lacking[0])
            self._memory.drop()
            self._memory = None
            return
        copies.layout = layout([piece.address for piece in pieces], list(tensors))
        found = copies.move_into(self._memory, numel, flat[0] if flat else None, self._memory.agreed)
        about = Description.decode(found[1]) if found is not None else None
        fits = found is not None and about is not None and about.layout == copies.layout
        if all(gather_objects(self._world, fits)):
            assert found is not None
            assert about is not None
            self._found, self.step = (found[0], about), self._memory.agreed
        else:
            copies.forget()

    def counts(self, newest: history.Claim | None, valid: Sequence[fmt.StateId]) -> bool:
        """On rank 0, before its claim: whether the run may go on from the copy. newest: the claim before."""
        return (
            self.step is not None
            and newest is not None
            and newest.unique in self._own_claims()
            and self.step >= max((state.step for state in valid), default=0)
        )

    def note_claim(self, newest: history.Claim | None, unique: str) -> None:
        """On rank 0, right before a claim is made: this one and the one before are known again, whichever is there."""
        if self._memory is not None:
            before = [newest.unique] if newest is not None and newest.unique in self._own_claims() else []
            self._memory.note = json.dumps([*before, unique]).encode()

    def settle(self, copies: Copies, counts: bool) -> None:
        """What rank 0 found at the claim."""
        if self.step is not None and not counts:
            self.step = None
            copies.forget()

    def take(self, tensors: dict[str, Sequence[Tensor]]) -> tuple[Copy, Description]:
        """Fills the tensors from the copy, and gives that and what rank 0's says of itself."""
        assert self._found is not None
        copy, about = self._found
        assert copy.tensor is not None
        start = 0
        for tensor in (tensor for kind in tensors.values() for tensor in kind):
            tensor.copy_(copy.tensor[start : start + tensor.numel()])
            start += tensor.numel()
        return copy, broadcast_object(self._world, about)

    def _own_claims(self) -> list[str]:
        note = self._memory.note if self._memory is not None else b""
        return [str(unique) for unique in json.loads(note)] if note else []

    def _lacking(self, numel: int, kinds: int) -> str:
        """Why the copies don't fit on this rank's node; empty if they do."""
        assert self._memory is not None
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        each = COPIES * fmt.ELEMENT_BYTES * numel
        needed, left = ranks * max(0, each - self._memory.held_bytes), available_bytes()
        if needed <= left:
            return ""
        return (
            f"checkpoint.memory_every_steps: has no effect, as two copies of the state take {ranks * each / 2**30:.2f} "
            f"GiB of this node's memory ({ranks} ranks, each 8 bytes × {kinds} kinds × {numel // kinds:,} elements), "
            f"which has {left / 2**30:.2f} GiB left; use more nodes, fewer averages (ema.power), or leave it out"
        )
