"""Sets at plain HTTP: streamed and verified where the server knows byte ranges, refused at once where it doesn't."""

import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ddpm_dist.data.foreign import index_shards
from ddpm_dist.data.index import load_index
from ddpm_dist.data.verify import verify_shards
from ddpm_dist.errors import ConfigError, DataError, NotFoundError
from tests.data.small_sets import config, global_batches, write_set


class _Handler(SimpleHTTPRequestHandler):
    """Python's own handler knows no ranges."""

    ranges = True

    def do_GET(self) -> None:
        wanted, file = self.headers.get("Range"), Path(self.translate_path(self.path))
        if not (self.ranges and wanted and file.is_file()):
            super().do_GET()
            return
        data = file.read_bytes()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(data) - 1), len(data) - 1) + 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(data[start:stop])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[bool, str]]:
    handler = type("Handler", (_Handler,), {"ranges": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield request.param, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_set_at_plain_http(server: tuple[bool, str], tmp_path: Path) -> None:
    ranges, url = server
    local = f"file://{tmp_path}/set"
    write_set(local, [24] * 4)
    if not ranges:
        started = time.monotonic()
        with pytest.raises(DataError, match="the server knows no byte ranges"):
            load_index(f"{url}/set", "data.url")
        assert time.monotonic() - started < 3
        return
    assert global_batches(config(f"{url}/set"), 1, 0, 5) == global_batches(config(local), 1, 0, 5)
    assert verify_shards(f"{url}/set") == []
    with pytest.raises(NotFoundError, match=r"data\.url: .*nothing/index\.json.*ddpm-shards make"):
        load_index(f"{url}/nothing", "data.url")


def test_its_index_lies_elsewhere(server: tuple[bool, str], tmp_path: Path) -> None:
    ranges, url = server
    local, home = f"file://{tmp_path}/set", f"file://{tmp_path}/index"
    write_set(local, [24] * 4)
    wanted = global_batches(config(local), 1, 0, 5)
    (tmp_path / "set/index.json").unlink()
    index_shards(local, at=home)
    assert global_batches(config(local, index=home), 3, 0, 5) == wanted
    if ranges:
        assert global_batches(config(f"{url}/set", index={f"{url}/set": home}), 1, 0, 5) == wanted
        assert verify_shards(f"{url}/set", at=home) == []
    with pytest.raises(ConfigError, match=r"data\.index: file:///x is not a set of data\.url"):
        global_batches(config(local, index={"file:///x": home}), 1, 0, 1)
    with pytest.raises(ConfigError, match=r"data\.index: one folder for 2 sets"):
        global_batches(config({local: 1.0, f"{local}/": 2.0}, index=home), 1, 0, 1)
    with pytest.raises(ConfigError, match=r"data\.exclude_shards: leaves out all shards of file:.*/set"):
        global_batches(config(local, index=home, exclude_shards=tuple(f"s-00{i}.tar" for i in range(4))), 1, 0, 1)
