"""What time it is at a store, as it says with each answer; asked without credentials."""

import http.client
import os
import ssl
import time
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from ddpm_dist.storage import identity

AMAZON = "https://s3.amazonaws.com"
PATIENCE_S = 5.0


def clock_ahead_s(url: str) -> float | None:
    """How many seconds this machine's clock is ahead of the store's, right to about one; None where it doesn't say.

    S3 alone says it: in the Date of any answer, also of a refusal (RFC 9110, section 6.6.1). Asks once.
    """
    if not url.startswith("s3://"):
        return None
    parts = urlsplit(identity.endpoint() or AMAZON)
    host, port = parts.hostname or "", parts.port
    connection: http.client.HTTPConnection
    try:
        if parts.scheme == "https":
            bundle = os.environ.get("AWS_CA_BUNDLE") or identity.profile().get("ca_bundle")
            context = ssl.create_default_context(cafile=bundle)
            connection = http.client.HTTPSConnection(host, port, timeout=PATIENCE_S, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
        asked = time.time()
        connection.request("HEAD", "/")
        date = connection.getresponse().getheader("Date")
        answered = time.time()
        connection.close()
        # A Date is cut to whole seconds: half of one is what it lacks on average.
        return None if date is None else (asked + answered) / 2 - parsedate_to_datetime(date).timestamp() - 0.5
    except (OSError, http.client.HTTPException, ValueError):  # who asks for more than the time says why
        return None
