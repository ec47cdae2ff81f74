"""The `cuda` operator: for bf16 the fast mode, wkv7_fast.cu, for fp32 and fp16 the precise one, wkv7.cu.

Training in bf16 thus gets the tensor cores, whose rounding costs about as much as that of its inputs did; fp32 asks for
accuracy, and fp16 for a range that the chunks' factors leave. `cuda_precise` is the precise mode for all three.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import chunk, cuda_precise, fast, op
from .nvcc import DTYPES, check_gpu, open_library


def load(ready: bool = True) -> op.WKV7:
    """The operator, both modes compiled now unless cached; BuildError without a GPU or nvcc, or if they err.

    Without `ready` nothing is compiled and no GPU is asked for: then it runs on meta and fake tensors.
    """
    if ready:
        capability = check_gpu("cuda")
        open_library(cuda_precise.SOURCE, cuda_precise.bind, capability)
        if capability >= fast.CAPABILITY:
            open_library(fast.SOURCE, fast.bind, capability, *fast.FLAGS)
        op.verify("cuda", *kernels(), chunk.differs)
    return operator()


@functools.cache
def operator() -> op.WKV7:
    """The operator, registered once; its libraries are opened when it is first called."""
    return op.register("cuda", *kernels(), new_saved, device="cuda", dtypes=DTYPES, head_size=fast.N)


def kernels() -> tuple[Callable, Callable]:
    """The pair (forward, backward) of op.py's contract."""
    precise, quick = cuda_precise.kernels(cuda_precise.library), fast.kernels(fast.library)

    def forward(r, *arguments):
        return (quick if is_fast(r) else precise)[0](r, *arguments)

    def backward(r, *arguments):
        return (quick if is_fast(r) else precise)[1](r, *arguments)

    return forward, backward


def is_fast(r: Tensor) -> bool:
    """Whether the fast mode computes this; of a tensor without values, on the GPU at hand, or on a newer one."""
    if r.dtype != torch.bfloat16 or not torch.cuda.is_available():
        return r.dtype == torch.bfloat16
    return torch.cuda.get_device_capability(r.device if r.is_cuda else None) >= fast.CAPABILITY


def new_saved(r: Tensor, state: Tensor) -> Tensor:
    """What the mode in question saves."""
    return (fast if is_fast(r) else cuda_precise).new_saved(r, state)
