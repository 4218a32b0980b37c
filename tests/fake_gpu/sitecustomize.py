"""A GPU that isn't there: each process with this folder on its PYTHONPATH sees one, and who uses it fails.

As on a real machine with one H100, torch says that there is a GPU unless CUDA_VISIBLE_DEVICES is empty. So whoever
decides by what is visible, instead of by the configuration, is caught at his first tensor.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any


class _Watch(importlib.abc.MetaPathFinder):
    """Alters torch as soon as it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _show_a_gpu(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _visible() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def _show_a_gpu(torch: Any) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132
    )
    torch.version.cuda = "13.0"
    torch.backends.cuda.is_built = lambda: True
    torch.backends.cudnn.is_available = lambda: True
    torch.cuda.is_available = _visible
    torch.cuda.device_count = lambda: int(_visible())
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_device_name = lambda *_: properties.name
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: properties
    torch.accelerator.is_available = _visible
    torch.accelerator.device_count = lambda: int(_visible())
    torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cuda") if _visible() else None


sys.meta_path.insert(0, _Watch())
