"""The `cpu` operator of WKV-6: wkv6_cpu.cpp, bound by cpu.py."""

from torch import Tensor

from . import cpu, op


def load() -> op.WKV6:
    """Compile, unless cached, and return the operator; BuildError if there is no working C++ compiler."""
    return op.register("cpu", *kernels(), new_saved, recurrence="wkv6", device="cpu", head_size=64)


def kernels() -> cpu.Kernels:
    """The pair (forward, backward) that op.py asks for."""
    return cpu.bind("wkv6", new_saved)


def new_saved(r: Tensor, state: Tensor) -> Tensor:
    """Uninitialised: the state before every 16 tokens, (B,H,n,N,N)."""
    batch, time, heads, size = r.shape
    return state.new_empty(batch, heads, -(-time // cpu.SEGMENT), size, size)
