"""Signed URLs of S3 objects at an endpoint that the user names, without an S3 client.

botocore's client reads its service model before it does anything: 0.2 s of processor time, and memory that stays.
Signing needs neither; and where an object lies at such an endpoint is no question of regions and partitions.
botocore itself is imported at the first signature: where no S3 is used, it need not be there.
"""

from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import quote

from ddpm_dist.storage import identity

if TYPE_CHECKING:
    from botocore.credentials import Credentials


def sign(endpoint: str, path: str, seconds: int) -> str | None:
    """A URL that GETs bucket/key for so long; None where botocore's own client has to decide."""
    from botocore.auth import S3SigV4QueryAuth
    from botocore.awsrequest import AWSRequest
    from botocore.exceptions import BotoCoreError

    found = _signer()
    if found is None:
        return None
    credentials, region = found
    request = AWSRequest("GET", f"{endpoint.rstrip('/')}/{quote(path, safe='/-_.~')}")
    try:
        S3SigV4QueryAuth(credentials.get_frozen_credentials(), "s3", region, expires=seconds).add_auth(request)
    except BotoCoreError:  # credentials that can't be renewed: the client explains it
        return None
    return str(request.url)


@cache
def _signer() -> "tuple[Credentials, str] | None":
    """(credentials, which renew themselves; region), unless the user's AWS configuration says how to address S3."""
    from botocore.exceptions import BotoCoreError

    try:
        session = identity.session()
        credentials = session.get_credentials()
        if credentials is None or "s3" in session.get_scoped_config():
            return None
        return credentials, session.get_config_variable("region") or "us-east-1"
    except BotoCoreError:
        return None


def forget() -> None:
    """The environment's credentials are read anew."""
    identity.forget()
    _signer.cache_clear()
