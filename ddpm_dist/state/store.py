"""The training states of a run: claimed by one attempt at a time, saved in the background, read at any size.

Contract 3 of ARCHITECTURE.md; `format.py` draws the folder.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.engine import Piece, World, broadcast_object, gather_objects
from ddpm_dist.errors import DamagedStateError, DdpmDistError, NotFoundError, StateError, StorageError
from ddpm_dist.recipe import dump_config
from ddpm_dist.state import format as fmt, history, reader
from ddpm_dist.state.cut import cut_of
from ddpm_dist.state.writer import StateWriter

T = TypeVar("T")
log = logging.getLogger(__name__)


class Trained(Protocol):
    """What a state needs of an engine."""

    shapes: dict[str, torch.Size]

    def pieces(self) -> list[Piece]: ...
    def scalars(self) -> dict[str, Any]: ...
    def load_scalars(self, scalars: dict[str, Any]) -> None: ...
    def sync_weights(self) -> None: ...
    def fingerprint(self) -> dict[str, Any]: ...


class Averaged(Protocol):
    """What a state needs of the moving averages."""

    @property
    def averages(self) -> Mapping[str, Sequence[Tensor]]: ...


class StateStore:
    """The states below `<run.url>/checkpoints`, for one attempt of the run.

    `claim`, `load`, `save` and `finish` are called by all ranks alike. protected: given the steps of all states,
    those that retention must keep beside the last and the regular ones, such as the best evaluated one.
    """

    def __init__(
        self, cfg: Config, world: World, protected: Callable[[Sequence[int]], Collection[int]] = lambda steps: ()
    ) -> None:
        self._cfg, self._world, self._protected = cfg, world, protected
        self.url = storage.join(cfg.run.url, "checkpoints")
        self.attempt = 0
        """Number of this attempt, from 1; 0 before it has claimed the run."""
        self.began_at = 0.0
        """Unix time at which the run's first attempt claimed it; known to `claim`."""
        self.bytes_read = 0
        """By this rank, in `load`."""
        self._valid: list[fmt.StateId] = []
        self._saved: fmt.StateId | None = None
        self._writer = StateWriter(self.url, world.rank, world.size, self._published, self.check_owner)

    def claim(self) -> str | None:
        """Makes this attempt the run's owner, and names the state that it continues; None for a new run.

        From here on, what older attempts write is void. ClaimError if another attempt claims at this moment.
        """

        def claim() -> tuple[int, float, list[fmt.StateId]]:
            claims, valid = history.look(self.url)
            attempt = max(claims, default=0) + 1
            began = history.began_at(self.url, claims)
            claim = history.claim(self.url, attempt, valid, began)
            if attempt > 1:
                history.abort_uploads(self._cfg.run.url)
            return attempt, claim.time if began is None else began, valid

        self.attempt, self.began_at, self._valid = self._first_decides(claim)
        return str(self._valid[0]) if self._valid else None

    def check_owner(self) -> None:
        """ClaimError if a newer attempt has claimed the run: then this one may publish nothing more, of any kind.

        To be asked before each write into the run's folder; silent before this attempt has claimed.
        """
        if self.attempt:
            history.check_owner(self.url, self.attempt)

    def load(self, state: str, engine: Trained, averages: Averaged) -> dict[str, Any]:
        """Fills engine and averages from the state that `claim` named, and returns its meta.

        A state that is damaged is refused by name, and the valid one before it is claimed and read instead.
        StateError if none is left, or if the state is of another network.
        """
        while self._valid:
            newest = self._valid[0]
            manifest, refusal = self._load(storage.join(self.url, str(newest)), engine, averages)
            refusals = [r for r in gather_objects(self._world, refusal) if r is not None]
            if not refusals:
                assert manifest is not None
                engine.load_scalars(manifest.scalars)
                engine.sync_weights()
                self._announce(manifest, engine)
                return manifest.meta
            if not isinstance(refusals[0], DamagedStateError):
                raise refusals[0]
            log.error("state %s is refused, the one before it is used: %s", newest, refusals[0])
            self._claim_older()
        raise StateError(
            f"{storage.redact(self.url)}: {state} and all states before it are damaged (the log names the files); "
            "restore them, or remove the folder to begin anew"
        )

    def prepare(self, engine: Trained, averages: Averaged) -> None:
        """Makes room for the copies that `save` takes, in the background, so that the first ones are as quick."""
        tensors = [tensor for kind in _tensors(engine.pieces(), averages).values() for tensor in kind]
        if tensors:
            self._writer.prepare(sum(tensor.numel() for tensor in tensors), tensors[0])

    def save(self, step: int, engine: Trained, averages: Averaged, meta: Mapping[str, Any]) -> None:
        """Takes a copy of everything, and returns; writing and retention go on in the background.

        step: optimizer steps done. meta: JSON values. Raises what an earlier save met in the background.
        """
        state = fmt.StateId(step, self.attempt)
        if state == self._saved:
            return
        self._saved = state
        pieces = engine.pieces()
        tensors = _tensors(pieces, averages)
        about = {
            "seed": self._cfg.run.seed,
            "config": dump_config(self._cfg),
            "fingerprint": engine.fingerprint(),
            "attempt": self.attempt,
            "saved_at": time.time(),
            **meta,
        }
        shapes = {name: list(shape) for name, shape in engine.shapes.items()}
        owned = [piece.address for piece in pieces]
        cut = cut_of(self._cfg.zero.stage, self._world.size, shapes) if self._by_rule(shapes) else None
        self._writer.save(state, tensors, owned, shapes, engine.scalars(), about, cut)

    def poll(self) -> None:
        """Raises what a save met in the background. An outage of the store is only logged: training goes on."""
        self._writer.poll()

    def finish(self) -> None:
        """Waits for all saves; raises also where the last one met an outage."""
        self._writer.wait()

    @property
    def last_save_seconds(self) -> float:
        """From the call of `save` to its end in the background, of the last one that ended."""
        return self._writer.last_seconds

    @property
    def failed_saves(self) -> int:
        """Saves of this rank that an outage of the store prevented."""
        return self._writer.failed

    def _load(self, url: str, engine: Trained, averages: Averaged) -> tuple[fmt.Manifest | None, DdpmDistError | None]:
        """(manifest, None) when this rank's tensors are filled, else (None, why not). Rank 0 reads the manifest."""
        try:
            manifest = reader.decode_manifest(url, self._first_decides(lambda: reader.manifest_bytes(url)))
            self.bytes_read = read_state(url, manifest, engine, averages)
        except NotFoundError as error:
            return None, DamagedStateError(str(error))
        except DdpmDistError as error:
            return None, error
        return manifest, None

    def _by_rule(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether a manifest that lists all pieces could be too long."""
        return self._world.size * len(shapes) > fmt.PIECES_LISTED

    def _claim_older(self) -> None:
        """Claims the run again, with the state before the newest valid one."""
        older = self._valid[1:]
        if older:
            self.attempt += 1  # before the claim is there: whoever asks for the owner meanwhile isn't to see a stranger
            self._first_decides(lambda: history.claim(self.url, self.attempt, older, self.began_at))
        self._valid = older

    def _announce(self, manifest: fmt.Manifest, engine: Trained) -> None:
        """Says in what this attempt differs from the one that wrote the state: then bits may, too."""
        then, now = manifest.meta["fingerprint"], engine.fingerprint()
        changes = [f"{key}: {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]]
        if changes and self._world.is_first:
            log.info("not bit for bit what the attempt before would have computed: %s", ", ".join(changes))

    def _published(self, state: fmt.StateId) -> None:
        """Retention, on rank 0's background thread."""
        cfg = self._cfg.checkpoint
        self._valid = [state, *self._valid]
        try:
            steps = self._protected([s.step for s in self._valid])
            protected = [s for s in self._valid if s.step in steps]
            keep = fmt.kept_states(self._valid, cfg.keep_last, cfg.keep_every_steps, protected)
            history.collect(self.url, state, keep)
        except StorageError as error:
            log.warning("old states were not removed: %s", error)
            return
        self._valid = sorted(keep, reverse=True)

    def _first_decides(self, action: Callable[[], T]) -> T:
        """The result of an action that rank 0 does, or its error, on all ranks."""
        result: Any = None
        if self._world.is_first:
            try:
                result = action()
            except DdpmDistError as error:
                result = error
        result = broadcast_object(self._world, result)
        if isinstance(result, DdpmDistError):
            raise result
        return result


def _tensors(pieces: Sequence[Piece], averages: Averaged) -> dict[str, Sequence[Tensor]]:
    """All that a state holds of this rank: kind -> 1-D tensors aligned with the pieces."""
    return {
        fmt.WEIGHTS: [piece.weights for piece in pieces],
        "exp_avg": [piece.exp_avg for piece in pieces],
        "exp_avg_sq": [piece.exp_avg_sq for piece in pieces],
        **averages.averages,
    }


def read_state(url: str, manifest: fmt.Manifest, engine: Trained, averages: Averaged) -> int:
    """Fills this rank's pieces and averages from the state at a URL, whose manifest this is; bytes read.

    Raises DamagedStateError, or StateError if it is of another network.
    """
    targets = []
    for i, piece in enumerate(engine.pieces()):
        tensors = {fmt.WEIGHTS: piece.weights, "exp_avg": piece.exp_avg, "exp_avg_sq": piece.exp_avg_sq}
        tensors |= {label: average[i] for label, average in averages.averages.items()}
        targets += [reader.Target(kind, piece.name, piece.offset, tensor) for kind, tensor in tensors.items()]
    kinds = [fmt.WEIGHTS, "exp_avg", "exp_avg_sq", *averages.averages]
    reader.check_fits(manifest, engine.shapes, kinds, storage.redact(url))
    return reader.read_into(url, manifest, targets)
