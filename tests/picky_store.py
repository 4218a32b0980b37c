"""S3-compatible stores with habits of their own, imitated by a proxy before a real server.

    with PickyStore(server.endpoint, "checksum501", "nolist") as store: …

Real ones: R2, Google's, OCI, old MinIO and Ceph refuse optional checksums with 501, Backblaze with 400; MinIO before
2025 wants Content-MD5 in a bulk deletion; Ceph before Squid and some proxies lack conditional writes, others ignore
them; and policies deny deleting, or listing outside a prefix, or show what is missing as forbidden.
"""

import re
from collections.abc import Mapping
from urllib.parse import parse_qs, urlsplit

from tests.faulty_proxy import FaultyProxy

HABITS = {
    "checksum501", "checksum400", "md5delete", "deletedenied", "nodelete", "cond501", "condignored", "nolist",
    "listdenied",
}  # fmt: skip


def xml(code: str, message: str = "", more: str = "") -> bytes:
    """An error's body as S3 writes it."""
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>'.encode()


class PickyStore(FaultyProxy):
    """prefix: the only beginning of keys that may be listed, if any."""

    def __init__(self, target: str, *habits: str, prefix: str = "") -> None:
        assert HABITS.issuperset(habits), habits
        super().__init__(target)
        self.habits, self.prefix = set(habits), prefix

    def refuse(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes] | None:
        query = parse_qs(urlsplit(path).query, keep_blank_values=True)
        names = {name.lower() for name in headers}
        in_bulk = method == "POST" and "delete" in query
        if method in ("PUT", "POST") and not in_bulk and (refused := self._refuse_checksum(names)):
            return refused
        if in_bulk and "md5delete" in self.habits and "content-md5" not in names:
            return 400, xml("MissingContentMD5", "Missing required header for this request: Content-Md5.")
        if in_bulk and self.habits & {"deletedenied", "nodelete"}:
            keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
            denied = "".join(f"<Error><Key>{key}</Key><Code>AccessDenied</Code></Error>" for key in keys)
            return 200, f'<?xml version="1.0"?><DeleteResult>{denied}</DeleteResult>'.encode()
        if method == "DELETE" and "uploadId" not in query and "nodelete" in self.habits:
            return 403, xml("AccessDenied", "not authorized to perform: s3:DeleteObject")
        if "cond501" in self.habits and "if-none-match" in names:
            return 501, xml("NotImplemented", "A header you provided implies functionality that is not implemented")
        lists = method == "GET" and "/" not in urlsplit(path).path.strip("/")
        beginning = query.get("prefix", [""])[0]
        if lists and ("listdenied" in self.habits or not beginning.startswith(self.prefix)):
            return 403, xml("AccessDenied", "not authorized to perform: s3:ListBucket")
        return None

    def answer_instead(self, status: int) -> tuple[int, bytes] | None:
        if status == 412 and "condignored" in self.habits:  # the header is signed, so it can't be left out on the way
            return 200, b""
        if status == 404 and self.habits & {"nolist", "listdenied"}:
            return 403, xml("AccessDenied", "Access Denied")
        return None

    def _refuse_checksum(self, names: set[str]) -> tuple[int, bytes] | None:
        sums = {n for n in names if n.startswith("x-amz-checksum-") and n != "x-amz-checksum-mode"}
        sums |= names & {"x-amz-sdk-checksum-algorithm", "x-amz-trailer"}
        if sums and "checksum501" in self.habits:
            return 501, xml("NotImplemented", f"Header '{min(sums)}' not implemented")
        if sums and "checksum400" in self.habits:
            return 400, xml("InvalidArgument", f"Unsupported header '{min(sums)}' received for this API call.")
        return None
