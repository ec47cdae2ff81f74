"""The `cuda` operator of WKV-6: wkv6.cu, built by nvcc for the device at hand and called on plain pointers.

bf16 gets the tensor cores' plain products; fp32 and fp16 the same walk with every factor in two parts, 16 bits.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import build, op, wkv6_chunk
from .fast import multiprocessors_of, segment_chunks
from .nvcc import DTYPES, aligned, call, check_gpu, open_library

SOURCE = Path(__file__).with_name("wkv6.cu")
CAPABILITY = (8, 0)  # bf16 on tensor cores, cp.async
N = 64  # head size
L = 32  # tokens of a chunk, in two steps


def load(ready: bool = True) -> op.WKV6:
    """The operator, compiled now unless cached; BuildError without a GPU of sm_80 or nvcc, or if it errs.

    Without `ready` nothing is compiled and no GPU is asked for: then it runs on meta and fake tensors.
    """
    if ready:
        capability = check_gpu("cuda")
        if capability < CAPABILITY:
            found = "sm_{}{}".format(*capability)
            raise build.BuildError(
                f"the cuda operator of wkv6 needs a GPU of sm_80, not {found}: use another, {build.REMEDY}"
            )
        open_library(SOURCE, bind, capability)
        op.verify("cuda", *kernels(library), wkv6_chunk.differs)
    return operator()


@functools.cache
def operator() -> op.WKV6:
    """The operator, registered once; its library is opened when it is first called."""
    return op.register(
        "cuda", *kernels(library), new_saved, recurrence="wkv6", device="cuda", dtypes=DTYPES, head_size=N
    )


def library(device: torch.device) -> ctypes.CDLL:
    """The library for a GPU, bound."""
    return open_library(SOURCE, bind, torch.cuda.get_device_capability(device))


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the C interface that the end of wkv6.cu defines."""
    sizes, pointer = [ctypes.c_int, *[ctypes.c_int64] * 4], ctypes.c_void_p
    library.wkv6_forward.argtypes = [*sizes, *[pointer] * 7]
    library.wkv6_backward.argtypes = [*sizes, *[pointer] * 9]
    library.wkv6_error.argtypes, library.wkv6_error.restype = [ctypes.c_int], ctypes.c_char_p
    return library


def kernels(library_for: Callable[[torch.device], ctypes.CDLL], plan: Callable[[int, int, int], int] = segment_chunks):
    """The pair (forward, backward) of op.py's contract. library_for: a bound library that can work on a device."""

    def sizes_and_scratch(r: Tensor, state: Tensor) -> tuple[list[int], int, Tensor]:
        batch, time, heads, _ = r.shape
        chunks = -(-time // L)
        length = min(plan(batch * heads, chunks, multiprocessors_of(r.device)), chunks)
        segments = -(-chunks // length)
        scratch = state.new_empty(batch * heads * segments * (N + 1) * N if segments > 1 else 0)
        return [DTYPES.index(r.dtype), batch, time, heads, length], segments, scratch

    def forward(r, w, k, v, u, state, save):
        y, state_T = torch.empty_like(r), torch.empty_like(state)
        saved = new_saved(r, state) if save else state.new_empty(0)
        inputs, state = [aligned(x) for x in (r, w, k, v, u)], aligned(state)
        sizes, _, scratch = sizes_and_scratch(r, state)
        call(library_for(r.device), "wkv6_forward", r, sizes, inputs, state, y, state_T, saved if save else None,
             scratch)  # fmt: skip
        return y, state_T, saved

    def backward(r, w, k, v, u, state, saved, dy, dstate):
        inputs, saved, dy, dstate = [aligned(x) for x in (r, w, k, v, u)], aligned(saved), aligned(dy), aligned(dstate)
        grads, dstate0 = [torch.empty_like(r) for _ in range(4)], torch.empty_like(state)
        sizes, segments, scratch = sizes_and_scratch(r, state)
        du = state.new_empty(r.shape[0], r.shape[2], segments, 2, N)
        call(library_for(r.device), "wkv6_backward", r, sizes, inputs, saved, dy, dstate, grads, du, dstate0, scratch)
        return (*grads, du.sum((0, 2, 3)).to(u.dtype), dstate0)

    return forward, backward


def new_saved(r: Tensor, state: Tensor) -> Tensor:
    """Room for the state before every chunk, in bf16 or twice that; its order is the kernel's."""
    batch, time, heads, _ = r.shape
    like = r if r.dtype == torch.bfloat16 else state
    return like.new_empty(batch * heads * -(-time // L) * N * N)
