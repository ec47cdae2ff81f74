"""The `cpu` operator: wkv7_cpu.cpp, called on plain pointers. It knows float32 and float64; half types are cast.

wkv6_cpu.py does the same for WKV-6, through `bind`.
"""

import ctypes
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import build, op

HEADER = Path(__file__).with_name("cpu.h")
# The three about mathematics let the compiler add up a vector as a tree rather than number by number. NaN and inf keep
# their meaning, which -ffast-math would take.
FLAGS = ["-std=c++17", "-O3", "-fopenmp-simd", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math",
         "-pthread", "-shared", "-fPIC"]  # fmt: skip
SEGMENT = 16  # tokens from one saved state to the next; as in the C++

Kernels = tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]


def load() -> op.WKV7:
    """Compile, unless cached, and return the operator; BuildError if there is no working C++ compiler."""
    return op.register("cpu", *kernels(), new_saved, device="cpu", head_size=64)


def kernels() -> Kernels:
    """The pair (forward, backward) that op.py asks for."""
    return bind("wkv7", new_saved)


def new_saved(r: Tensor, state: Tensor) -> Tensor:
    """Uninitialised; per head and 16 tokens: the state before them (64 rows) and their vectors u = S a (16 rows)."""
    batch, time, heads, size = r.shape
    return state.new_empty(batch, heads, -(-time // SEGMENT), size + SEGMENT, size)


def bind(recurrence: str, new_saved: Callable[[Tensor, Tensor], Tensor]) -> Kernels:
    """The pair for a recurrence, from <recurrence>_cpu.cpp."""
    library = open_library(recurrence)

    def forward(*arguments):
        *inputs, state, save = arguments
        r = inputs[0]
        y, state_T = r.new_empty(r.shape, dtype=state.dtype), torch.empty_like(state)
        saved = new_saved(r, state) if save else state.new_empty(0)
        inputs = [x.to(state.dtype) for x in inputs]
        call(library, f"{recurrence}_forward", r.shape, [*inputs, state], [y, state_T, saved if save else None])
        return y.to(r.dtype), state_T, saved

    def backward(*arguments):
        *inputs, state, saved, dy, dstate = arguments
        r = inputs[0]
        grads = [x.new_empty(x.shape, dtype=state.dtype) for x in inputs]
        dstate0 = torch.empty_like(state)
        inputs = [x.to(state.dtype) for x in (*inputs, dy)]
        call(library, f"{recurrence}_backward", r.shape, [*inputs, saved, dstate], [*grads, dstate0])
        return *(grad.to(r.dtype) for grad in grads), dstate0

    return forward, backward


def open_library(recurrence: str = "wkv7") -> ctypes.CDLL:
    """Compiled, by $CXX or else c++, for this very processor, or, where the compiler does not know -march=native, for
    any of its kind."""
    name = f"{recurrence}_cpu"
    source = Path(__file__).with_name(f"{name}.cpp")
    try:
        compiler, *words = shlex.split(os.environ.get("CXX", "").strip() or "c++")
    except ValueError as error:
        raise build.BuildError(f"CXX={os.environ['CXX']}: {error}; set it to a compiler, {build.REMEDY}") from None
    try:
        return build.load(name, source, compiler, [*words, "-march=native", *FLAGS], [HEADER])
    except build.BuildError:
        return build.load(name, source, compiler, [*words, *FLAGS], [HEADER])


def call(
    library: ctypes.CDLL, name: str, shape: Sequence[int], inputs: Sequence[Tensor], outputs: Sequence[Tensor | None]
) -> None:
    """<name>_<dtype>(B, T, H, threads, array of input pointers, array of output pointers)."""
    function = library[f"{name}_{str(inputs[0].dtype).removeprefix('torch.')}"]
    function.restype = None
    batch, time, heads = (ctypes.c_long(size) for size in shape[:3])
    x, out = (
        (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))
        for tensors in (inputs, outputs)
    )
    function(batch, time, heads, torch.get_num_threads(), x, out)
