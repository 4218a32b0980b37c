"""Shards on a local disk, within a limit of bytes: least recently used first out, safe among processes."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ddpm_dist.data.index import ShardInfo
from ddpm_dist.errors import ConfigError, ShardError

PIECE_BYTES = 2**24


class DiskCache:
    """Whole shards in a folder that any number of processes share, under the hash of their content."""

    def __init__(self, folder: str, max_bytes: int) -> None:
        self._folder, self._max_bytes = Path(folder).expanduser(), max_bytes
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.cache_dir: {folder}: {error.strerror}") from None

    def read(self, shard: ShardInfo, start: int, length: int, fetch: Callable[[int, int], bytes | bytearray]) -> bytes:
        """A range of a shard; the whole shard comes first if it isn't here.

        fetch(start, length): the bytes from the store. ShardError if they aren't what the index says.
        """
        path = self._folder / f"{shard.hash}.tar"
        while True:
            try:
                with open(path, "rb") as file:
                    os.utime(file.fileno())
                    return os.pread(file.fileno(), length, start)
            except FileNotFoundError:  # not here yet, or evicted just now
                with self._locked(shard.hash[:2]):
                    if not path.exists():
                        self._fill(path, shard, fetch)

    def _fill(self, path: Path, shard: ShardInfo, fetch: Callable[[int, int], bytes | bytearray]) -> None:
        if shard.bytes > self._max_bytes:
            raise ConfigError(f"data.cache_bytes: {self._max_bytes}, but shard {shard.name} has {shard.bytes} bytes")
        digest = hashlib.blake2b(digest_size=16)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with open(partial, "wb") as file:
                for start in range(0, shard.bytes, PIECE_BYTES):
                    piece = fetch(start, min(PIECE_BYTES, shard.bytes - start))
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() != shard.hash:
                raise ShardError(
                    f"{shard.name}: altered: its hash is not the one in the index; restore the shard, or leave it out "
                    f"with data.exclude_shards"
                )
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        self._evict(path)

    def _evict(self, newest: Path) -> None:
        with self._locked("all"):
            found = []
            for entry in self._folder.glob("*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    state = entry.stat()
                    found.append((state.st_mtime_ns, state.st_size, entry))
            total = sum(size for _, size, _ in found)
            for _, size, entry in sorted(found):
                if total <= self._max_bytes:
                    break
                if entry != newest:
                    entry.unlink(missing_ok=True)
                    total -= size

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process, and one thread of it, at a time; a lock ends with its holder, however that ends."""
        with open(self._folder / f".lock-{name}", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
