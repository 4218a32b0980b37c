"""Objects that are created once: of many who try, one succeeds. All that says whose something is rests on it."""

from ddpm_dist.errors import NotFoundError, StorageError
from ddpm_dist.storage.errors import PATIENCE_S, answer_of, redact, retry
from ddpm_dist.storage.filesystem import filesystem, is_local
from ddpm_dist.storage.local import content, create_file
from ddpm_dist.storage.objects import put

NO_CREATE = (
    "this store {} If-None-Match{}, by which an object is created once: two jobs could take one folder without seeing "
    "each other; use a store that has it (docs/stores.md; `ddpm-inspect store URL` tries one), or file:///FOLDER"
)


def create(url: str, data: bytes, patience_s: float = PATIENCE_S) -> bool:
    """Writes an object if there is none; False if there was. Of many who try at once, one succeeds.

    After a lost answer the object can be our own: it is then compared, so `data` should be unique.
    """
    fs, path = filesystem(url)

    def attempt() -> bool:
        try:
            if is_local(fs):
                create_file(path, data)
            else:
                put(fs, path, data, mode="create")
        except OSError as error:
            code, status = answer_of(error)
            if isinstance(error, FileExistsError) or status == 412:
                there = bytes(fs.cat_file(path))
                return (content(path, there) if is_local(fs) else there) == data
            if status == 501 or (status == 400 and code in ("NotImplemented", "InvalidArgument", "InvalidRequest")):
                raise StorageError(f"{redact(url)}: {NO_CREATE.format('lacks', f' ({status} {code})')}") from None
            raise
        return True

    try:
        return retry(attempt, url, patience_s)
    except NotFoundError:  # somebody was killed while making it, on a disk without hard links
        return False


def check_create(url: str, data: bytes, patience_s: float = PATIENCE_S) -> None:
    """StorageError if this store lets the object that `create` just made be created again.

    To be called with another content; it asks once, and leaves nothing where the store keeps its word.
    """
    if create(url, data, patience_s):
        raise StorageError(f"{redact(url)}: {NO_CREATE.format('ignores', '')}")
