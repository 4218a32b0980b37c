"""Sampling jobs: idempotent units of images, each a function of (snapshot, settings, seed, index).

A job that is started again does what is missing and nothing else. The room never trains, and never judges images.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.sampling.export import export_npz as export_npz, export_png as export_png
    from ddpm_dist.sampling.folder import duplicates_in as duplicates_in
    from ddpm_dist.sampling.images import grid_png as grid_png
    from ddpm_dist.sampling.plan import Labels as Labels, Manifest as Manifest
    from ddpm_dist.sampling.worker import SampleWorker as SampleWorker

__all__, _asked = lazily(
    __name__,
    modules="job",
    export="export_npz export_png",
    folder="duplicates_in",
    images="grid_png",
    plan="Labels Manifest",
    worker="SampleWorker",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
