"""What a standby is made of: two that have the same key run the same code, and the same was read at their import."""

import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

_AT_IMPORT = (
    "ATEN", "DS_", "GOTO", "KINETO", "KMP_", "LD_", "MALLOC", "MKL", "NUMEXPR", "OMP_", "OPENBLAS", "PYTHON", "PYTORCH",
    "TORCH", "GLIBC_", "CUDA_MODULE",
)  # fmt: skip
"""Beginnings of names of the environment that something reads when it is imported."""
SET_FOR_IMPORT = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""A parent that has run with two threads makes its child hang, which sets its own number; and with NVML's check torch
sees whether there is a GPU without touching it."""


def key(preload: str, environment: Mapping[str, str]) -> str:
    """Names what a standby is made of: who may use one that is there is who gets the same name."""
    at_import = sorted((n, v) for n, v in environment.items() if n.startswith(_AT_IMPORT) and n not in SET_FOR_IMPORT)
    packages = [os.stat(sysconfig.get_path(kind)).st_mtime_ns for kind in ("purelib", "platlib")]
    sees_gpus = environment.get("CUDA_VISIBLE_DEVICES") not in ("", "-1", "NoDevFiles")
    parts = [
        os.getuid(), sys.executable, sys.version, preload, os.getcwd(), sys.path, package_hash(), packages, at_import,
        sees_gpus,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def package_hash() -> str:
    """Of the names and contents of the package's files."""
    spec = importlib.util.find_spec("ddpm_dist")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    digest = hashlib.sha256()
    for root in spec.submodule_search_locations:
        for path in sorted(Path(root).rglob("*.py")):
            data = path.read_bytes()
            digest.update(f"{path}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()
