"""DeepSpeed behind one class, the pieces of the parameters that a rank holds, and who this process is.

The only room that imports DeepSpeed or makes process groups. It never reads or writes a store, and never hears of data,
of diffusion or of Ray.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.engine.checks import INFINIBAND as INFINIBAND, SHM as SHM, SHM_BYTES as SHM_BYTES
    from ddpm_dist.engine.engine import (
        LOWEST_LOSS_SCALE as LOWEST_LOSS_SCALE,
        Engine as Engine,
        StepReport as StepReport,
    )
    from ddpm_dist.engine.launchers import check_single as check_single, launched as launched
    from ddpm_dist.engine.pieces import (
        Address as Address,
        Piece as Piece,
        bytes_of as bytes_of,
        gather_full as gather_full,
    )
    from ddpm_dist.engine.start import (
        MAX_BUCKET_ELEMENTS as MAX_BUCKET_ELEMENTS,
        PERSISTENT_ELEMENTS as PERSISTENT_ELEMENTS,
    )
    from ddpm_dist.engine.world import (
        World as World,
        broadcast_object as broadcast_object,
        gather_objects as gather_objects,
        gather_tensor as gather_tensor,
        init_world as init_world,
        interface_of as interface_of,
        own_address as own_address,
        use_interface_of as use_interface_of,
    )

__all__, _asked = lazily(
    __name__,
    checks="INFINIBAND SHM SHM_BYTES",
    engine="Engine LOWEST_LOSS_SCALE StepReport",
    launchers="check_single launched",
    pieces="Address Piece bytes_of gather_full",
    start="MAX_BUCKET_ELEMENTS PERSISTENT_ELEMENTS",
    world="World broadcast_object gather_objects gather_tensor init_world interface_of own_address use_interface_of",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
