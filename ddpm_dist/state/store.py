"""The training states of a run: claimed by one attempt at a time, saved in the background, read at any size.

Contract 3 of ARCHITECTURE.md; `format.py` draws the folder.
"""

import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.engine import World, broadcast_object, gather_objects
from ddpm_dist.errors import DamagedStateError, DdpmDistError, NotFoundError, StateError, StorageError
from ddpm_dist.recipe import dump_config
from ddpm_dist.state import format as fmt, history, reader
from ddpm_dist.state.copies import Memory
from ddpm_dist.state.cut import Cut, cut_of
from ddpm_dist.state.recall import Recall
from ddpm_dist.state.trained import Averaged, Trained, read_state, shapes_of, tensors_of
from ddpm_dist.state.writer import Job, StateWriter

T = TypeVar("T")
log = logging.getLogger(__name__)


class StateStore:
    """The states below `<run.url>/checkpoints`, for one attempt of the run.

    `prepare`, `claim`, `load`, `save`, `keep` and `finish` are called by all ranks alike. protected: given the steps of
    all states, those that retention must keep beside the last and the regular ones, such as the best evaluated one.
    memory: outlives this process, so that a state can be gone on from which the store hasn't got.
    """

    def __init__(
        self,
        cfg: Config,
        world: World,
        protected: Callable[[Sequence[int]], Collection[int]] = lambda steps: (),
        memory: Memory | None = None,
    ) -> None:
        self._cfg, self._world, self._protected = cfg, world, protected
        self._config = dump_config(cfg)
        self._recall = Recall(memory, world)
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

        def claim() -> tuple[int, float, list[fmt.StateId], bool]:
            claims, valid = history.look(self.url)
            newest = claims.get(max(claims, default=0))
            attempt = max(claims, default=0) + 1
            began = history.began_at(self.url, claims)
            recalled = self._recall.counts(newest, valid)
            claim = self._claim(attempt, valid, began, newest)
            if attempt > 1:
                history.abort_uploads(self._cfg.run.url)
            return attempt, claim.time if began is None else began, valid, recalled

        self.attempt, self.began_at, self._valid, recalled = self._first_decides(claim)
        self._recall.settle(self._writer.copies, recalled)
        if self._recall.step is not None:
            return f"the copy of step {self._recall.step} in memory"
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
        if self._recall.step is not None:
            return self._load_copy(self._recall.step, engine, averages)
        while self._valid:
            newest = self._valid[0]
            manifest, refusal = self._load(storage.join(self.url, str(newest)), engine, averages)
            refusals = [r for r in gather_objects(self._world, refusal) if r is not None]
            if not refusals:
                assert manifest is not None
                return self._loaded(manifest.scalars, manifest.meta, engine)
            if not isinstance(refusals[0], DamagedStateError):
                raise refusals[0]
            log.error("state %s is refused, the one before it is used: %s", newest, refusals[0])
            self._claim_older()
        raise StateError(
            f"{storage.redact(self.url)}: {state} and all states before it are damaged (the log names the files); "
            "restore them, or remove the folder to begin anew"
        )

    def prepare(self, engine: Trained, averages: Averaged) -> None:
        """Makes room for the copies that `save` takes, in the background, so that the first ones are as quick.

        To be called before `claim` by who has memory that outlives this process, as that may say what to go on from.
        """
        pieces = engine.pieces()
        kinds = tensors_of(pieces, averages)
        if self._cfg.checkpoint.memory_every_steps is not None:
            self._recall.attach(self._writer.copies, pieces, kinds)
        tensors = [tensor for kind in kinds.values() for tensor in kind]
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
        owned, shapes = [piece.address for piece in pieces], shapes_of(engine)
        about, cut = self._about(engine, meta), self._cut(shapes)
        self._writer.save(state, tensors_of(pieces, averages), owned, shapes, engine.scalars(), about, cut)

    def keep(self, step: int, engine: Trained, averages: Averaged, meta: Mapping[str, Any]) -> None:
        """As `save`, but into memory that outlives this process (`outlives`), and no further."""
        tensors = tensors_of(engine.pieces(), averages)
        self._writer.keep(step, tensors, engine.scalars(), self._about(engine, meta))

    @property
    def outlives(self) -> bool:
        """Whether copies stay when this process ends. Known to `prepare`."""
        return self._writer.copies.outlive

    @property
    def recalled(self) -> bool:
        """Whether this attempt goes on from a copy in memory. Known to `claim`."""
        return self._recall.step is not None

    def room_after(self, copying: bool) -> bool:
        """Whether `keep` needn't wait: now, or (`copying`) after another copy."""
        return self._writer.copies.room_after(copying)

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

    def _cut(self, shapes: Mapping[str, Sequence[int]]) -> Cut | None:
        """What stands for the ranks' pieces, where a manifest that lists them all could be too long."""
        if self._world.size * len(shapes) <= fmt.PIECES_LISTED:
            return None
        return cut_of(self._cfg.zero.stage, self._world.size, shapes)

    def _load_copy(self, step: int, engine: Trained, averages: Averaged) -> dict[str, Any]:
        """From memory; what the store hasn't got of it, it gets now, as a state of this attempt."""
        began, pieces = time.perf_counter(), engine.pieces()
        tensors, shapes = tensors_of(pieces, averages), shapes_of(engine)
        copy, about = self._recall.take(tensors)
        if step > max((state.step for state in self._valid), default=0):
            state = self._saved = fmt.StateId(step, self.attempt)
            part = fmt.Part([piece.address for piece in pieces], list(tensors), [])
            meta = {**about.meta, "attempt": self.attempt}
            self._writer.copies.hold(copy)
            self._writer.publish(Job(state, copy, part, shapes, about.scalars, meta, self._cut(shapes), began))
        return self._loaded(about.scalars, about.meta, engine)

    def _claim(
        self, attempt: int, valid: Sequence[fmt.StateId], began: float | None, newest: history.Claim | None = None
    ) -> history.Claim:
        unique = uuid.uuid4().hex
        self._recall.note_claim(newest, unique)
        return history.claim(self.url, attempt, valid, began, unique)

    def _claim_older(self) -> None:
        """Claims the run again, with the state before the newest valid one."""
        older = self._valid[1:]
        if older:
            self.attempt += 1  # before the claim is there: whoever asks for the owner meanwhile isn't to see a stranger
            self._first_decides(lambda: self._claim(self.attempt, older, self.began_at))
        self._valid = older

    def _loaded(self, scalars: dict[str, Any], meta: dict[str, Any], engine: Trained) -> dict[str, Any]:
        """The rest, when the tensors are filled; says in what this attempt differs from the one that saved: then bits
        may, too."""
        engine.load_scalars(scalars)
        engine.sync_weights()
        then, now = meta["fingerprint"], engine.fingerprint()
        changes = [f"{key}: {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]]
        if changes and self._world.is_first:
            log.info("not bit for bit what the attempt before would have computed: %s", ", ".join(changes))
        return meta

    def _about(self, engine: Trained, meta: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "seed": self._cfg.run.seed,
            "config": self._config,
            "fingerprint": engine.fingerprint(),
            "attempt": self.attempt,
            "saved_at": time.time(),
            **meta,
        }

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
