"""WKV operators: WKV-7, `f(r, w, k, v, a, b, state) -> (y, state_T)`, and WKV-6, `f(r, w, k, v, u, state) -> ...`,
which is also RWKV-5's; shapes and dtypes are in op.py.

    wkv7 = wkv7_cuda.load("cpu")        # compiles on first use, a few seconds, kept in a cache
    wkv6 = wkv7_cuda.load("cpu", "wkv6")

| op | what | needs |
|---|---|---|
| `cuda` | bf16: chunks on tensor cores, wkv7_fast.cu; else `cuda_precise`. WKV-6: wkv6.cu | an NVIDIA GPU, nvcc |
| `cuda_precise` | the recurrence in fp32, wkv7.cu | an NVIDIA GPU, nvcc |
| `triton` | the chunk algorithm in Triton, wkv7_triton.py | a GPU, the package triton |
| `fla` | chunk_rwkv7, chunk_rwkv6 of flash-linear-attention | a GPU, that package |
| `cpu` | the recurrence in C++, wkv7_cpu.cpp, wkv6_cpu.cpp | a C++ compiler |
| `chunk` | the chunk algorithm in PyTorch, chunk.py, wkv6_chunk.py | nothing; any device and head size |

Which of them a recurrence has is in OPS. Importing this package compiles nothing and reads no environment variable.
"""

import functools
import importlib

from .build import BuildError
from .op import WKV6, WKV7, Misfit, is_out_of_memory

__all__ = ["OPS", "BuildError", "Misfit", "is_out_of_memory", "load"]

OPS = {  # recurrence -> op -> its module
    "wkv7": {op: op for op in ("cuda", "cuda_precise", "triton", "fla", "cpu", "chunk")},
    "wkv6": {op: f"wkv6_{op}" for op in ("cuda", "fla", "cpu", "chunk")},
}


def load(op: str, recurrence: str = "wkv7", **options: bool) -> WKV7 | WKV6:
    """The operator of that name, compiled if need be. ValueError: no such op; BuildError: it cannot be built here.

    load("cuda", ready=False) compiles nothing and needs no GPU: for meta and fake tensors, that is for counting bytes;
    `cuda_precise` and `chunk` take it too.
    """
    if recurrence not in OPS:
        raise ValueError(f"unknown recurrence {recurrence!r}; choose from {list(OPS)}")
    if op not in OPS[recurrence]:
        raise ValueError(f"{recurrence} has no operator {op!r}; choose from {list(OPS[recurrence])}")
    return _load(OPS[recurrence][op], **options)


@functools.cache
def _load(module: str, **options: bool) -> WKV7 | WKV6:
    return importlib.import_module(f".{module}", __name__).load(**options)
