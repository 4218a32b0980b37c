"""Who this process is to S3, and where its S3 is: the endpoint, the region and the credentials that botocore will take.

Read from the environment and the user's AWS configuration alone; nothing here asks the network, or knows a secret.
"""

import os
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ddpm_dist.errors import without_url_secrets

if TYPE_CHECKING:
    from botocore.session import Session

AWS_DOMAINS = (".amazonaws.com", ".amazonaws.com.cn", ".api.aws")
CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION"


@cache
def session() -> "Session":
    """botocore's session of this process; `forget` after a change of the environment."""
    from botocore.session import Session  # where no S3 is used, it need not be there

    return Session()


def profile() -> dict[str, Any]:
    """The settings of the user's profile; none where there is none, or where it can't be read."""
    try:
        return dict(session().get_scoped_config())
    except Exception:  # botocore's own, which the client explains; or there is no botocore
        return {}


def endpoint() -> str | None:
    """The endpoint that the environment or the profile names; None for AWS itself."""
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if named:
        return named
    mine = profile()
    try:
        services = session().full_config.get("services", {}).get(mine.get("services"), {})
    except Exception:  # as above
        services = {}
    of_s3 = services.get("s3", {})
    found = (of_s3.get("endpoint_url") if isinstance(of_s3, dict) else None) or mine.get("endpoint_url")
    return str(found) if found else None


def is_aws() -> bool:
    """Whether the endpoint is one of Amazon's."""
    named = endpoint()
    return named is None or (urlsplit(named).hostname or "").endswith(AWS_DOMAINS)


def checksums_are_chosen() -> bool:
    """Whether the user says which checksums requests carry."""
    return bool(os.environ.get(CHECKSUMS) or profile().get("request_checksum_calculation"))


def describe() -> str:
    """Which identity signs this process's requests, as a phrase without a secret."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return "the keys of the environment (AWS_ACCESS_KEY_ID)"
    name = profile_name()
    if (mine := profile()) and (kind := _kind_of(mine)):
        return f"{kind} of the profile {name}"
    if os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        return f"the role {os.environ.get('AWS_ROLE_ARN', '')} (AWS_WEB_IDENTITY_TOKEN_FILE)"
    if any(os.environ.get(f"AWS_CONTAINER_CREDENTIALS_{kind}_URI") for kind in ("RELATIVE", "FULL")):
        return "the container's role"
    return f"the machine's role, if it has one: there are no keys in the environment nor in the profile {name}"


def introduce() -> str:
    """Where this process's S3 is, and as whom it asks there; without a secret."""
    return f"S3 at {without_url_secrets(endpoint() or 'Amazon')}, with {describe()}"


def profile_name() -> str:
    """Of the profile in ~/.aws that applies."""
    return os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"


def forget() -> None:
    """The environment and the configuration are read anew."""
    session.cache_clear()


def _kind_of(settings: dict[str, Any]) -> str | None:
    """By what a profile identifies its user; None if by nothing."""
    if "role_arn" in settings:
        return f"the role {settings['role_arn']}"
    if "sso_start_url" in settings or "sso_session" in settings:
        return "the SSO login"
    if "aws_access_key_id" in settings:
        return "the keys"
    return "the credential_process" if "credential_process" in settings else None
