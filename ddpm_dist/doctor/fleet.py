"""Checks of the nodes beside one another: how many, what is equal on all, and the way from each to the next."""

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires

from ddpm_dist.cluster import NodePlace
from ddpm_dist.config import Config
from ddpm_dist.doctor.network import Link
from ddpm_dist.doctor.node import About
from ddpm_dist.doctor.rows import Check, Failed, Remark, Skipped, check

SLOW_BYTES_PER_S, HOPELESS_BYTES_PER_S = 125e6, 12.5e6
"""1 Gbit/s and 100 Mbit/s."""
CLOCK_S, CLOCK_REMARK_S = 60.0, 1.0


@dataclass(frozen=True)
class Fleet:
    """All nodes, after each has been looked at."""

    places: list[NodePlace]
    abouts: list[About]
    """Of those that answered."""
    silent: dict[str, str]
    """Why those that didn't answer didn't, by name."""
    links: dict[tuple[str, str], Link]
    """By (from, to)."""
    expected: int | None
    total: dict[str, float] | None
    cfg: Config | None


@check("nodes", "start Ray or the launcher on those that are missing (docs/cluster.md), or correct --nodes")
def nodes(fleet: Fleet) -> str:
    """As many as were expected, and each answers."""
    if fleet.expected is not None and len(fleet.places) < fleet.expected:
        raise Failed(f"{len(fleet.places)} are there, {fleet.expected} were expected (--nodes)")
    if fleet.silent:
        told = "; ".join(f"{name}: {why}" for name, why in fleet.silent.items())
        raise Failed(
            f"no answer from {len(fleet.silent)} of {len(fleet.places)}: {told}",
            "look at that node's Ray logs; install the same ddpm_dist there as here",
        )
    return f"{len(fleet.places)}: {', '.join(place.name for place in fleet.places)}"


@check("resources", "more nodes, fewer cluster.workers, or a smaller cluster.cpus_per_worker or gpus_per_worker")
def resources(fleet: Fleet) -> str:
    """Ray has room for the smallest number of workers."""
    if fleet.total is None or fleet.cfg is None:
        raise Skipped("nobody deals them out" if fleet.total is None else "no --config")
    low, cluster = fleet.cfg.worker_range[0], fleet.cfg.cluster
    found = []
    for name, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
        there = fleet.total.get(name, 0.0)
        if there < low * each:
            raise Failed(f"{low} workers need {low * each:g} {name}, the cluster has {there:g}")
        found.append(f"{there:g} {name}")
    return f"{', '.join(found)} for {low} workers"


@check("python", "the same Python on all nodes (3.11 or newer)")
def python(fleet: Fleet) -> str:
    """The same everywhere: what is sent from node to node is pickled."""
    return _alike({about.node: about.python for about in fleet.abouts})


@check("packages", "pip install -c constraints.txt . on the nodes that differ: the same versions everywhere")
def packages(fleet: Fleet) -> str:
    """Installed, the same everywhere, and as pinned where we touch what is inside."""
    pinned = _pinned()
    for package in fleet.abouts[0].packages:
        held = {about.node: about.packages[package] or "absent" for about in fleet.abouts}
        if "absent" in held.values():
            raise Failed(f"{package}: {_by_value(held)}")
        _alike(held, f"{package}: ")
        wrong = {node: v for node, v in held.items() if pinned.get(package, v) != v}
        if wrong:
            raise Failed(f"{package}: {_by_value(wrong)}, and {pinned[package]} is what this version works with")
    first = fleet.abouts[0].packages
    return ", ".join(f"{name} {first[name]}" for name in ("torch", "deepspeed", "ray", "webdataset"))


@check("code", "the same checkout or wheel of ddpm_dist on all nodes")
def code(fleet: Fleet) -> str:
    """The package's files are the same everywhere."""
    return _alike({about.node: about.code for about in fleet.abouts})


