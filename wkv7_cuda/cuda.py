"""The `cuda` operator: for bf16 the fast mode, wkv7_fast.cu, for fp32 and fp16 the precise one, wkv7.cu.

Training in bf16 thus gets the tensor cores, whose rounding costs about as much as that of its inputs did; fp32 asks for
accuracy, and fp16 for a range that the chunks' factors leave. `cuda_precise` is the precise mode for all three.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import build, chunk, cuda_precise, fast, op
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
        verify(*kernels(), "cuda")
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


def verify(forward: Callable, backward: Callable, device: str, differs: Callable[..., float] = chunk.differs) -> None:
    """A look at what was compiled, for this GPU and by this nvcc, before a run is trusted to it."""
    for dtype, bar in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        error = differs((forward, backward), dtype, device)
        if not error < bar:
            problem = f"the cuda operator computes wrongly on this GPU: in {dtype} it is off by {error:.1e}"
            raise build.BuildError(f"{problem}: please report it with nvidia-smi and nvcc --version, {build.REMEDY}")


def is_fast(r: Tensor) -> bool:
    """Whether the fast mode computes this."""
    if r.dtype != torch.bfloat16:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(r.device) >= fast.CAPABILITY


def new_saved(r: Tensor, state: Tensor) -> Tensor:
    """What the mode in question saves."""
    return (fast if is_fast(r) else cuda_precise).new_saved(r, state)
