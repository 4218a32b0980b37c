"""The whole examination: nodes, each by itself, the way between them, and what they have in common."""

from dataclasses import dataclass

from ddpm_dist.config import Config
from ddpm_dist.doctor import fleet, network
from ddpm_dist.doctor.groups import Group, group
from ddpm_dist.doctor.network import Link
from ddpm_dist.doctor.node import About, examine_node
from ddpm_dist.doctor.rows import Asked, Row, State
from ddpm_dist.errors import ClusterError
from ddpm_dist.recipe import dump_config

RAY_OR_LAUNCHER = (
    "start Ray (docs/cluster.md) or correct RAY_ADDRESS and its token; unset RANK, WORLD_SIZE, LOCAL_RANK, \
MASTER_ADDR and MASTER_PORT where no launcher set them (docs/launchers.md)"
)


@dataclass(frozen=True)
class Examination:
    """All rows, and what each node said of itself."""

    rows: list[Row]
    nodes: list[About]
    speaks: bool = True
    """Whether this process is the one that prints."""

    @property
    def failed(self) -> int:
        """Rows that failed."""
        return sum(row.state is State.FAILED for row in self.rows)


def examine(cfg: Config | None = None, expected: int | None = None) -> Examination:
    """Looks at the nodes of RAY_ADDRESS, of a launcher, or at this one. expected: how many nodes there should be.

    Takes some seconds, and up to minutes where something doesn't answer. Under a launcher, a collective.
    """
    try:
        with group() as nodes:
            return _examine(nodes, cfg, expected)
    except ClusterError as error:
        return Examination([Row("cluster", "", State.FAILED, str(error), RAY_OR_LAUNCHER)], [])


def _examine(nodes: Group, cfg: Config | None, expected: int | None) -> Examination:
    asked = _asked(nodes, cfg)
    answers = nodes.call(
        examine_node, [(one, place.name, place.address) for one, place in zip(asked, nodes.places, strict=True)]
    )
    abouts, rows, silent = [], [], {}
    for place, answer in zip(nodes.places, answers, strict=True):
        if isinstance(answer, Exception):
            silent[place.name] = f"{type(answer).__name__}: {answer}".partition("\n")[0]
        else:
            abouts.append(answer[0])
            rows += answer[1]
    links = _links(nodes) if len(nodes.places) > 1 else {}
    whole = fleet.Fleet(nodes.places, abouts, silent, links, expected, nodes.total(), cfg)
    checks = (fleet.nodes, fleet.resources, *(fleet.BESIDE if abouts else ()))
    return Examination([*(one.row(whole) for one in checks), *rows], abouts, nodes.speaks)


def _asked(nodes: Group, cfg: Config | None) -> list[Asked]:
    """Of each node. Workers come to those that have what one of them takes."""
    recipe = None if cfg is None else dump_config(cfg)
    works = [
        not nodes.under_ray
        or cfg is None
        or (place.cpus >= cfg.cluster.cpus_per_worker and place.gpus >= cfg.cluster.gpus_per_worker)
        for place in nodes.places
    ]
    first = works.index(True) if True in works else 0
    return [
        Asked(recipe, max(1, sum(works)), work, nodes.under_ray, first=at == first) for at, work in enumerate(works)
    ]


def _links(nodes: Group) -> dict[tuple[str, str], Link]:
    """Each node to the next, all at once, as a ring of collectives would."""
    places = nodes.places
    ports = nodes.call(network.listen, [(place.address,) for place in places])
    following = [(at + 1) % len(places) for at in range(len(places))]
    targets = [(places[to].address, ports[to] if isinstance(ports[to], int) else 0) for to in following]
    found = nodes.call(network.probe, targets)
    return {
        (places[at].name, places[to].name): link if isinstance(link, Link) else Link(str(link).partition("\n")[0])
        for (at, to), link in zip(enumerate(following), found, strict=True)
    }
