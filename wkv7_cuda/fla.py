"""The `fla` operator: chunk_rwkv7 of the package flash-linear-attention, called as this project's operators are.

| | here | in fla |
|---|---|---|
| w | the raw decay logit | the log decay g = -e^(-1/2) sigma(w); autograd carries its gradient back to w |
| state | [B,H,value,key], fp32 | [B,H,key,value], fp32 |

g never falls below -e^(-1/2), and fla is told so: only then does it put 64 tokens in a chunk and use tensor cores.
Its kernels are Triton's, tuned when first run, which takes minutes; the choice may change the last bits of a result.
In fp32 they would compute in TF32, with errors near 1e-3, and fla itself warns of that: this operator takes 16-bit
inputs only. They are opaque to FakeTensorMode and a graph break to torch.compile.
"""

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
    if not torch.cuda.is_available():  # asked first: without one, importing fla warns
        problem = "the fla operator needs a GPU and torch sees none"
        raise build.BuildError(f"{problem}: check the driver and that torch has CUDA or ROCm, {build.REMEDY}")
    try:
        from fla.ops.rwkv7 import chunk_rwkv7
    except ImportError as error:
        problem = f"the fla operator needs the package flash-linear-attention ({error})"
        raise build.BuildError(f"{problem}: pip install pissa_rwkv[fla], {build.REMEDY}") from None
    call = bind(chunk_rwkv7)

    def wkv7_fla(
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        op.check("fla", (r, w, k, v, a, b, state), "cuda", DTYPES, N)
        with torch.autocast("cuda", enabled=False):
            return call(r, w, k, v, a, b, state)

    return wkv7_fla


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
