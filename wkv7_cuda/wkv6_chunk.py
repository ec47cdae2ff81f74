"""The `chunk` operator of WKV-6: chunks of 16 tokens, in plain PyTorch, for any device, dtype, head size and T.

All is computed in the state's dtype: float32, or float64 if the inputs are.

**Why it is not chunk.py with other letters.** There a decay of the whole chunk is split in two factors, e^(G-m) for the
reader and e^(m-G) for the written. WKV-6's decay has no floor: d may be 1e-9, or 0, and no e^(-G) exists. So here every
exponent is a *sum* of g over the tokens in between, never a difference of two sums:

    g = log d = -exp(w)                    (-inf is welcome: a sum of them is -inf, and e^-inf is 0)
    E_t  = sum_{s<t} g_s                   from the start of the chunk to token t
    F_t  = sum_{s>t} g_s                   from token t to the end of the chunk
    X_ti = sum_{i<s<t} g_s                 between a write, i, and a later read, t
    G    = sum_s g_s                       through the whole chunk

Rows are tokens; S is the state before the chunk and S' the one after it, both [value, key]; `o` is the product element
by element. E, F, G scale rows, so what concerns the states is matrix products:

    q = r o e^E        k^ = k o e^F
    A_ti = sum_key r_t k_i e^(X_ti), i < t        A_tt = sum_key r_t u k_t

**Forward.**

    Y  = q S^T + A V
    S' = S o e^G + V^T k^

**Backward**, with D = dL/dS':

    dL/dS = D o e^G + dY^T q
    dV    = A^T dY + k^ D^T
    P     = tril(dY V^T)                                                             dL/dA
    dr_t  = (dY S)_t o e^E + sum_{i<t} P_ti k_i e^(X_ti) + P_tt u k_t
    dk_i  = (V D)_i o e^F  + sum_{t>i} P_ti r_t e^(X_ti) + P_ii u r_i
    du    = sum_t P_tt r_t k_t

g_s is in E_t of later tokens, in F_i of earlier ones, in G, and in X_ti if i < s < t:

    dg_s = sum_{t>s} (q o dY S)_t + sum_{i<s} (k^ o V D)_i + e^G o sum_value D o S + sum_{i<s<t} P_ti r_t k_i e^(X_ti)
    dw   = dg o g

Each of these terms has the factor d_s, and none is subtracted from another. The shorter formula, a suffix sum of
r o dr - k o dk, has terms without it that must cancel; what remains of them is rounding, and g multiplies it.

**The pairs** (t,i) are walked diagonal by diagonal: t - i = 1, 2, ..., 15. From one to the next X grows by one g, and
all that a diagonal needs is rows of r, k, g shifted against each other. Its share of dg is summed from the far diagonal
to the near one: row t of `reach` is then all that token t reads of tokens o or more before it, and each of these reads
has come through token t - o + 1.

Saved: S of every chunk, N^2/16 numbers per token and head. All else is computed again.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import op
from .chunk import Kernels, distance, from_chunks, to_chunks

L = 16


def load(ready: bool = True) -> op.WKV6:
    """Return the operator; without `ready` for meta tensors, whose bytes are counted."""
    if not ready:
        return op.in_the_open(forward, backward)
    return op.register("chunk", forward, backward, new_saved, recurrence="wkv6")


def differs(kernels: Kernels, dtype: torch.dtype, device: str) -> float:
    """How far other kernels are from these on random numbers, as chunk.differs."""
    draw, shape = torch.Generator().manual_seed(0), (1, 136, 2, 64)
    r, w, k, v, dy = (torch.randn(shape, generator=draw) for _ in range(5))
    u, (state, dstate) = torch.randn(2, 64, generator=draw), torch.randn(2, 1, 2, 64, 64, generator=draw)
    return distance((forward, backward), kernels, [r, w, k, v, u, state], [dy, dstate], dtype, device)


class Chunks:
    """What forward and backward both need of the inputs, for all chunks at once; the letters are those above."""

    def __init__(self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, dtype: torch.dtype):
        self.g = to_chunks(-torch.exp(w.to(dtype)), dtype, L)  # (B,H,n,L,N), 0 after the last token
        self.r, self.k, self.V = (to_chunks(x, dtype, L) for x in (r, k, v))
        self.u = u.to(dtype)[:, None, None, :]  # (H,1,1,N)
        self.e_E, self.e_F = torch.exp(before(self.g)), torch.exp(after(self.g))  # (B,H,n,L,N)
        self.e_G = torch.exp(self.g.sum(-2, keepdim=True))  # (B,H,n,1,N)
        self.q, self.k_ = self.r * self.e_E, self.k * self.e_F
        self.length = self.g.shape[-2]
        self.A = self.g.new_zeros(*self.g.shape[:-1], self.length)  # (B,H,n,L,L)
        diagonal(self.A, 0).copy_((self.r * self.u * self.k).sum(-1))
        for o, e in self.decays():
            diagonal(self.A, o).copy_((self.r[..., o:, :] * self.k[..., :-o, :] * e).sum(-1))

    def decays(self) -> Iterator[tuple[int, Tensor]]:
        """o = 1, 2, ... and e^X of all reads that come o tokens after the write, (B,H,n,L-o,N)."""
        X = torch.zeros_like(self.g[..., 1:, :])
        for o in range(1, self.length):
            yield o, torch.exp(X)
            X = X[..., 1:, :] + self.g[..., 1 : self.length - o, :]


def before(x: Tensor) -> Tensor:
    """Row t: the sum of the rows before it."""
    return F.pad(x[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


def after(x: Tensor) -> Tensor:
    """Row t: the sum of the rows after it."""
    return before(x.flip(-2)).flip(-2)


def diagonal(x: Tensor, o: int) -> Tensor:
    """A view: of (B,H,n,L,L) the entries whose column is o before their row, (B,H,n,L-o)."""
    return x.diagonal(-o, -2, -1)


def new_saved(r: Tensor, state: Tensor) -> Tensor:
    """Uninitialised: one state per chunk, (B,H,n,N,N)."""
    batch, time, heads, size = r.shape
    return state.new_empty(batch, heads, -(-time // min(L, time)), size, size)


def forward(r, w, k, v, u, state, save):
    """As op.py asks."""
    x = Chunks(r, w, k, v, u, state.dtype)
    gain = x.V.mT @ x.k_  # (B,H,n,value,key)
    S, starts = state, []
    for n in range(gain.shape[2]):
        starts.append(S)
        S = S * x.e_G[:, :, n] + gain[:, :, n]
    starts = torch.stack(starts, 2)  # (B,H,n,value,key)
    Y = x.q @ starts.mT + x.A @ x.V
    return from_chunks(Y, r), S, starts if save else state.new_empty(0)


def backward(r, w, k, v, u, state, saved, dy, dstate):
    """As op.py asks."""
    x, S, dY = Chunks(r, w, k, v, u, state.dtype), saved, to_chunks(dy, state.dtype, L)
    gain = dY.mT @ x.q  # (B,H,n,value,key)
    dS, ends = dstate, []
    for n in reversed(range(gain.shape[2])):
        ends.insert(0, dS)
        dS = dS * x.e_G[:, :, n] + gain[:, :, n]
    D = torch.stack(ends, 2)  # (B,H,n,value,key)

    dV = x.A.mT @ dY + x.k_ @ D.mT  # (B,H,n,L,value)
    dq, dk_ = dY @ S, x.V @ D  # (B,H,n,L,key)
    dg = after(x.q * dq) + before(x.k_ * dk_) + x.e_G * (D * S).sum(-2, keepdim=True)
    P = dY @ x.V.mT  # (B,H,n,L,L)
    p = diagonal(P, 0)[..., None]
    dr, dk = dq * x.e_E + p * x.u * x.k, dk_ * x.e_F + p * x.u * x.r
    du = (p * x.r * x.k).sum((0, 2, 3))  # (H,N)
    reach = torch.zeros_like(dg)
    for o, e in reversed([*x.decays()]):
        p, late, early = diagonal(P, o)[..., None] * e, x.r[..., o:, :], x.k[..., :-o, :]  # (B,H,n,L-o,N)
        dr[..., o:, :] += p * early
        dk[..., :-o, :] += p * late
        if o > 1:  # what the very next token reads has not decayed
            reach[..., o:, :] += p * early * late
            dg[..., 1 : x.length - o + 1, :] += reach[..., o:, :]
    # Where g = -inf, dg = 0, and 0 * -inf would be NaN.
    dw = from_chunks(dg * x.g.clamp(min=torch.finfo(x.g.dtype).min), r)
    return from_chunks(dr, r), dw, from_chunks(dk, r), from_chunks(dV, r), du.to(u.dtype), dS
