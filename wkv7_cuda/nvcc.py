"""What the CUDA modules share: a .cu file as a library for the GPU at hand, and a call of it on plain pointers.

A library contains no torch header: its build takes half a minute, and nvcc's CUDA version need not be torch's (the
runtime is linked statically; the driver must only be new enough for both).
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of tensors; the place is the code in the C interfaces
TOOLKIT = Path("/usr/local/cuda")  # where it is installed; often not on PATH
PIP_INSTALL = "pip install 'cuda-toolkit[nvcc,cccl]'"
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
    nvcc, arch = find_nvcc(), "sm_{}{}".format(*capability)
    if nvcc is None:
        problem = f"{source.name} needs nvcc, which is in none of $CUDA_HOME, this Python, PATH and {TOOLKIT}"
        raise build.BuildError(f"{problem}: install the CUDA toolkit ({PIP_INSTALL}), {build.REMEDY}")
    flags = [*FLAGS, *of_this_machine(nvcc), *flags, f"-arch={arch}"]
    return bind(build.load(f"{source.stem}_{arch}", source, str(nvcc), flags, HEADERS))


def find_nvcc() -> Path | None:
    """In the toolkit that the environment names, in those of this Python, on PATH, or where a toolkit is installed."""
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    roots = [root for root in (*named, *of_pip()) if root]
    places = [*(Path(root, "bin", "nvcc") for root in roots), shutil.which("nvcc"), TOOLKIT / "bin" / "nvcc"]
    return next((Path(nvcc) for nvcc in places if nvcc and Path(nvcc).exists()), None)


def of_pip() -> list[Path]:
    """The toolkits that PIP_INSTALL has put beside torch, with all headers. (JAX installs its nvcc without them.)"""
    nvidia = importlib.util.find_spec("nvidia")
    folders = nvidia.submodule_search_locations if nvidia else None
    headers = (header for folder in folders or () for header in Path(folder).glob("cu*/include/cccl/nv/target"))
    return [header.parents[3] for header in headers]


def of_this_machine(nvcc: Path) -> list[str]:
    """Flags: the C++ compiler of NVCC_CCBIN, which nvcc itself reads from 12.5 on, or the one that CUDAHOSTCXX or CXX
    names, unless by several words, which nvcc does not take; and where pip and conda put the runtime, which nvcc does
    not know."""
    named = (os.environ.get("CUDAHOSTCXX"), os.environ.get("CXX"))
    compiler = os.environ.get("NVCC_CCBIN") or next((name for name in named if name and shutil.which(name)), None)
    elsewhere = nvcc.resolve().parent.parent / "lib"
    there = (elsewhere / "libcudart_static.a").exists()
    return [*(["-ccbin", compiler] if compiler else []), *([f"-L{elsewhere}"] if there else [])]


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
