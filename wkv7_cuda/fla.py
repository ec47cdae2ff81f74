"""The `fla` operator: chunk_rwkv7 of the package flash-linear-attention, called as this project's operators are.

| | here | in fla |
|---|---|---|
| w | the raw decay logit | the log decay g = -e^(-1/2) sigma(w); autograd carries its gradient back to w |
| state | [B,H,value,key], fp32 | [B,H,key,value], fp32 |

g never falls below -e^(-1/2), and fla is told so: only then does it put 64 tokens in a chunk and use tensor cores.
Its kernels are Triton's, tuned when first run, which takes minutes; the choice may change the last bits of a result.
In fp32 they would compute in TF32, with errors near 1e-3, and fla itself warns of that: this operator takes 16-bit
inputs only. They are opaque to FakeTensorMode and a graph break to torch.compile.

wkv6_fla.py does the same with chunk_rwkv6.
"""

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import build, op

DTYPES = (torch.bfloat16, torch.float16)
N = 64  # head size
C = math.exp(-0.5)


def load() -> op.WKV7:
    """Return the operator; BuildError without a GPU or the package."""
    return operator("wkv7", bind(function("rwkv7")))


def function(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """fla's chunk_<name>; BuildError without a GPU or the package."""
    if not torch.cuda.is_available():  # asked first: without one, importing fla warns
        problem = "the fla operator needs a GPU and torch sees none"
        raise build.BuildError(f"{problem}: check the driver and that torch has CUDA or ROCm, {build.REMEDY}")
    try:
        return getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}")
    except ImportError as error:
        problem = f"the fla operator needs the package flash-linear-attention ({error})"
        raise build.BuildError(f"{problem}: pip install flash-linear-attention, {build.REMEDY}") from None


def operator(recurrence: str, call: op.WKV7 | op.WKV6) -> op.WKV7 | op.WKV6:
    """`call` with the checks that all operators make of their arguments, and outside any autocast."""

    def wkv(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        op.check("fla", inputs, "cuda", DTYPES, N, recurrence)
        with torch.autocast("cuda", enabled=False):
            return call(*inputs)

    return wkv


def bind(chunk_rwkv7: Callable[..., tuple[Tensor, Tensor]]) -> op.WKV7:
    """chunk_rwkv7 under this project's calling convention, without its checks."""

    def call(r, w, k, v, a, b, state):
        g = -C * torch.sigmoid(w.to(state.dtype))  # (B,T,H,N), fp32: fla sums it up over 64 tokens
        y, state_T = chunk_rwkv7(
            r, g, k, v, a, b, scale=1.0, initial_state=state.mT.contiguous(), output_final_state=True,
            safe_gate=True, lower_bound=-C, chunk_size=64,
        )  # fmt: skip
        return y, state_T.mT.contiguous()

    return call
