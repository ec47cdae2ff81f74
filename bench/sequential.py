"""wkv7_sequential.cu as a differentiable function, f(r, w, k, v, a, b, state) -> (y, None), for the benchmark.

The state must be zero: it is not read. T is a multiple of 16; all six are float32 or all are bfloat16.
"""

import contextlib
import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import record  # noqa: F401  (which makes wkv7_cuda known)
import torch

from wkv7_cuda import build

SOURCE = Path(__file__).with_name("wkv7_sequential.cu")
HEADERS = [Path(build.__file__).with_name("device.cuh")]
FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]
DTYPES = (torch.float32, torch.bfloat16)  # the place is the code in the C interface
N = 64  # head size
CHUNK = 16  # tokens from one saved state to the next, as in the source


def load() -> Callable:
    """Compile, unless cached, for the GPU at hand. BuildError without a GPU or nvcc."""
    if not torch.cuda.is_available():
        raise build.BuildError("the sequential kernel needs an NVIDIA GPU and torch sees none")
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    library = build.load(f"wkv7_sequential_{arch}", SOURCE, nvcc, [*FLAGS, f"-arch={arch}"], HEADERS)
    return operator(bind(library))


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the C interface at the end of the source."""
    sizes, pointer = [ctypes.c_int, *[ctypes.c_int64] * 3], ctypes.c_void_p
    library.sequential_forward.argtypes = [*sizes, *[pointer] * 5]
    library.sequential_backward.argtypes = [*sizes, *[pointer] * 6]
    library.sequential_error.argtypes, library.sequential_error.restype = [ctypes.c_int], ctypes.c_char_p
    return library


def operator(library: ctypes.CDLL) -> Callable:
    """The function over a bound library, which may be one compiled for the CPU."""

    class Sequential(torch.autograd.Function):
        @staticmethod
        def forward(ctx, save, *inputs):
            y, (batch, time, heads, _) = torch.empty_like(r := inputs[0]), inputs[0].shape
            states = r.new_empty(batch, heads, time // CHUNK, N, N, dtype=torch.float32) if save else None
            u = r.new_empty(r.shape, dtype=torch.float32) if save else None
            call(library, "forward", r, inputs, y, states, u)
            ctx.save_for_backward(*inputs, states, u)
            return y

        @staticmethod
        def backward(ctx, dy):
            *inputs, states, u = ctx.saved_tensors
            grads = [torch.empty_like(x) for x in inputs]
            call(library, "backward", dy, inputs, dy.contiguous(), states, u, grads)
            return (None, *grads)

    def wkv7(r, w, k, v, a, b, state):
        if r.dtype not in DTYPES or r.shape[1] % CHUNK or r.shape[3] != N:
            raise ValueError(f"the sequential kernel takes float32 or bfloat16, T a multiple of {CHUNK}, heads of {N}")
        inputs = [x.contiguous() for x in (r, w, k, v, a, b)]
        save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        return Sequential.apply(save, *inputs), None

    return wkv7


def call(library: ctypes.CDLL, name: str, r: torch.Tensor, *arguments) -> None:
    """sequential_<name>(bf16, B, T, H, pointers and arrays of pointers, stream); RuntimeError if the launch fails."""
    pointers = [
        None if x is None else x.data_ptr() if isinstance(x, torch.Tensor)
        else (ctypes.c_void_p * len(x))(*(y.data_ptr() for y in x))
        for x in arguments
    ]  # fmt: skip
    with torch.cuda.device(r.device) if r.is_cuda else contextlib.nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if r.is_cuda else None
        code = getattr(library, f"sequential_{name}")(DTYPES.index(r.dtype), *r.shape[:3], *pointers, stream)
    if code:
        raise RuntimeError(f"sequential {name}: {library.sequential_error(code).decode()} (CUDA error {code})")
