"""What the CUDA modules share: a .cu file as a library for the GPU at hand, and a call of it on plain pointers.

A library contains no torch header: its build takes seconds, and nvcc's CUDA version need not be torch's (the runtime
is linked statically; the driver must only be new enough for both).
"""

import contextlib
import ctypes
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of tensors; the place is the code in the C interfaces
HEADERS = [Path(__file__).with_name(name) for name in ("device.cuh", "blocks.cuh")]
FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]


def check_gpu(name: str) -> tuple[int, int]:
    """The compute capability of the GPU at hand, for example (9, 0): an H100 or H200. BuildError without one."""
    if not torch.cuda.is_available():
        problem = f"the {name} operator needs an NVIDIA GPU and torch sees none"
        raise build.BuildError(f"{problem}: check nvidia-smi and that torch has CUDA, {build.REMEDY}")
    return torch.cuda.get_device_capability()


@functools.cache
def open_library(
    source: Path, bind: Callable[[ctypes.CDLL], ctypes.CDLL], capability: tuple[int, int], *flags: str
) -> ctypes.CDLL:
    """What nvcc makes of a .cu for GPUs of this compute capability, bound. flags: besides those of all."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"  # where the toolkit puts it; often not on PATH
    if not Path(nvcc).exists():
        raise build.BuildError(
            f"{source.name} needs nvcc, neither on PATH nor {nvcc}: install the CUDA toolkit, {build.REMEDY}"
        )
    arch = "sm_{}{}".format(*capability)
    return bind(build.load(f"{source.stem}_{arch}", source, nvcc, [*FLAGS, *flags, f"-arch={arch}"], HEADERS))


def aligned(x: Tensor) -> Tensor:
    """x, or its copy if it starts inside a 16-byte unit, the most that one thread reads at once."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def call(
    library: ctypes.CDLL, name: str, r: Tensor, sizes: Sequence[int], *arguments: Tensor | list[Tensor] | None
) -> None:
    """<name>(*sizes, pointers and arrays of pointers, stream), on the device of r; RuntimeError if the launch fails."""
    pointers = [
        None if x is None else x.data_ptr() if isinstance(x, Tensor)
        else (ctypes.c_void_p * len(x))(*(y.data_ptr() for y in x))
        for x in arguments
    ]  # fmt: skip
    with torch.cuda.device(r.device) if r.is_cuda else contextlib.nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if r.is_cuda else None
        code = getattr(library, name)(*sizes, *pointers, stream)
    if code:
        error = getattr(library, f"{name.rpartition('_')[0]}_error")
        raise RuntimeError(f"{name}: {error(code).decode()} (CUDA error {code})")
