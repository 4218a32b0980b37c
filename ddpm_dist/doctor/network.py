"""Checks of a node's network: its name, interface and port; and the way from node to node, tried for a second."""

import os
import socket
import struct
import threading
import time
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

from ddpm_dist.doctor.rows import Asked, Check, Failed, Remark, Skipped, check
from ddpm_dist.engine import interface_of

DEEPSPEEDS_PORT = 29500
PROBE_S = 1.0
CONNECT_S = 10.0
CHUNK = bytes(2**20)
HELLO = b"ddpm-doctor\n"
NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@check("host name", "add this node's address and name to /etc/hosts, or to the DNS that it asks")
def host_name(asked: Asked) -> str:
    """The name resolves, and not to an address that this node hasn't."""
    name = socket.gethostname()
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
    except OSError as error:
        raise Failed(f"{name} resolves to nothing ({error.strerror})") from None
    mine = _own_addresses()
    if not mine.intersection(addresses):
        raise Failed(f"{name} resolves to {', '.join(addresses)}, which no interface here has")
    return f"{name} is {', '.join(addresses)}"


@check(
    "interface", "unset GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (it is found by itself), or name one that is there"
)
def interface(asked: Asked) -> str:
    """Those that the environment names are there."""
    there = psutil.net_if_stats()
    for variable in NAMES:
        named = os.environ.get(variable, "")
        if named.startswith("^"):
            continue
        for name in filter(None, named.lstrip("=").split(",")):
            if name not in there and not (variable.startswith("NCCL") and any(real.startswith(name) for real in there)):
                raise Failed(f"{variable}={named}, and this node has {', '.join(sorted(there))}")
    chosen = [f"{variable}={os.environ[variable]}" for variable in NAMES if os.environ.get(variable)]
    return ", ".join(chosen) or "chosen by address: " + ", ".join(
        f"{name} (MTU {stats.mtu})" for name, stats in sorted(there.items()) if stats.isup and name != "lo"
    )


@check("port", "end who has it (`ss -ltnp` names it), or give another: MASTER_PORT, or deepspeed --master_port")
def port(asked: Asked) -> str:
    """The port at which a launcher's first process listens is free. Ray takes one that is."""
    if asked.under_ray or os.environ.get("WORLD_SIZE", "1") != "1":
        raise Skipped("Ray and a launcher that has started take a free one")
    wanted = os.environ.get("MASTER_PORT", "")
    if wanted and not wanted.isdecimal():
        raise Failed(f"MASTER_PORT={wanted!r} is no number")
    number = int(wanted or DEEPSPEEDS_PORT)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError as error:
            text = f"{number}: {error.strerror}"
            raise Failed(f"MASTER_PORT {text}") if wanted else Remark(f"deepspeed's default {text}") from None
    return f"{number} is free"


CHECKS: tuple[Check[Asked], ...] = (host_name, interface, port)


# From node to node


@dataclass(frozen=True)
class Link:
    """What came of a second of talking to another node."""

    error: str | None = None
    bytes_per_s: float = 0.0
    clock_ahead_s: float = 0.0
    """How far the other node's clock is ahead of this one's; right to half of a round trip."""


def listen(address: str) -> int:
    """Listens at an address of this node, in a thread that ends with the process; returns the port."""
    server = socket.create_server((address, 0), backlog=64)
    threading.Thread(target=_serve, args=(server,), daemon=True).start()
    return int(server.getsockname()[1])


def probe(address: str, number: int) -> Link:
    """Talks to who `listen`s there: PROBE_S seconds of bytes in one direction, and its clock."""
    try:
        with socket.create_connection((address, number), timeout=CONNECT_S) as connection:
            asked = time.time()
            connection.sendall(HELLO)
            (theirs,) = struct.unpack("!d", _exactly(connection, 8))
            answered = time.time()
            began = time.monotonic()
            while time.monotonic() < began + PROBE_S:
                connection.sendall(CHUNK)
            connection.shutdown(socket.SHUT_WR)
            (received,) = struct.unpack("!q", _exactly(connection, 8))
            return Link(None, received / (time.monotonic() - began), theirs - (asked + answered) / 2)
    except OSError as error:
        return Link(f"{address}:{number}: {error.strerror or error}")


def _serve(server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    try:
        with connection:
            connection.settimeout(CONNECT_S)
            if _exactly(connection, len(HELLO)) != HELLO:
                return
            connection.sendall(struct.pack("!d", time.time()))
            received, buffer = 0, bytearray(len(CHUNK))
            while count := connection.recv_into(buffer):
                received += count
            connection.sendall(struct.pack("!q", received))
    except OSError:
        pass  # who asked is gone, and says so


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise ConnectionResetError(0, "the other side hung up")
        data += part
    return data


def mtu(address: str) -> int | None:
    """Of the interface with an address of this node; None for loopback."""
    name = interface_of(address)
    return int(psutil.net_if_stats()[name].mtu) if name else None


def _own_addresses() -> set[str]:
    return {entry.address.partition("%")[0] for held in psutil.net_if_addrs().values() for entry in held} | {
        "127.0.1.1"
    }
