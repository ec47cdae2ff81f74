"""The `triton` operator: the kernels of wkv7_triton.py, compiled by Triton for the GPU at hand, NVIDIA's or AMD's.

Triton comes with PyTorch for CUDA and ROCm on Linux and brings its own compiler: no nvcc. With TRITON_INTERPRET=1 set
before triton is first imported, Triton runs the same kernels on the CPU, slowly; so the tests run without a GPU.
"""

import contextlib
from types import ModuleType

import torch
from torch import Tensor

from . import build, chunk, op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N = 64  # head size
VALUES = 16  # rows of a state that one program of `walk` carries
FUSED = dict(enable_fp_fusion=True)  # x y + z rounded once; Triton's own default differs from version to version


def load() -> op.WKV7:
    """Return the operator; BuildError without triton or a GPU that it can compile for, or if it errs in bf16. (In other
    dtypes kernels are compiled when they are first run, which takes seconds each.)"""
    try:
        import triton

        from . import wkv7_triton
    except ImportError as error:
        problem = f"the triton operator needs the package triton ({error})"
        raise build.BuildError(f"{problem}: pip install triton, on Linux, {build.REMEDY}") from None
    interpreted = triton.knobs.runtime.interpret
    if not interpreted:
        if not torch.cuda.is_available():
            problem = "the triton operator needs a GPU and torch sees none"
            raise build.BuildError(f"{problem}: check the driver and that torch has CUDA or ROCm, {build.REMEDY}")
        if torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):  # more shared memory than there is
            raise build.BuildError(f"the triton operator needs a GPU of sm_80 or newer: use another, {build.REMEDY}")
        try:  # Triton's launcher is C, compiled now, so that what fails fails here
            triton.runtime.driver.active.get_current_target()
        except Exception as error:
            problem = f"triton cannot use this GPU ({str(error).splitlines()[0] if str(error) else repr(error)})"
            raise build.BuildError(f"{problem}: it needs a C compiler and Python's headers, {build.REMEDY}") from None
    forward, backward = kernels(wkv7_triton)
    device = "cpu" if interpreted else "cuda"
    if not interpreted:
        op.verify("triton", forward, backward, chunk.differs, dtypes=(torch.bfloat16,))
    return op.register("triton", forward, backward, new_saved, device=device, dtypes=DTYPES, head_size=N)


def kernels(source: ModuleType):
    """The pair (forward, backward) of op.py's contract. source: the module wkv7_triton."""

    def states(inputs: list[Tensor], start: Tensor, mirrored: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Through all chunks, forwards from S_0 or mirrored from dL/dS_T: S~ or D~ of each chunk, the end, J."""
        r = inputs[0]
        batch, time, heads, _ = r.shape
        L = chunk_length(r)
        chunks = -(-time // L)
        count = batch * heads * chunks
        M, centred, J = new_saved(r, start), new_saved(r, start), new_saved(r, start, L)
        gain, decays = start.new_empty(count, N, N), start.new_empty(2, count, N)
        end = torch.empty_like(start)
        source.transitions[(count,)](
            *inputs, M, gain, *decays, J, time, heads, N=N, L=L, MIRRORED=mirrored, num_warps=4, **FUSED
        )  # fmt: skip
        source.walk[(batch * heads * (N // VALUES),)](
            start, M, gain, *decays, centred, end, chunks, r, N=N, VALUES=VALUES, MIRRORED=mirrored,
            num_stages=3, num_warps=4, **FUSED,
        )  # fmt: skip
        return centred, end, J

    def forward(r, w, k, v, a, b, state, save):
        y = torch.empty_like(r)
        with on(r.device):
            centred, state_T, J = states([r, w, k, v, a, b], state, False)
            source.outputs[(len(J),)](
                r, w, k, v, a, b, centred, J, y, *r.shape[1:3], N=N, L=chunk_length(r), num_warps=4, **FUSED
            )  # fmt: skip
        return y, state_T, centred if save else state.new_empty(0)

    def backward(r, w, k, v, a, b, state, saved, dy, dstate):
        grads = [torch.empty_like(r) for _ in range(6)]
        with on(r.device):
            D, dstate0, J = states([r, w, k, dy, a, b], dstate, True)
            source.gradients[(len(J),)](
                r, w, k, v, a, b, dy, saved, D, J, *grads, *r.shape[1:3], N=N, L=chunk_length(r), num_warps=8, **FUSED
            )  # fmt: skip
        return *grads, dstate0

    return forward, backward


def new_saved(r: Tensor, state: Tensor, size: int = N) -> Tensor:
    """Uninitialised: a matrix of operands per chunk, (B H chunks, size, size); S~ of every chunk is what is saved."""
    batch, time, heads, _ = r.shape
    dtype = torch.bfloat16 if r.dtype == torch.bfloat16 else torch.float32
    return state.new_empty(batch * heads * -(-time // chunk_length(r)), size, size, dtype=dtype)


def chunk_length(r: Tensor) -> int:
    """Tokens of a chunk: 32, or 16 where operands are fp32, whose tiles of 32 tokens spill out of the registers."""
    return 32 if r.dtype == torch.bfloat16 else 16


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes this GPU the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
