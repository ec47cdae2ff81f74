"""Packaging. Nothing is compiled here: operators are built when first used, so installing needs no torch."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
source = (here / "pissa_rwkv.py").read_text("utf-8")

setup(
    name="pissa_rwkv",
    version=re.search(r'^__version__ = "(.+)"$', source, re.M)[1],
    description="Fine-tune RWKV language models with PiSSA, in one readable PyTorch module",
    long_description=(here / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    py_modules=["pissa_rwkv", "merge"],
    packages=["wkv7_cuda"],
    package_data={"wkv7_cuda": ["*.cu", "*.cuh", "*.cpp", "*.h", "*.md"]},
    install_requires=["torch>=2.10", "ninja", "numpy", "tqdm"],
    extras_require={
        "test": [
            "pytest", "pytest-xdist", "rwkv==0.8.32", "triton", "ruff==0.17.6", "safetensors", "matplotlib",
            "bitsandbytes==0.50.2", "Pillow", "wandb",
        ],
        "tokenizer": ["rwkv"],
        "plot": ["matplotlib"],
        "wandb": ["wandb"],
        "image": ["Pillow"],
        "triton": ["triton"],
        "cuda": ["cuda-toolkit[nvcc,cccl]"],
        "fla": ["flash-linear-attention"],
    },
    entry_points={"console_scripts": ["pissa_rwkv=pissa_rwkv:main", "pissa_rwkv_merge=merge:main"]},
)
