"""The way of a driver into a Ray cluster, or one sentence about what is in it."""

import getpass
import os
import socket
import time

import ray

from ddpm_dist.cluster.environment import METRICS_CLOSED
from ddpm_dist.cluster.upload import say_if_large
from ddpm_dist.errors import ClusterError

KNOCK_S = 15.0
"""How long a head may take to listen; Ray itself waits for it without a word, and long."""


def connect_ray() -> None:
    """Joins the cluster of RAY_ADDRESS (a Ray job has it), or starts a Ray on this machine alone.

    Raises ClusterError within half a minute if nobody listens there, if it is something else that does, or if it
    refuses this process; after Ray's own minute if no node of it lives on this machine.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    listens = _check_address(address) if address else False
    if not address:
        for name, value in METRICS_CLOSED.items():
            os.environ.setdefault(name, value)
    try:
        ray.init(address=address or "local", include_dashboard=None if address else False, log_to_driver=True)
    except ConnectionError as error:
        if listens:
            raise ClusterError(
                f"RAY_ADDRESS: the Ray at {address} refuses this process: its token ({_token()}) or its version (here "
                f"{ray.__version__}) is another (set the same RAY_AUTH_MODE and token on head, nodes and clients), or "
                "no node of it lives on this machine (`ray status` lists them; `ray start --address` joins)"
            ) from None
        raise ClusterError(
            f"RAY_ADDRESS is {address!r}, and no Ray answers there: {error}; start one with `ray start --head`, "
            "or unset it to work on this machine alone"
        ) from None
    except PermissionError as error:
        raise ClusterError(
            f"Ray's folder {error.filename} belongs to another user than {getpass.getuser()}; set RAY_TMPDIR to a "
            "folder of your own (a short path)"
        ) from None
    except Exception as error:  # Ray raises bare exceptions where its own processes don't come up in time
        where = f"joins {address} not" if address else "doesn't start on this machine"
        raise ClusterError(f"Ray {where}: {error}; is it overloaded, or its memory full?") from error
    say_if_large(ray.get_runtime_context().runtime_env.get("working_dir"))


def _check_address(address: str) -> bool:
    """Whether somebody listens at HOST:PORT of RAY_ADDRESS; ClusterError if not, or if it speaks HTTP. False for names
    that hold no such place ("auto", "local")."""
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS: {address} is a dashboard's address, which `ray job submit` takes as RAY_API_SERVER_ADDRESS; "
            "RAY_ADDRESS is HOST:6379"
        )
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return False
    deadline = time.monotonic() + KNOCK_S
    while True:
        try:
            said = _knock(host.strip("[]"), int(port))
            break
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, socket.gaierror):
                raise ClusterError(
                    f"RAY_ADDRESS: nobody listens at {address} ({error.strerror or error}); start a Ray there with "
                    "`ray start --head`, or unset it to work on this machine alone"
                ) from None
        time.sleep(0.5)
    if said.startswith(b"HTTP/1"):
        raise ClusterError(
            f"RAY_ADDRESS: a web server answers at {address}, as Ray's dashboard is one; RAY_ADDRESS is the head's "
            "HOST:6379, and the dashboard's is RAY_API_SERVER_ADDRESS"
        )
    return True


def _knock(host: str, port: int) -> bytes:
    """The first bytes that come for an HTTP/1 request; Ray's own ports speak HTTP/2, and hang up or say so."""
    with socket.create_connection((host, port), timeout=3.0) as connection:
        try:
            connection.settimeout(2.0)
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return connection.recv(16)
        except OSError:  # it listens, and that is all that was asked
            return b""


def _token() -> str:
    """Where this process has its token from, without the token."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
