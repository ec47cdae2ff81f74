"""The `fla` operator of WKV-6: chunk_rwkv6 of the package flash-linear-attention. fla.py says what holds for both.

| | here | in fla |
|---|---|---|
| order | r w k v u state | r k v w u |
| w | the raw decay logit | the log decay g = -exp(w); autograd carries its gradient back to w |
| scale | none | 1/sqrt(N) unless told 1 |
| state | [B,H,value,key], fp32 | [B,H,key,value], fp32 |

fla takes differences of sums of g over 64 tokens. Where g is huge they lose their digits, and where it is -inf they are
NaN. So w is kept below HIGHEST, where d = 2e-9, nothing in 16 bits; above it dw is 0. A little below it dw is not to be
trusted: it comes from terms that cancel and is then multiplied by g (wkv6_chunk.py has it without).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import fla, op

HIGHEST = 3.0


def load() -> op.WKV6:
    """Return the operator; BuildError without a GPU or the package."""
    return fla.operator("wkv6", bind(fla.function("rwkv6")))


def bind(chunk_rwkv6: Callable[..., tuple[Tensor, Tensor]]) -> op.WKV6:
    """chunk_rwkv6 under this project's calling convention, without its checks."""

    def call(r, w, k, v, u, state):
        g = -torch.exp(w.to(state.dtype).clamp(max=HIGHEST))  # (B,T,H,N), fp32
        y, state_T = chunk_rwkv6(
            r, k, v, g, u, scale=1.0, initial_state=state.mT.contiguous(), output_final_state=True
        )
        return y, state_T.mT.contiguous()

    return call
