"""The `cuda` operator: wkv7.cu, built by nvcc for the device at hand and called on plain pointers.

The library contains no torch header: its build takes seconds, and nvcc's CUDA version need not be torch's (the runtime
is linked statically; the driver must only be new enough for both). The tests compile the same wkv7.cu for the CPU and
call it through the same `kernels` below: argument order, saved layout and allocation are thus tested without a GPU.
"""

import contextlib
import ctypes
import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import build, op

SOURCE = Path(__file__).with_name("wkv7.cu")
HEADERS = [SOURCE.with_name("device.cuh")]
FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the place is the code in the C interface
N = 64  # head size
CHUNK = 16  # tokens from one saved state to the next, as in wkv7.cu


def load() -> op.WKV7:
    """Compile, unless cached, and return the operator; BuildError without a GPU or a working nvcc."""
    if not torch.cuda.is_available():
        problem = "the cuda operator needs an NVIDIA GPU and torch sees none"
        raise build.BuildError(f"{problem}: check nvidia-smi and that torch has CUDA, {build.REMEDY}")
    open_library(torch.cuda.get_device_capability())  # now, so that what fails fails here
    forward, backward = kernels(lambda device: open_library(torch.cuda.get_device_capability(device)))
    return op.register("cuda", forward, backward, new_saved, device="cuda", dtypes=DTYPES, head_size=N)


@functools.cache
def open_library(capability: tuple[int, int]) -> ctypes.CDLL:
    """The library for GPUs of this compute capability, for example (9, 0): an H100 or H200."""
    return bind(compiled("wkv7", SOURCE, capability))


def compiled(name: str, source: Path, capability: tuple[int, int]) -> ctypes.CDLL:
    """A .cu file of this folder as a library for GPUs of that compute capability."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"  # where the toolkit puts it; often not on PATH
    if not Path(nvcc).exists():
        raise build.BuildError(
            f"{source.name} needs nvcc, neither on PATH nor {nvcc}: install the CUDA toolkit, {build.REMEDY}"
        )
    arch = "sm_{}{}".format(*capability)
    return build.load(f"{name}_{arch}", source, nvcc, [*FLAGS, f"-arch={arch}"], HEADERS)


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the C interface that the end of wkv7.cu defines."""
    sizes, pointer = [ctypes.c_int, *[ctypes.c_int64] * 3], ctypes.c_void_p
    library.wkv7_forward.argtypes = [*sizes, *[pointer] * 6]
    library.wkv7_backward.argtypes = [*sizes, *[pointer] * 8]
    library.wkv7_error.argtypes, library.wkv7_error.restype = [ctypes.c_int], ctypes.c_char_p
    return library


def kernels(library_for: Callable[[torch.device], ctypes.CDLL]):
    """The pair (forward, backward) of op.py's contract. library_for: a bound library that can work on a device."""

    def forward(r, w, k, v, a, b, state, save):
        y, state_T = torch.empty_like(r), torch.empty_like(state)
        saved = new_saved(r, state) if save else state.new_empty(0)
        inputs, state = [aligned(x) for x in (r, w, k, v, a, b)], aligned(state)
        call(library_for(r.device), "forward", r, inputs, state, y, state_T, saved if save else None)
        return y, state_T, saved

    def backward(r, w, k, v, a, b, state, saved, dy, dstate):
        inputs, dy, dstate = [aligned(x) for x in (r, w, k, v, a, b)], aligned(dy), aligned(dstate)
        grads = [torch.empty_like(r) for _ in range(6)]
        dstate0, scratch = torch.empty_like(state), torch.empty_like(saved)
        call(library_for(r.device), "backward", r, inputs, saved, dy, dstate, grads, dstate0, scratch)
        return (*grads, dstate0)

    return forward, backward


def new_saved(r: Tensor, state: Tensor) -> Tensor:
    """Room for the state before every CHUNK tokens and then the vectors u of all tokens; layout in wkv7.cu."""
    batch, time, heads, _ = r.shape
    return state.new_empty(batch * heads * (-(-time // CHUNK) * N * N + time * N))


def aligned(x: Tensor) -> Tensor:
    """x, or its copy if it starts inside a 16-byte unit, the most that one thread reads at once."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def call(library: ctypes.CDLL, name: str, r: Tensor, *arguments: Tensor | list[Tensor] | None) -> None:
    """wkv7_<name>(dtype, B, T, H, pointers and arrays of pointers, stream); RuntimeError if the launch fails."""
    pointers = [
        None if x is None else x.data_ptr() if isinstance(x, Tensor)
        else (ctypes.c_void_p * len(x))(*(y.data_ptr() for y in x))
        for x in arguments
    ]  # fmt: skip
    with torch.cuda.device(r.device) if r.is_cuda else contextlib.nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if r.is_cuda else None
        code = getattr(library, f"wkv7_{name}")(DTYPES.index(r.dtype), *r.shape[:3], *pointers, stream)
    if code:
        raise RuntimeError(f"wkv7 cuda {name}: {library.wkv7_error(code).decode()} (CUDA error {code})")
