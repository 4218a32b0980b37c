"""Checks of a store: what training, sampling and evaluation need of one, tried in a folder of its own."""

import os
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ddpm_dist import storage
from ddpm_dist.config import Config
from ddpm_dist.data import Loader
from ddpm_dist.doctor.rows import Asked, Check, Failed, Remark, Row, Skipped, State, check
from ddpm_dist.errors import DdpmDistError, StorageError

LARGE_BYTES = 33 * 2**20
"""Is sent in two parts."""
PATIENCE_S = 20.0
"""For an outage of the store: who looks for a fault needn't wait for its end."""
SLOW_BYTES_PER_S = 10e6
CLOCK_S, CLOCK_REMARK_S = 60.0, 5.0
"""Signatures are refused from 15 minutes on, and signed URLs run out early by as much as the clock is off."""
SMALL = b"0123456789"
_RIGHTS = "docs/stores.md says what is needed; the identity's policy has to allow it below the run's folder"


@check("store: reach", "correct the URL, the endpoint or the keys in the environment of this node (docs/stores.md)")
def reach(asked: Asked) -> str:
    """The bucket is found, and lets this node's identity in."""
    url = asked.config.run.url
    storage.check_access(url, "run.url")
    return storage.introduce() if url.startswith("s3://") else "a folder that all nodes have to share"


@check("store: write, read back", _RIGHTS)
def round_trip(asked: Asked) -> str:
    """A small object comes back as it was written."""
    _write_and_read(_at(asked, "small"), SMALL)
    return "works"


@check("store: read a range", _RIGHTS)
def read_range(asked: Asked) -> str:
    """What shards are read by."""
    _expect(storage.read_range(_at(asked, "small"), 3, 4, PATIENCE_S), b"3456")
    return "works"


@check("store: list", _RIGHTS)
def listing(asked: Asked) -> str:
    """How states, snapshots and receipts are found."""
    _expect(storage.list_objects(_folder(asked), PATIENCE_S), {"small": len(SMALL)})
    return "works"


@check("store: create once", "another store, or file:///FOLDER on a disk that all nodes share (docs/stores.md)")
def create_once(asked: Asked) -> str:
    """Of two who create an object, one succeeds: who owns a run rests on it."""
    url = _at(asked, "once")
    if not storage.create(url, uuid.uuid4().bytes, PATIENCE_S):
        raise Failed("a new name is taken already")
    storage.check_create(url, uuid.uuid4().bytes, PATIENCE_S)
    return "works"


@check("store: a large object in parts", _RIGHTS)
def in_parts(asked: Asked) -> str:
    """Multipart uploads, and how fast they and their reading are."""
    data, began = os.urandom(LARGE_BYTES), time.monotonic()
    storage.publish(_at(asked, "large"), data, PATIENCE_S)
    written = time.monotonic()
    _expect(storage.read(_at(asked, "large"), PATIENCE_S), data)
    rates = [LARGE_BYTES / max(1e-9, s) for s in (written - began, time.monotonic() - written)]
    text = f"written at {rates[0] / 1e6:.0f} MB/s, read at {rates[1] / 1e6:.0f} MB/s"
    if min(rates) < SLOW_BYTES_PER_S:
        raise Remark(text, "a store or a region nearer to this node; states and shards wait for it")
    return text


@check("store: say what isn't there", _RIGHTS)
def missing(asked: Asked) -> str:
    """A missing object is told from a refusal."""
    _expect(storage.exists(_at(asked, "none"), PATIENCE_S), False)
    return "works"


@check("store: signed URLs (reads cost a tenth)", "let signed GETs through; without them shards are read by s3fs")
def signed(asked: Asked) -> str:
    """Plain GETs of signed URLs, by which shards are read."""
    url = storage.signed_url(_at(asked, "small"), 60)
    if url is None:
        raise Skipped("not an S3 store")
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:  # noqa: S310 - http or https, as the endpoint is
            _expect(answer.read(), SMALL)
    except OSError as error:
        raise Remark(f"{type(error).__name__}: {error}") from None
    return "work"


@check("store: delete (else old states stay)", "allow s3:DeleteObject; what was tried here stays as well")
def delete(asked: Asked) -> str:
    """Old states are removed, and what these checks wrote."""
    storage.delete_tree(_folder(asked), PATIENCE_S)
    return "works"


