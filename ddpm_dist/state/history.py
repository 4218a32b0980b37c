"""Which states a run has: claims by attempts, and the removal of what nobody needs."""

import json
import logging
import os
import platform
import time
import uuid

from ddpm_dist import storage
from ddpm_dist.errors import ClaimError, NotFoundError, StateError, StorageError
from ddpm_dist.state import format as fmt

log = logging.getLogger(__name__)

OWNER = "owner"


def read(url: str) -> tuple[dict[int, fmt.StateId | None], list[fmt.StateId]]:
    """(attempt -> the state that it continues, valid states newest first) of a run's checkpoints folder."""
    names = [name.split("/") for name in storage.list_objects(url)]
    published = [s for n in names if len(n) == 2 and n[1] == fmt.MANIFEST and (s := fmt.StateId.parse(n[0]))]
    attempts = [int(n[1]) for n in names if len(n) == 2 and n[0] == OWNER and n[1].isdigit()]
    claims = _chain(url, attempts)
    return {**dict.fromkeys(attempts), **claims}, fmt.valid_states(claims, published)


def latest_step(run_url: str) -> int | None:
    """Step of a run's newest valid state; None if it has none."""
    _, states = read(storage.join(run_url, "checkpoints"))
    return states[0].step if states else None


def newest_state(run_url: str) -> str | None:
    """URL of a run's newest valid state; None if it has none."""
    _, states = read(storage.join(run_url, "checkpoints"))
    return storage.join(run_url, "checkpoints", str(states[0])) if states else None


def _chain(url: str, attempts: list[int]) -> dict[int, fmt.StateId | None]:
    """The claims of the newest attempt, of the one that wrote what it continues, and so on."""
    claims: dict[int, fmt.StateId | None] = {}
    attempt = max(attempts, default=0)
    while attempt in attempts and attempt not in claims:
        continued, _ = _read_claim(_owner_url(url, attempt))
        claims[attempt] = continued
        attempt = continued.attempt if continued is not None else 0
    return claims


def claimed_at(url: str, attempt: int) -> float:
    """Unix time of an attempt's claim."""
    return _read_claim(_owner_url(url, attempt))[1]


def _read_claim(url: str) -> tuple[fmt.StateId | None, float]:
    """(the state that the attempt continues, Unix time of the claim)."""
    try:
        record = json.loads(storage.read(url))
        name = record["continues"]
        return None if name is None else fmt.StateId.parse(name), float(record["time"])
    except (ValueError, KeyError, TypeError):
        raise StateError(
            f"{storage.redact(url)}: not a claim of a run; restore it, or remove the run's folder"
        ) from None


def claim(url: str, attempt: int, continues: fmt.StateId | None) -> None:
    """Creates `owner/<attempt>`; ClaimError if somebody else just did."""
    record = {
        "attempt": attempt,
        "continues": None if continues is None else str(continues),
        "host": platform.node(),
        "pid": os.getpid(),
        "time": time.time(),
        "unique": uuid.uuid4().hex,
    }
    if not storage.create(_owner_url(url, attempt), json.dumps(record).encode()):
        raise ClaimError(
            f"{storage.redact(url)}: another job claimed this run at this moment; give one of both another run.url"
        )


def abort_uploads(run_url: str) -> None:
    """Frees what killed attempts had uploaded of objects that they could not finish. To be called by a run's owner."""
    for folder in ("checkpoints", "snapshots"):
        url = storage.join(run_url, folder)
        try:
            found = storage.abort_uploads(url)
        except StorageError as error:
            log.warning("unfinished uploads stay in the bucket, whose lifecycle rules can remove them: %s", error)
            return
        if found:
            log.info("%s: removed the parts of %d unfinished uploads", storage.redact(url), found)


def check_owner(url: str, attempt: int) -> None:
    """ClaimError if a newer attempt has claimed the run: then nothing of this one counts any more."""
    newest = max((int(name) for name in storage.list_names(storage.join(url, OWNER)) if name.isdigit()), default=0)
    if newest > attempt:
        raise ClaimError(
            f"{storage.redact(url)}: attempt {newest} has taken this run over from attempt {attempt}, which ends here"
        )


def collect(url: str, newest: fmt.StateId, keep: set[fmt.StateId]) -> None:
    """Removes what isn't to be kept: old states, void ones, and leftovers of saves that were broken off.

    newest: the state just published. What its attempt is writing after it, or a successor writes, is left alone.
    """
    check_owner(url, newest.attempt)
    for name in sorted({path.split("/")[0] for path in storage.list_objects(url)}):
        state = fmt.StateId.parse(name)
        if state is None or state in keep or state.attempt > newest.attempt:
            continue
        if state.attempt == newest.attempt and state.step > newest.step:
            continue
        remove(storage.join(url, name))


def remove(state_url: str) -> None:
    """The manifest first, so that no reader takes what is half removed for a state."""
    storage.delete(storage.join(state_url, fmt.MANIFEST))
    try:
        storage.delete_tree(state_url)
    except NotFoundError:
        pass


def _owner_url(url: str, attempt: int) -> str:
    return storage.join(url, OWNER, f"{attempt:06d}")
