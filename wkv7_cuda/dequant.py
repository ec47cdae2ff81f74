"""A quantised matrix read in one pass on a GPU: dequant.cu, built by nvcc for the device at hand when first needed.

    read = fused("nf4", read_nf4, levels, say)      # read(parts, shape, dtype) -> W: read_nf4, but faster on a GPU

On CUDA `read` is the custom op `pissa_rwkv::read_nf4_cuda`, which torch.compile and FakeTensorMode know: nothing is
built while they trace. Everywhere else, on the CPU and on meta tensors, it is the reader it was given, untouched (but
torch.compile sees the op there too: it would write a long program for each matrix); so it is on a GPU for which the
kernel cannot be built, which is said once. The values are the same to the bit either way.
"""

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import build, op
from .nvcc import DTYPES, aligned, open_library

SOURCE = Path(__file__).with_name("dequant.cu")
PARTS = {  # format -> what it is held as: dtype, and how many weights an element is for. Numbers of C are the places
    "int8": {"codes": (torch.int8, 1), "scale": (torch.float16, 64)},
    "nf4": {"codes": (torch.uint8, 2), "absmax": (torch.float32, 64)},
    "nf4dq": {"codes": (torch.uint8, 2), "absmax_codes": (torch.uint8, 64), "absmax_max": (torch.float32, 64 * 256),
              "offset": (torch.float32, math.inf)},
}  # fmt: skip

Read = Callable[[dict[str, Tensor], torch.Size, torch.dtype], Tensor]  # parts -> W (shape) in that dtype
Levels = Callable[[torch.device], tuple[Tensor, Tensor]]  # the levels of nf4 (16) and the dynamic ones (256), fp32
Choose = Callable[[torch.device], ctypes.CDLL | None]


def fused(
    quant: str, plain: Read, levels: Levels, say: Callable[[str], None], device: str = "cuda",
    choose: Choose | None = None,
) -> Read:  # fmt: skip
    """`plain`, the reader of format `quant`; on `device` by the library that `choose` gives, if it gives one.

    To be called once per format, device and process.
    """
    choose = choose or (lambda device: library_for(device, say))

    @torch.library.custom_op(f"pissa_rwkv::read_{quant}_{device}", mutates_args=())
    def read_op(parts: list[Tensor], shape: list[int], dtype: torch.dtype) -> Tensor:
        library = choose(parts[0].device) if parts[0].device.type == device else None
        if library is None:
            return plain(dict(zip(PARTS[quant], parts, strict=True)), torch.Size(shape), dtype)
        return dequantise(library, quant, parts, levels(parts[0].device), shape, dtype)

    @read_op.register_fake
    def _(parts, shape, dtype):
        return parts[0].new_empty(shape, dtype=dtype)

    def read(parts: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if parts["codes"].device.type == device or torch.compiler.is_compiling():
            return read_op([parts[name] for name in PARTS[quant]], list(shape), dtype)
        return plain(parts, shape, dtype)

    return read


@functools.cache
def library_for(device: torch.device, say: Callable[[str], None]) -> ctypes.CDLL | None:
    """The library for a GPU, compiled unless cached; None, and a line, if that fails or the GPU does not take it."""
    try:
        library = open_library(SOURCE, bind, torch.cuda.get_device_capability(device))
        codes, scale = torch.ones(64, dtype=torch.int8, device=device), torch.ones(1, dtype=torch.half, device=device)
        dequantise(library, "int8", [codes, scale], (scale, scale), (64,), torch.float32)
        return library
    except (build.BuildError, RuntimeError) as error:
        if op.is_out_of_memory(error):
            raise
        reason = error.why if isinstance(error, build.BuildError) else error
        say(f"no kernel reads quantised matrices: {reason}; PyTorch does, the same values more slowly")
        return None


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the C interface that the end of dequant.cu defines."""
    pointer = ctypes.c_void_p
    library.dequant.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, *[pointer] * 5]
    library.dequant_error.argtypes, library.dequant_error.restype = [ctypes.c_int], ctypes.c_char_p
    return library


def dequantise(
    library: ctypes.CDLL, quant: str, parts: Sequence[Tensor], levels: tuple[Tensor, Tensor], shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """W (shape), new, from `parts` in the order of PARTS. ValueError: they do not fit; RuntimeError: no launch."""
    n, codes = math.prod(shape), parts[0]
    if dtype not in DTYPES:
        raise ValueError(f"{quant}: cannot make {dtype}; choose from {', '.join(map(str, DTYPES))}")
    for (name, (wanted, weights)), part in zip(PARTS[quant].items(), parts, strict=True):
        size = int(-(-n // weights))
        if (part.dtype, part.numel(), part.device) != (wanted, size, codes.device):
            found = f"{name} is {part.numel()} x {part.dtype} on {part.device}"
            raise ValueError(f"{quant}: {found}; {n} weights need {size} x {wanted} on {codes.device}")
    parts = [aligned(part.contiguous()) for part in parts]
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    pointers = (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts))
    with torch.cuda.device(codes.device) if codes.is_cuda else contextlib.nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if codes.is_cuda else None
        code = library.dequant(
            [*PARTS].index(quant), DTYPES.index(dtype), n, pointers, *(x.data_ptr() for x in levels),
            out.data_ptr(), stream,
        )  # fmt: skip
    if code:
        raise RuntimeError(f"{quant}: {library.dequant_error(code).decode()} (CUDA error {code})")
    return out
