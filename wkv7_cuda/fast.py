"""The fast mode of the `cuda` operator: wkv7_fast.cu, chunks on tensor cores, for bf16.

Exact enough for training in bf16: rounding its operands costs about as much as rounding its inputs did (README.md).
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .nvcc import aligned, call, open_library

SOURCE = Path(__file__).with_name("wkv7_fast.cu")
FLAGS = ("-ftz=true",)  # the factors' exponentials are far from the smallest numbers; without, each is guarded
CAPABILITY = (8, 0)  # bf16 on tensor cores, cp.async
N = 64  # head size
L = 32  # tokens of a chunk
MULTIPROCESSORS = 132  # of an H100 or H200; assumed where no GPU is there
SHORTEST = 2  # chunks of a segment


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the C interface that the end of wkv7_fast.cu defines."""
    sizes, pointer = [ctypes.c_int64] * 4, ctypes.c_void_p
    library.wkv7_fast_forward.argtypes = [*sizes, *[pointer] * 7]
    library.wkv7_fast_backward.argtypes = [*sizes, *[pointer] * 8]
    library.wkv7_fast_error.argtypes, library.wkv7_fast_error.restype = [ctypes.c_int], ctypes.c_char_p
    return library


def library(device: torch.device) -> ctypes.CDLL:
    """The library for a GPU, bound."""
    return open_library(SOURCE, bind, torch.cuda.get_device_capability(device), *FLAGS)


def multiprocessors_of(device: torch.device) -> int:
    """How many multiprocessors a card has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS


def segment_chunks(heads: int, chunks: int, multiprocessors: int = MULTIPROCESSORS) -> int:
    """How many chunks one block walks: so few that each multiprocessor gets two blocks, since a block waits a lot.

    But all chunks of a head if that makes only two segments: finding the state before them takes as long as they save.
    """
    length = max(SHORTEST, -(-chunks // max(1, 2 * multiprocessors // heads)))
    return length if chunks > 2 * length else chunks


def kernels(library_for: Callable[[torch.device], ctypes.CDLL], plan: Callable[[int, int, int], int] = segment_chunks):
    """The pair (forward, backward) of op.py's contract. library_for: a bound library that can work on a device."""

    def sizes_and_scratch(r: Tensor, state: Tensor) -> tuple[list[int], Tensor]:
        batch, time, heads, _ = r.shape
        chunks = -(-time // L)
        length = min(plan(batch * heads, chunks, multiprocessors_of(r.device)), chunks)
        segments = -(-chunks // length)
        scratch = state.new_empty(batch * heads, segments, 3, N, N) if segments > 1 else state.new_empty(0)
        return [batch, time, heads, length], scratch

    def forward(r, w, k, v, a, b, state, save):
        y, state_T = torch.empty_like(r), torch.empty_like(state)
        saved = new_saved(r, state) if save else state.new_empty(0)
        inputs, state = [aligned(x) for x in (r, w, k, v, a, b)], aligned(state)
        sizes, scratch = sizes_and_scratch(r, state)
        call(library_for(r.device), "wkv7_fast_forward", r, sizes, inputs, state, y, state_T, saved if save else None,
             scratch)  # fmt: skip
        return y, state_T, saved

    def backward(r, w, k, v, a, b, state, saved, dy, dstate):
        inputs, dy, dstate = [aligned(x) for x in (r, w, k, v, a, b)], aligned(dy), aligned(dstate)
        grads, dstate0 = [torch.empty_like(r) for _ in range(6)], torch.empty_like(state)
        sizes, scratch = sizes_and_scratch(r, state)
        saved = aligned(saved)
        call(library_for(r.device), "wkv7_fast_backward", r, sizes, inputs, saved, dy, dstate, grads, dstate0, scratch)
        return (*grads, dstate0)

    return forward, backward


def new_saved(r: Tensor, state: Tensor) -> Tensor:
    """Room for the state before every chunk, in bf16, N^2/L numbers per token and head; its order is the kernel's."""
    batch, time, heads, _ = r.shape
    return r.new_empty(batch * heads * -(-time // L) * N * N)
