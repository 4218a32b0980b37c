"""The way of a driver into a Ray cluster."""

import os

import ray

from ddpm_dist.errors import ClusterError


def connect_ray() -> None:
    """Joins the cluster of RAY_ADDRESS (a Ray job has it), or starts a Ray on this machine alone."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address=address or "local", include_dashboard=None if address else False, log_to_driver=True)
    except ConnectionError as error:
        raise ClusterError(
            f"RAY_ADDRESS is {address!r}, and no Ray answers there: {error}; start one with `ray start --head`, "
            "or unset it to work on this machine alone"
        ) from None
    except Exception as error:  # Ray raises bare exceptions where its own processes don't come up in time
        raise ClusterError(
            f"Ray doesn't start on this machine: {error}; is it overloaded, or its memory full?"
        ) from error
