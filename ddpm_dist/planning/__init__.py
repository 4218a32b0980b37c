"""What a run needs and takes, before it starts: memory, traffic, time, states, failures.

Arithmetic on a recipe, a table of cards and constants that say where they are from; networks are counted, not
estimated. It never looks at a machine, starts anything or reads a store.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.planning.cards import CARDS as CARDS, card_named as card_named
    from ddpm_dist.planning.checkpoint import state_bytes as state_bytes
    from ddpm_dist.planning.failures import CONSTANTS as CONSTANTS
    from ddpm_dist.planning.memory import memory_of as memory_of
    from ddpm_dist.planning.network import count as count
    from ddpm_dist.planning.picture import as_svg as as_svg
    from ddpm_dist.planning.plan import (
        Plan as Plan,
        advice as advice,
        otherwise as otherwise,
        plan_of as plan_of,
        scenario_of as scenario_of,
    )
    from ddpm_dist.planning.simulation import Outcome as Outcome, simulate as simulate
    from ddpm_dist.planning.step import Setting as Setting
    from ddpm_dist.planning.words import as_dict as as_dict, as_text as as_text, simulation_text as simulation_text

__all__, _asked = lazily(
    __name__,
    cards="CARDS card_named",
    checkpoint="state_bytes",
    failures="CONSTANTS",
    memory="memory_of",
    network="count",
    picture="as_svg",
    plan="Plan advice otherwise plan_of scenario_of",
    simulation="Outcome simulate",
    step="Setting",
    words="as_dict as_text simulation_text",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
