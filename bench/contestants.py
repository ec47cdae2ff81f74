"""Who takes part in the WKV benchmark: our operators as wkv7_cuda lists them, and what others have made.

A contestant is a function f(r, w, k, v, a, b, state) -> (y, state_T or None), for WKV-6 f(r, w, k, v, u, state); shapes
as in wkv7_cuda/op.py, w the raw decay logit. Peers are given a zero state and may ignore it. What a peer needs done to
its inputs is part of its time.
"""

import math
from collections.abc import Callable, Container

import sequential
import torch
import torch.nn.functional as F

import wkv7_cuda
from pissa_rwkv import wkv6_ref, wkv7_ref
from wkv7_cuda.op import RECURRENCES


def fla() -> Callable:
    """flash-linear-attention's chunked kernels, with the arguments that keep them off their slow path."""
    from fla.ops.rwkv7 import chunk_rwkv7

    floor = -math.exp(-0.5)  # of the log decay

    def f(r, w, k, v, a, b, state):
        y, end = chunk_rwkv7(r, floor * torch.sigmoid(w), k, v, a, b, scale=1.0, initial_state=state.mT.contiguous(),
                             output_final_state=True, safe_gate=True, lower_bound=floor, chunk_size=64)
        return y, end.mT  # theirs is [key, value]

    return f


def log_log(w: torch.Tensor) -> torch.Tensor:
    """w' with d = exp(-exp(w')): the form in which older kernels take the decay."""
    return (-F.softplus(-w.float()) - 0.5).to(w.dtype)


def wind_rwkv() -> Callable:
    """johanwind/wind_rwkv: chunks of 16 on tensor cores; bf16, also the state."""
    from wind_rwkv.rwkv7 import attn_chunked_cuda, load_chunked_cuda

    load_chunked_cuda(64)
    return lambda r, w, k, v, a, b, state: attn_chunked_cuda(r, log_log(w), k, v, a, b, state.to(r.dtype))


def rwkv_ops() -> Callable:
    """The package rwkv-ops: a sequential kernel in bf16 whose chunk is 16 tokens."""
    from rwkv_ops import generalized_delta_rule

    return lambda r, w, k, v, a, b, state: generalized_delta_rule(
        r=r, w=log_log(w), k=k, v=v, a=a, b=b, initial_state=state, output_final_state=True)  # fmt: skip


BOTH = (torch.float32, torch.bfloat16)
PEERS = {  # recurrence -> name -> (devices, dtypes, what loads it); an operator of ours with that name takes its place
    "wkv7": {
        "torch": (("cpu", "cuda"), BOTH, lambda: wkv7_ref),
        "sequential": (("cuda",), BOTH, sequential.load),
        "fla": (("cuda",), (torch.bfloat16,), fla),
        "wind_rwkv": (("cuda",), (torch.bfloat16,), wind_rwkv),
        "rwkv_ops": (("cuda",), (torch.bfloat16,), rwkv_ops),
    },
    "wkv6": {"torch": (("cpu", "cuda"), BOTH, lambda: wkv6_ref)},
}
STATEFUL = {"torch"}.union(*wkv7_cuda.OPS.values())  # these take an initial state and give gradients to it


def loaders(device: str, dtype: torch.dtype, recurrence: str = "wkv7") -> dict[str, Callable[[], Callable]]:
    """Name -> what loads it, for all that may run on the device."""
    ours = {op: lambda op=op: wkv7_cuda.load(op, recurrence) for op in wkv7_cuda.OPS[recurrence]}
    peers = {name: load for name, (devices, dtypes, load) in PEERS[recurrence].items()
             if device in devices and dtype in dtypes}  # fmt: skip
    return peers | ours


class ContextLost(Exception):
    """A name, and why: after this the process can use the GPU no more."""


def ready(
    device: str, dtype: torch.dtype, recurrence: str = "wkv7", without: Container[str] = ()
) -> tuple[dict[str, Callable], dict[str, str]]:
    """Those that load and survive 16 tokens on this device, and one line on each that does not."""
    works, fails, (tokens, heads, _) = {}, {}, RECURRENCES[recurrence]
    x = torch.zeros(1, 16, 1, 64, device=device, dtype=dtype)
    inputs = [*(x for _ in tokens), *(x[0, 0] for _ in heads), torch.zeros(1, 1, 64, 64, device=device)]
    for name, load in loaders(device, dtype, recurrence).items():
        if name in without:
            continue
        try:
            f = load()
            with torch.no_grad():
                f(*inputs)
            settle(device)
            works[name] = f
        except Exception as error:  # other people's code may raise anything
            fails[name] = one_line(error)
            try:
                settle(device)
            except Exception:
                raise ContextLost(name, fails[name]) from error
    return works, fails


def settle(device: str) -> None:
    """Waits for the device: a kernel that fails does so after its launch."""
    if device == "cuda":
        torch.cuda.synchronize()


def one_line(error: BaseException) -> str:
    """The error in at most 160 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]
