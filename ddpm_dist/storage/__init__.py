"""Objects at any fsspec URL: whole and range reads, atomic publish, create-once, retries, clean-up.

All that touches a store goes through here, and nothing here knows what it stores. It never caches, never lists more
than it is asked for, and never shows a credential.

What every function has in common: a URL is s3://BUCKET/KEY, file:///PATH or another absolute one of fsspec. Transient
errors are retried for `patience_s` seconds. Raises NotFoundError where nothing is there, AccessError with the remedy
where the store refuses, else StorageError; none of them names a secret.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.storage.clock import clock_ahead_s as clock_ahead_s
    from ddpm_dist.storage.errors import PATIENCE_S as PATIENCE_S, redact as redact
    from ddpm_dist.storage.filesystem import (
        CONNECT_TIMEOUT_S as CONNECT_TIMEOUT_S,
        READ_TIMEOUT_S as READ_TIMEOUT_S,
        clear_instances as clear_instances,
    )
    from ddpm_dist.storage.identity import introduce as introduce
    from ddpm_dist.storage.objects import (
        abort_uploads as abort_uploads,
        check_access as check_access,
        delete as delete,
        delete_tree as delete_tree,
        discard as discard,
        exists as exists,
        join as join,
        list_names as list_names,
        list_objects as list_objects,
        publish as publish,
        read as read,
        read_range as read_range,
        signed_url as signed_url,
        size as size,
        upload as upload,
    )
    from ddpm_dist.storage.once import check_create as check_create, create as create
    from ddpm_dist.storage.sessions import preload as preload

__all__, _asked = lazily(
    __name__,
    clock="clock_ahead_s",
    errors="PATIENCE_S redact",
    filesystem="CONNECT_TIMEOUT_S READ_TIMEOUT_S clear_instances",
    identity="introduce",
    objects="abort_uploads check_access delete delete_tree discard exists "
    "join list_names list_objects publish read read_range signed_url size upload",
    once="check_create create",
    sessions="preload",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
