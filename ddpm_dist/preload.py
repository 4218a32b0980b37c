"""What a standby imports before it forks: all that a rank or a sampling worker needs, also what others import late.

`tests/cluster/test_standby.py` lists what a child still imports by itself, and so keeps this complete.
"""

import contextlib
import importlib

from ddpm_dist import storage

MODULES = (
    "torch",
    "torch._dynamo",
    "torch.profiler",
    "torch.profiler._cupti_monitor",
    "deepspeed",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "encodings.idna",
    "numpy.ctypeslib",
    "numpy.ma",
    "pydantic.dataclasses",
    "PIL.PngImagePlugin",
    "PIL.JpegImagePlugin",
    "ddpm_dist.storage.objects",
    "ddpm_dist.storage.once",
    "ddpm_dist.engine.engine",
    "ddpm_dist.training.entry",
    "ddpm_dist.sampling.worker",
    "ddpm_dist.evaluation.worker",
)


def everything() -> None:
    """Imports and reads; makes no thread, no connection, no group, and doesn't touch CUDA."""
    for name in MODULES:
        with contextlib.suppress(ImportError):  # a child that needs what isn't installed says so itself
            importlib.import_module(name)
    from PIL import Image

    Image.preinit()
    with contextlib.suppress(ImportError):  # where nobody reads from S3, its packages need not be there
        storage.preload()
