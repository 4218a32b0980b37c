"""Network and process to and from a diffusers folder, and the names that others give to the same parameters.

A snapshot is what is needed to sample, and no more. This room never writes a training state, and never guesses: what a
folder doesn't say is refused by name.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.snapshot.fitting import Task as Task, changes as changes, fit as fit
    from ddpm_dist.snapshot.folder import (
        INDEX as INDEX,
        build as build,
        check_folder as check_folder,
        diffusion_in as diffusion_in,
        load_info as load_info,
        load_snapshot as load_snapshot,
        network_in as network_in,
        notes_on as notes_on,
        save_snapshot as save_snapshot,
        snapshot_id as snapshot_id,
    )
    from ddpm_dist.snapshot.foreign import (
        Foreign as Foreign,
        in_cache as in_cache,
        read_file as read_file,
        read_folder as read_folder,
        read_npz as read_npz,
    )
    from ddpm_dist.snapshot.recipes import (
        check_describable as check_describable,
        keys_of_network as keys_of_network,
        keys_of_process as keys_of_process,
        network_of as network_of,
        open_keys_of as open_keys_of,
        reconcile as reconcile,
    )
    from ddpm_dist.snapshot.told import Told as Told

__all__, _asked = lazily(
    __name__,
    fitting="Task changes fit",
    folder="INDEX build check_folder diffusion_in load_info load_snapshot network_in notes_on save_snapshot "
    "snapshot_id",
    foreign="Foreign in_cache read_file read_folder read_npz",
    told="Told",
    recipes="check_describable keys_of_network keys_of_process network_of open_keys_of reconcile",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
