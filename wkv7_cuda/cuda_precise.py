"""The `cuda_precise` operator: wkv7.cu, built by nvcc for the device at hand and called on plain pointers.

The tests compile the same wkv7.cu for the CPU and call it through the same `kernels`: argument order, saved layout and
allocation are thus tested without a GPU.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import chunk, op
from .nvcc import DTYPES, aligned, call, check_gpu, open_library

SOURCE = Path(__file__).with_name("wkv7.cu")
N = 64  # head size
CHUNK = 16  # tokens from one saved state to the next, as in wkv7.cu


def load(ready: bool = True) -> op.WKV7:
    """The operator, compiled now unless cached; BuildError without a GPU or a working nvcc, or if it errs.

    Without `ready` nothing is compiled and no GPU is asked for: then it runs on meta and fake tensors.
    """
    if ready:
        open_library(SOURCE, bind, check_gpu("cuda_precise"))
        op.verify("cuda_precise", *kernels(library), chunk.differs)
    return operator()


@functools.cache
def operator() -> op.WKV7:
    """The operator, registered once; its library is opened when it is first called."""
    return op.register("cuda_precise", *kernels(library), new_saved, device="cuda", dtypes=DTYPES, head_size=N)


def library(device: torch.device) -> ctypes.CDLL:
    """The library for a GPU, bound."""
    return open_library(SOURCE, bind, torch.cuda.get_device_capability(device))


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the C interface that the end of wkv7.cu defines."""
    sizes, pointer = [ctypes.c_int, *[ctypes.c_int64] * 3], ctypes.c_void_p
    library.wkv7_forward.argtypes = [*sizes, *[pointer] * 6]
    library.wkv7_backward.argtypes = [*sizes, *[pointer] * 8]
    library.wkv7_error.argtypes, library.wkv7_error.restype = [ctypes.c_int], ctypes.c_char_p
    return library


def kernels(library_for: Callable[[torch.device], ctypes.CDLL]):
    """The pair (forward, backward) of op.py's contract. library_for: a bound library that can work on a device."""

    def sizes(r):
        return DTYPES.index(r.dtype), *r.shape[:3]

    def forward(r, w, k, v, a, b, state, save):
        y, state_T = torch.empty_like(r), torch.empty_like(state)
        saved = new_saved(r, state) if save else state.new_empty(0)
        inputs, state = [aligned(x) for x in (r, w, k, v, a, b)], aligned(state)
        call(library_for(r.device), "wkv7_forward", r, sizes(r), inputs, state, y, state_T, saved if save else None)
        return y, state_T, saved

    def backward(r, w, k, v, a, b, state, saved, dy, dstate):
        inputs, saved, dy = [aligned(x) for x in (r, w, k, v, a, b)], aligned(saved), aligned(dy)
        grads, dstate = [torch.empty_like(r) for _ in range(6)], aligned(dstate)
        dstate0, scratch = torch.empty_like(state), torch.empty_like(saved)
        call(library_for(r.device), "wkv7_backward", r, sizes(r), inputs, saved, dy, dstate, grads, dstate0, scratch)
        return (*grads, dstate0)

    return forward, backward


def new_saved(r: Tensor, state: Tensor) -> Tensor:
    """Room for the state before every CHUNK tokens and then the vectors u of all tokens; layout in wkv7.cu."""
    batch, time, heads, _ = r.shape
    return state.new_empty(batch * heads * (-(-time // CHUNK) * N * N + time * N))
