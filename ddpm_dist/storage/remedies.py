"""Mistakes of set-up that an exception of S3's client betrays, each with what mends it.

Known by provoking each of them (tests/storage/test_mistakes.py): nothing here can pass by waiting.
"""

import os
import socket
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

from ddpm_dist.storage import identity

_CONFIGURATION = (
    "ProfileNotFound", "ConfigParseError", "ConfigNotFound", "InvalidConfigError", "InvalidChecksumConfigError",
    "InvalidRegionError", "ParamValidationError", "InvalidEndpointConfigurationError", "InvalidProxiesConfigError",
    "InvalidRetryConfigurationError", "MissingDependencyException", "InfiniteLoopConfigError",
)  # fmt: skip
_LOGINS = ("SSOError", "LoginError", "TokenRetrievalError", "NoAuthTokenError", "UnauthorizedException")
_WRONG_REGION = {
    "PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "BadRegion",
}  # fmt: skip
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and those behind it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def known(error: BaseException, code: str, text: str, is_s3: bool) -> str | None:
    """What a mistake is, and its remedy; None for an exception that is none of them."""
    if code == "RequestTimeTooSkewed":
        return "access refused: this node's clock differs too much from the store's; set it"
    if not is_s3:
        return None
    names = {kind.__name__ for cause in causes(error) for kind in type(cause).__mro__}
    if names.intersection(_LOGINS):
        profile = identity.profile_name()
        return f"not logged in ({text}); run `aws sso login --profile {profile}` on this node, or unset AWS_PROFILE"
    if code in _EXPIRED:
        return f"access refused: the temporary credentials have expired; renew {_expired()}"
    if any("Credential" in name for name in names):
        return f"access refused ({text.rstrip('.')}); {_missing_keys()}"
    if "checksum" in text.lower() and code in ("NotImplemented", "InvalidArgument", "InvalidRequest"):
        return f"the store refuses requests with a checksum ({text}); set {identity.CHECKSUMS}=when_required"
    if code in _WRONG_REGION:
        return f"wrong region ({text}); set AWS_DEFAULT_REGION to the bucket's{_region_of(error)}"
    if names.intersection(_CONFIGURATION):
        return f"the AWS configuration can't be used: {text}"
    if "NoRegionError" in names:
        return "no region; set AWS_DEFAULT_REGION, or region in the profile"
    return _transport(error, text)


def wrong_scheme(endpoint: str | None) -> str:
    """A remark if an http:// endpoint that doesn't answer speaks TLS; one connection is made to see it."""
    parts = urlsplit(endpoint or "")
    if parts.scheme != "http" or not parts.hostname:
        return ""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent: only whether it speaks TLS
    try:
        with (
            socket.create_connection((parts.hostname, parts.port or 80), timeout=2) as plain,
            context.wrap_socket(plain, server_hostname=parts.hostname),
        ):
            return f"; it speaks TLS: write https://{parts.netloc}"
    except OSError:
        return ""


def _transport(error: BaseException, text: str) -> str | None:
    """Of TLS and HTTP below S3."""
    inner = list(causes(error))
    what = " ".join(str(cause) for cause in inner)
    bundle = os.environ.get("AWS_CA_BUNDLE") or identity.profile().get("ca_bundle")
    if "CERTIFICATE_VERIFY_FAILED" in what:
        told = f"AWS_CA_BUNDLE is {bundle}" if bundle else "set AWS_CA_BUNDLE to the file of its certificate authority"
        return f"the endpoint's certificate isn't trusted ({_reason(what)}); {told}"
    if "WRONG_VERSION_NUMBER" in what or "HTTP_REQUEST" in what:
        return f"AWS_ENDPOINT_URL: {identity.endpoint()} doesn't speak TLS; write http:// for it"
    if "HTTP request to an HTTPS" in what or "plain HTTP request was sent to HTTPS" in what:
        return f"AWS_ENDPOINT_URL: {identity.endpoint()} speaks TLS; write https:// for it"
    if bundle and any(isinstance(cause, (FileNotFoundError, ssl.SSLError)) for cause in inner):
        return f"AWS_CA_BUNDLE: {bundle}: can't be used ({inner[-1]})"
    if any(type(cause).__name__ == "TooManyRedirects" for cause in inner):
        return f"{identity.endpoint() or 'the endpoint'} sends elsewhere, as a login page does; check AWS_ENDPOINT_URL"
    return None


def _reason(text: str) -> str:
    """OpenSSL's words about a certificate."""
    return text.partition("certificate verify failed: ")[2].partition(" (_ssl")[0] or "its signer is unknown"


def _expired() -> str:
    if os.environ.get("AWS_SESSION_TOKEN"):
        return "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN on this node"
    return identity.describe()


def _missing_keys() -> str:
    missing = [name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if not os.environ.get(name)]
    if identity.profile() or len(missing) == 1:
        return f"asked with {identity.describe()}" + (
            f"; {missing[0]} not set on this node" if missing[1:] == [] else ""
        )
    return f"{' and '.join(missing)} not set on this node, and there is no profile {identity.profile_name()}"


def _region_of(error: BaseException) -> str:
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            region = headers.get("x-amz-bucket-region") or response.get("Error", {}).get("Region")
            return f", {region}" if region else ""
    return ""
