"""Which states a run has: claims by attempts, and the removal of what nobody needs."""

import json
import logging
import os
import platform
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ddpm_dist import storage
from ddpm_dist.errors import ClaimError, NotFoundError, StateError, StorageError
from ddpm_dist.state import format as fmt

log = logging.getLogger(__name__)

OWNER = "owner"
ASKED_AT_ONCE = 16


@dataclass(frozen=True)
class Claim:
    """What an attempt said when it made the run its own."""

    continues: fmt.StateId | None
    time: float
    """Unix time."""
    began: float | None = None
    """Unix time of the run's first claim; None in claims of older versions, as is the next."""
    chain: tuple[fmt.StateId, ...] | None = None
    """The last valid state of each attempt whose states were valid, so that no older claim has to be read."""
    unique: str = ""
    """What no other claim has."""


def read(url: str) -> tuple[dict[int, fmt.StateId | None], list[fmt.StateId]]:
    """(attempt -> the state that it continues, valid states newest first) of a run's checkpoints folder.

    Of older attempts only those are told apart from a new beginning whose claims had to be read. Two listings of names,
    a request for each state and one read, however many attempts there were, and however many ranks wrote files.
    """
    claims, valid = look(url)
    return {attempt: claim.continues if claim is not None else None for attempt, claim in claims.items()}, valid


def look(url: str) -> tuple[dict[int, Claim | None], list[fmt.StateId]]:
    """As `read`, with all that the claims say; None for those that weren't read."""
    published = _published(url)
    attempts = [int(name) for name in storage.list_names(storage.join(url, OWNER)) if name.isdigit()]
    claims = _chain(url, attempts)
    newest = claims.get(max(claims, default=0))
    if newest is not None and newest.chain is not None:
        valid = fmt.states_within({max(claims): float("inf"), **{s.attempt: s.step for s in newest.chain}}, published)
    else:
        valid = fmt.valid_states({attempt: claim.continues for attempt, claim in claims.items()}, published)
    return {**dict.fromkeys(attempts), **claims}, valid


def _published(url: str) -> list[fmt.StateId]:
    """The states that have a manifest. Their folders aren't listed: each holds several files of every rank."""
    states = [state for name in storage.list_names(url) if (state := fmt.StateId.parse(name))]
    if not states:
        return []
    with ThreadPoolExecutor(min(ASKED_AT_ONCE, len(states)), "state-manifests") as pool:
        whole = list(pool.map(lambda s: storage.exists(storage.join(url, str(s), fmt.MANIFEST)), states))
    return [state for state, there in zip(states, whole, strict=True) if there]


def latest_step(run_url: str) -> int | None:
    """Step of a run's newest valid state; None if it has none."""
    _, states = read(storage.join(run_url, "checkpoints"))
    return states[0].step if states else None


def newest_state(run_url: str) -> str | None:
    """URL of a run's newest valid state; None if it has none."""
    _, states = read(storage.join(run_url, "checkpoints"))
    return storage.join(run_url, "checkpoints", str(states[0])) if states else None


def _chain(url: str, attempts: list[int]) -> dict[int, Claim]:
    """The claim of the newest attempt; where an older version wrote it, also those of the one that wrote what it
    continues, and so on."""
    claims: dict[int, Claim] = {}
    attempt = max(attempts, default=0)
    while attempt in attempts and attempt not in claims:
        try:
            claims[attempt] = claim = read_claim(url, attempt)
        except NotFoundError as error:
            log.warning("attempt %d never claimed this run: %s", attempt, error)
            attempts = [one for one in attempts if one != attempt]
            attempt = max((one for one in attempts if one < attempt), default=0)
            continue
        if claim.chain is not None and len(claims) == 1:
            break
        attempt = claim.continues.attempt if claim.continues is not None else 0
    return claims


def began_at(url: str, claims: Mapping[int, Claim | None]) -> float | None:
    """Unix time at which the run's first attempt claimed it; None where nobody has."""
    if not claims:
        return None
    newest = next((claim for _, claim in sorted(claims.items(), reverse=True) if claim is not None), None)
    if newest is not None and newest.began is not None:
        return newest.began
    try:
        return read_claim(url, min(claims)).time
    except NotFoundError:  # the first writer was killed before its claim was whole
        return None


def read_claim(url: str, attempt: int) -> Claim:
    """StateError if it is none, NotFoundError if its writer was killed before it was whole (disks without links)."""
    place = _owner_url(url, attempt)
    text = storage.read(place)
    if not text:
        raise NotFoundError(f"{storage.redact(place)}: empty, as its writer was killed; it counts for nothing")
    try:
        record = json.loads(text)
        name, chain, began = record["continues"], record.get("chain"), record.get("began")
        return Claim(
            None if name is None else fmt.StateId.parse(name),
            float(record["time"]),
            None if began is None else float(began),
            None if chain is None else tuple(state for n in chain if (state := fmt.StateId.parse(n))),
            str(record.get("unique", "")),
        )
    except (ValueError, KeyError, TypeError):
        raise StateError(
            f"{storage.redact(place)}: not a claim of a run; restore it, or remove the run's folder"
        ) from None


def claim(
    url: str, attempt: int, valid: Sequence[fmt.StateId], began: float | None = None, unique: str | None = None
) -> Claim:
    """Creates `owner/<attempt>`, which continues the newest of the valid states; ClaimError if somebody else just did.

    began: Unix time of the run's first claim; None: this one. unique: its own word, if that is to be known before.
    StorageError if the store can't create once.
    """
    now = time.time()
    began, unique = now if began is None else began, unique or uuid.uuid4().hex
    made = Claim(max(valid, default=None), now, began, fmt.last_of_each(valid), unique)
    assert made.chain is not None
    record = {
        "attempt": attempt,
        "continues": None if made.continues is None else str(made.continues),
        "chain": [str(state) for state in made.chain],
        "began": made.began,
        "host": platform.node(),
        "pid": os.getpid(),
        "time": now,
        "unique": unique,
    }
    place = _owner_url(url, attempt)
    if not storage.create(place, json.dumps(record).encode()):
        raise ClaimError(
            f"{storage.redact(url)}: another job claimed this run at this moment; give one of both another run.url"
        )
    # Which attempt counts rests on this alone, so the store shows that it keeps it: a second create has to fail.
    storage.check_create(place, json.dumps({**record, "unique": uuid.uuid4().hex}).encode())
    return made


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
    for name in storage.list_names(url):
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
