"""What came with a job beside its code: `ray job submit --working-dir` uploads all that lies there."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

log = logging.getLogger(__name__)

LARGE_BYTES = 32 * 2**20
"""More than a checkout has, many times."""
NAMED = 3
"""Most entries that the message lists."""
_MOST = 0.9
"""Where one part has so much of a folder, it is the part that is named."""


@dataclass(frozen=True)
class _Entry:
    path: Path
    size: int
    parts: "list[_Entry]"


def say_if_large(working_dir: str | None) -> None:
    """Warns of a large working directory of this job, and says what in it is large and how to leave it out.

    working_dir: as Ray tells it, the URI of a package (gcs://_ray_pkg_….zip), or None. A process that doesn't run in
    what was unpacked from it says nothing.
    """
    here = Path.cwd()
    if not working_dir or here.name != PurePosixPath(working_dir).stem:
        return
    whole = _measured(here)
    if whole.size < LARGE_BYTES:
        return
    large = sorted((_narrowed(part) for part in whole.parts), key=lambda entry: -entry.size)[:NAMED]
    large = [entry for entry in large if entry.size > LARGE_BYTES / 10]
    names = [entry.path.relative_to(here).as_posix() for entry in large]
    told = ", ".join(f"{name} ({_megabytes(entry.size)})" for name, entry in zip(names, large, strict=True))
    excluded = json.dumps({"excludes": [f"/{name}" for name in names]})
    log.warning(
        "the working directory of this job is %s, which each node fetches before it can help: %s. Keep data outside of "
        "it, or name it in .gitignore or .rayignore, or submit with --runtime-env-json '%s'",
        _megabytes(whole.size), told or "many small files", excluded,
    )  # fmt: skip


def _measured(path: Path) -> _Entry:
    if path.is_symlink() or not path.is_dir():
        return _Entry(path, path.lstat().st_size, [])
    parts = [_measured(part) for part in path.iterdir()]
    return _Entry(path, sum(part.size for part in parts), parts)


def _narrowed(entry: _Entry) -> _Entry:
    while entry.parts:
        largest = max(entry.parts, key=lambda part: part.size)
        if largest.size < _MOST * entry.size:
            break
        entry = largest
    return entry


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