@check("clock", "set this node's clock: start chrony, ntpd or systemd-timesyncd")
def clock(asked: Asked) -> str:
    """This node's clock beside the store's."""
    ahead = storage.clock_ahead_s(asked.config.run.url)
    if ahead is None:
        raise Skipped("this store doesn't say what time it is")
    text = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the store's"
    if abs(ahead) > CLOCK_S:
        raise Failed(text)
    if abs(ahead) > CLOCK_REMARK_S:
        raise Remark(text)
    return "agrees with the store's to seconds"


@check("data", "correct data.url or data.index; `ddpm-shards index URL` makes an index (docs/data.md)")
def data(asked: Asked) -> str:
    """The data set is there, with an index that fits the configuration."""
    cfg: Config = asked.config
    urls = [cfg.data.url] if isinstance(cfg.data.url, str) else list(cfg.data.url)
    for url in urls:
        storage.check_access(url, "data.url")
    if asked.first:
        Loader(cfg, rank=0, world=cfg.worker_range[0]).close()
    return f"{len(urls)} {'set' if len(urls) == 1 else 'sets'}, with an index" if asked.first else "within reach"


TRIED_ONCE: tuple[Check[Asked], ...] = (read_range, listing, create_once, in_parts, missing, signed)
NEEDED = ("reach", "write", "read a range", "list", "create once", "a large object", "say what")
"""Beginnings of what a store can't do without."""


def rows_of_store(asked: Asked, node: str) -> list[Row]:
    """The store's rows of a node; what builds on one that failed isn't tried. The folder is gone afterwards."""
    if asked.cfg is None:
        return [_said(reach, asked, node)]
    rows = [_said(clock, asked, node), _said(reach, asked, node)]
    if rows[-1].state is State.FAILED:
        return rows
    with _folder_of_its_own(asked.cfg.run.url) as folder:
        mine = replace(asked, folder=folder)
        rows.append(_said(round_trip, mine, node))
        if rows[-1].state is State.OK:
            rows += [_said(one, mine, node) for one in (TRIED_ONCE if asked.first else (in_parts,))]
        rows.append(_as_remark(_said(delete, mine, node)))
    return [*rows, _said(data, asked, node)]


def try_store(url: str) -> Iterator[tuple[str, bool, str | None]]:
    """Tries a store in a folder of its own, which is gone afterwards: (what, whether it is needed, its error or None).

    Raises the store's own error where it can't be reached.
    """
    storage.check_access(url)
    with _folder_of_its_own(url) as folder:
        asked = Asked(None, folder=folder)
        for one in (round_trip, *TRIED_ONCE, delete):
            row = _said(one, asked, "")
            name = one.name.removeprefix("store: ")
            bad = row.state is State.FAILED or (row.state is State.REMARK and one is signed)
            yield name, name.startswith(NEEDED), row.found if bad else None


@contextmanager
def _folder_of_its_own(url: str) -> Iterator[str]:
    """URL of a folder below another; afterwards it is gone, as are the folders on a disk that weren't there before."""
    path = Path(unquote(urlsplit(url).path)) if url.startswith("file://") else None
    made = [one for one in (path, *path.parents) if not one.exists()] if path else []
    folder = storage.join(url, f"ddpm-doctor-{uuid.uuid4().hex[:8]}")
    try:
        yield folder
    except BaseException:  # Ctrl-C: `delete` was not reached
        with suppress(DdpmDistError, OSError):
            storage.delete_tree(folder, PATIENCE_S)
        raise
    finally:
        for one in made:
            with suppress(OSError):
                one.rmdir()


def _said(one: Check[Asked], asked: Asked, node: str) -> Row:
    """The row, in which an error of ours or of the system is a failure with its own words."""

    def look(subject: Asked) -> str:
        try:
            return one.look(subject)
        except (DdpmDistError, OSError) as error:
            raise Failed(str(error).partition("\n")[0]) from None

    return Check(one.name, one.remedy, look).row(asked, node)


def _as_remark(row: Row) -> Row:
    """A run works without it."""
    return replace(row, state=State.REMARK) if row.state is State.FAILED else row


def _folder(asked: Asked) -> str:
    assert asked.folder is not None
    return asked.folder


def _at(asked: Asked, name: str) -> str:
    return storage.join(_folder(asked), name)


def _expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise StorageError(f"{str(found)[:100]} came, where {str(wanted)[:100]} was expected")


def _write_and_read(url: str, content: bytes) -> None:
    storage.publish(url, content, PATIENCE_S)
    if storage.read(url, PATIENCE_S) != content:
        raise StorageError("other bytes came back than were written")
