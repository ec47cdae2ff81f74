"""WKV-7 operators, each `f(r, w, k, v, a, b, state) -> (y, state_T)`; shapes and dtypes are in op.py.

    wkv7 = wkv7_cuda.load("cpu")        # compiles on first use, a few seconds, kept in a cache

| op | what | needs |
|---|---|---|
| `cuda` | bf16: chunks on tensor cores, wkv7_fast.cu; else `cuda_precise` | an NVIDIA GPU, nvcc |
| `cuda_precise` | the recurrence in fp32, wkv7.cu | an NVIDIA GPU, nvcc |
| `triton` | the chunk algorithm in Triton, wkv7_triton.py | a GPU, the package triton |
| `fla` | chunk_rwkv7 of flash-linear-attention | a GPU, that package |
| `cpu` | the recurrence in C++, wkv7_cpu.cpp | a C++ compiler |
| `chunk` | the chunk algorithm in PyTorch, chunk.py | nothing; any device and head size |

Importing this package compiles nothing and reads no environment variable.
"""

import functools
import importlib

from .build import BuildError
from .op import WKV7

__all__ = ["OPS", "BuildError", "load"]

OPS = ("cuda", "cuda_precise", "triton", "fla", "cpu", "chunk")


@functools.cache
def load(op: str, **options: bool) -> WKV7:
    """The operator of that name, compiled if need be. ValueError: no such op; BuildError: it cannot be built here.

    load("cuda", ready=False) compiles nothing and needs no GPU: for meta and fake tensors, that is for counting bytes.
    """
    if op not in OPS:
        raise ValueError(f"wkv7 has no operator {op!r}; it has {list(OPS)}")
    return importlib.import_module(f".{op}", __name__).load(**options)