@check("GPUs alike", "workers on one kind of node: a step is as slow as the slowest, and bits differ between kinds")
def alike(fleet: Fleet) -> str:
    """One kind of GPU and one driver."""
    kinds = {about.node: ", ".join(sorted(set(about.gpus))) for about in fleet.abouts if about.gpus}
    if len(kinds) < 2:
        raise Skipped("fewer than two nodes with GPUs")
    try:
        return _alike(kinds)
    except Failed as found:
        raise Remark(found.found) from None


@check("MTU", "the same MTU on the interfaces of all nodes, and on the switch: large packets are lost in silence else")
def mtu(fleet: Fleet) -> str:
    """Of the interface that holds each node's address."""
    sizes = {about.node: str(about.mtu) for about in fleet.abouts if about.mtu}
    if len(sizes) < 2:
        raise Skipped("fewer than two nodes on a network")
    return _alike(sizes)


@check("connections", "let the nodes reach one another on all ports from 1024 on (firewall, security group)")
def connections(fleet: Fleet) -> str:
    """A port that one opens is reached by another; gloo, NCCL and Ray take whichever are free."""
    if not fleet.links:
        raise Skipped("one node")
    for (here, there), link in fleet.links.items():
        if link.error:
            raise Failed(f"from {here} to {there}: {link.error}")
    return f"{len(fleet.links)} tried, each node to the next"


@check("bandwidth", "look at cables, switch and instance type; fewer, fuller nodes; a larger train.global_batch")
def bandwidth(fleet: Fleet) -> str:
    """A second of bytes over one TCP connection from each node to the next, all at once."""
    rates = {pair: link.bytes_per_s for pair, link in fleet.links.items() if not link.error}
    if not rates:
        raise Skipped("one node" if not fleet.links else "no connection")
    (here, there), least = min(rates.items(), key=lambda item: item[1])
    text = f"at least {least / 1e6:,.0f} MB/s (from {here} to {there})"
    if least < HOPELESS_BYTES_PER_S:
        raise Failed(text)
    if least < SLOW_BYTES_PER_S:
        raise Remark(text)
    return text


@check("clocks", "start chrony, ntpd or systemd-timesyncd on the nodes that are off")
def clocks(fleet: Fleet) -> str:
    """Of each node beside the next."""
    ahead = {pair: link.clock_ahead_s for pair, link in fleet.links.items() if not link.error}
    if not ahead:
        raise Skipped("one node" if not fleet.links else "no connection")
    (here, there), most = max(ahead.items(), key=lambda item: abs(item[1]))
    text = f"{there} is {abs(most):.1f} s {'ahead of' if most > 0 else 'behind'} {here}"
    if abs(most) > CLOCK_S:
        raise Failed(text)
    if abs(most) > CLOCK_REMARK_S:
        raise Remark(text)
    return "agree to a second"


BESIDE: tuple[Check[Fleet], ...] = (python, packages, code, alike, mtu, connections, bandwidth, clocks)
"""Of nodes that answered."""


def _alike(values: Mapping[str, str], what: str = "") -> str:
    """The one value of all nodes; Failed with who has which."""
    if len(set(values.values())) > 1:
        raise Failed(f"{what}{_by_value(values)}")
    return next(iter(values.values()))


def _by_value(values: Mapping[str, Hashable]) -> str:
    nodes_by: dict[Hashable, list[str]] = defaultdict(list)
    for node, value in values.items():
        nodes_by[value].append(node)
    fewest_last = sorted(nodes_by.items(), key=lambda item: -len(item[1]))
    return ", ".join(f"{value} on {', '.join(names[:4])}{' …' if names[4:] else ''}" for value, names in fewest_last)


def _pinned() -> dict[str, str]:
    """{package: version} of what our own metadata asks for exactly; nothing where we are a checkout."""
    try:
        asked = requires("ddpm_dist") or []
    except PackageNotFoundError:
        return {}
    exact = (requirement.partition(";")[0].partition("==") for requirement in asked)
    return {name.partition("[")[0].strip(): version.strip() for name, equals, version in exact if equals}
