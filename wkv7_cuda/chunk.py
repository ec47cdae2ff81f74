"""The `chunk` operator: WKV-7 in chunks of 32 tokens, in plain PyTorch, for any device, dtype, head size and T.

Inside a chunk the recurrence is linear algebra over its L tokens; only the states between chunks are a loop. All is
computed in the state's dtype: float32, or float64 if the inputs are. (On CUDA, `allow_tf32` would make that 4e-4.)

**Definitions.** Rows are tokens; S is the state before the chunk and S' the one after it, both [value, key]; `o` is the
product element by element, and a vector of keys beside a matrix scales its rows.

    g = log d = -exp(-1/2) sigma(w)     G = g_1 + ... + g_t     E = G - g     m = G in the middle row
    q~ = r o e^(G-m)    a~ = a o e^(E-m)    k~ = k o e^(m-G)    b~ = b o e^(m-G)        S~ = S o e^m

Only differences of G count. Measured from the middle, |G - m| <= 0.61 L/2, so for L = 32 each factor stays below e^10.

    Q = [q~ ; a~]    K = [k~ ; b~]      the two stacked along the tokens: 2L rows
    A = mask(Q K^T) = [A_qk A_qb ; A_ak A_ab]      mask: tril for the q rows, strict tril for the a rows

**Forward.** The rows of U are u_t = S_{t-1} a_t, on which every later token depends: a triangular system, to be solved
by substitution. (Powers of A_ab, "Neumann doubling", lose everything once keys are nearly equal.)

    X  = A_ak V + a~ S~^T
    U  = (I - A_ab)^-1 X
    Y  = q~ S~^T + A_qk V + A_qb U
    S' = (S~ + V^T k~ + U^T b~) o e^(G_L-m)

**Backward** is the same walk in a mirror: D = dL/dS' takes the place of S, dY that of V, keys and queries change
places, and so do a and b. With D~ = D o e^(G_L-m):

    dU = A_qb^T dY + b~ D~^T
    Z  = (I - A_ab)^-T dU                                      the gradient of the system's right-hand side X
    dV = k~ D~^T + A_qk^T dY + A_ak^T Z
    dL/dS = (D~ + dY^T q~ + Z^T a~) o e^m

The other gradients need S~ and D~ of their chunk alone:

    P  = mask([dY ; Z] [V ; U]^T)                              dL/dA
    dQ = P K + [dY ; Z] S~      dK = P^T Q + [V ; U] D~ =: dK_i + dK_s

and dr = e^(G-m) o dq~ and so on. g_t sits in G_s for s >= t, in E_s for s > t, and in e^(G_L):

    h    = q~ o dq~ + a~ o da~ - k~ o dk_i - b~ o db_i
    dg_t = sum_{s>=t} h_s - (a~ o da~)_t + sum_{s<t} (k~ o dk_s + b~ o db_s)_s + sum_value D~ o S~

dK is kept in its two parts because what happens inside the chunk must cancel in h, while what leaves it does not.

Saved: S~ of every chunk, N^2/L numbers per token and head. All else is computed again.

**A model of roundings.** `cast(name, x)` is called with every tensor that the tensor-core kernel (wkv7_fast.cu) feeds
into a product, under its name above (T: the inverses of the 16x16 blocks on the diagonal of I - A_ab). With `as_is`
nothing is rounded; with `to_bf16` the result errs as that kernel may, and a kernel that errs much more has a bug.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import op

L = 32
BLOCK = 16  # rows of the system that are solved at once
C = math.exp(-0.5)

Cast = Callable[[str, Tensor], Tensor]
Kernels = tuple[Callable, Callable]  # (forward, backward) of op.py's contract


def as_is(name: str, x: Tensor) -> Tensor:
    """No rounding."""
    return x


def to_bf16(name: str, x: Tensor) -> Tensor:
    """What bf16 keeps of x, in the dtype of x."""
    return x.to(torch.bfloat16).to(x.dtype)


def load(ready: bool = True) -> op.WKV7:
    """Return the operator; without `ready` for meta tensors, whose bytes are counted."""
    return op.register("chunk", forward, backward, new_saved) if ready else op.in_the_open(forward, backward)


def differs(kernels: Kernels, dtype: torch.dtype, device: str) -> float:
    """How far other kernels (op.py's contract) are from these on random numbers: the worst relative error.

    In bf16 about 5e-3, in float32 about 1e-6; near or above 1 something is wrong. (Of 136 tokens the compiled ones make
    three segments, of which the last is short: so all of their code runs.)
    """
    draw, shape = torch.Generator().manual_seed(0), (1, 136, 2, 64)
    r, w, k, v, u, eta, dy = (torch.randn(shape, generator=draw) for _ in range(7))
    state, dstate = (torch.randn(1, 2, 64, 64, generator=draw) for _ in range(2))
    kappa = F.normalize(u, dim=-1)
    inputs = [r, w, k, v, -kappa, kappa * eta.sigmoid(), state]
    return distance((forward, backward), kernels, inputs, [dy, dstate], dtype, device)


def distance(
    reference: Kernels, kernels: Kernels, inputs: list[Tensor], grads: list[Tensor], dtype: torch.dtype, device: str
) -> float:
    """The worst relative error of `kernels` in `dtype` on a device, against `reference` in float64 on the CPU."""
    *inputs, state = inputs
    inputs = [x.to(dtype) for x in inputs]

    def results(kernels: Kernels, place: str, dtype: torch.dtype) -> list[Tensor]:
        x, wide = [t.to(place, dtype) for t in inputs], torch.promote_types(dtype, torch.float32)
        S, dS = state.to(place, wide), grads[1].to(place, wide)
        y, state_T, saved = kernels[0](*x, S, True)
        return [y, state_T, *kernels[1](*x, S, saved, grads[0].to(x[0]), dS)]

    exact, found = results(reference, "cpu", torch.float64), results(kernels, device, dtype)
    return max(((x.cpu().double() - e).norm() / e.norm()).item() for x, e in zip(found, exact, strict=True))


class Chunks:
    """What forward and backward both need of the inputs, for all chunks at once; the letters are those above."""

    def __init__(
        self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, cast: Cast
    ):
        # An exponent near 10 rounded to float32 is an error of 3e-7 in all that it scales; Metal has no float64.
        wide = dtype if w.device.type == "mps" else torch.float64
        g = to_chunks(-C * torch.sigmoid(w.to(wide)), wide)  # (B,H,n,L,N)
        G = g.cumsum(-2)
        self.length = length = G.shape[-2]
        m = G[..., (length - 1) // 2, None, :]  # (B,H,n,1,N)
        self.e_q, self.e_a, self.e_k = (torch.exp(x).to(dtype) for x in (G - m, G - g - m, m - G))  # (B,H,n,L,N)
        self.e_m, self.e_end = (torch.exp(x).to(dtype) for x in (m, G[..., -1:, :] - m))  # (B,H,n,1,N)
        r, k, v, a, b = (to_chunks(x, dtype) for x in (r, k, v, a, b))
        self.q, self.a = cast("q", self.e_q * r), cast("a", self.e_a * a)
        self.k, self.b, self.V = cast("k", self.e_k * k), cast("b", self.e_k * b), v
        self.Q, self.K = torch.cat([self.q, self.a], -2), torch.cat([self.k, self.b], -2)  # (B,H,n,2L,N)
        lower = torch.ones(length, length, dtype=torch.bool, device=w.device).tril()
        self.mask = torch.cat([lower, lower.tril(-1)]).repeat(1, 2)  # (2L,2L)
        exact = (self.Q @ self.K.mT).masked_fill_(~self.mask, 0)  # (B,H,n,2L,2L)
        self.A, self.cast = cast("A", exact), cast
        self.A_q, (self.A_ak, self.A_ab) = self.A[..., :length, :], self.A[..., length:, :].chunk(2, -1)
        self.blocks = [slice(i, min(i + BLOCK, length)) for i in range(0, length, BLOCK)]
        self.T = [cast("T", inverse(exact[..., length:, length:][..., i, i])) for i in self.blocks]

    def solve(self, x: Tensor, n: int | slice = slice(None)) -> Tensor:
        """U = (I - A_ab)^-1 x of chunk n, or of all: 16 rows after 16 rows, from the top."""
        A_ab, U = self.A_ab[:, :, n], []
        for i, T in zip(self.blocks, self.T, strict=True):
            known = A_ab[..., i, : i.start] @ torch.cat(U, -2) if U else 0
            U.append(self.cast("U", T[:, :, n] @ self.cast("X", x[..., i, :] + known)))
        return torch.cat(U, -2)

    def solve_transposed(self, x: Tensor, n: int | slice = slice(None)) -> Tensor:
        """Z = (I - A_ab)^-T x of chunk n, or of all: 16 rows after 16 rows, from the bottom."""
        A_ab, Z = self.A_ab[:, :, n], []
        for i, T in zip(reversed(self.blocks), reversed(self.T), strict=True):
            known = A_ab[..., i.stop :, i].mT @ torch.cat(Z, -2) if Z else 0
            Z.insert(0, self.cast("Z", T[:, :, n].mT @ self.cast("dU", x[..., i, :] + known)))
        return torch.cat(Z, -2)


def inverse(A: Tensor) -> Tensor:
    """(I - A)^-1 for A strictly lower triangular, by substitution."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    return torch.linalg.solve_triangular(-A, eye, upper=False, unitriangular=True)  # which reads no diagonal


def to_chunks(x: Tensor, dtype: torch.dtype, length: int = L) -> Tensor:
    """(B,T,H,N) -> (B,H,n,L,N), zeros after the last token: with g = 0 they change no state. L = T for T < length."""
    length = min(length, x.shape[1])
    x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, -x.shape[1] % length))
    return x.unflatten(1, (-1, length)).permute(0, 3, 1, 2, 4).contiguous()


def from_chunks(x: Tensor, like: Tensor) -> Tensor:
    """(B,H,n,L,N) -> (B,T,H,N), contiguous, of the length and dtype of `like`."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : like.shape[1]].to(like.dtype).contiguous()


def new_saved(r: Tensor, state: Tensor) -> Tensor:
    """Uninitialised: one state per chunk, (B,H,n,N,N)."""
    batch, time, heads, size = r.shape
    return state.new_empty(batch, heads, -(-time // min(L, time)), size, size)


def forward(r, w, k, v, a, b, state, save, cast: Cast = as_is):
    """As op.py asks."""
    x = Chunks(r, w, k, v, a, b, state.dtype, cast)
    X, gain = x.A_ak @ x.V, x.V.mT @ x.k  # (B,H,n,L,value), (B,H,n,value,key)
    S, before, U = state, [], []
    for n in range(X.shape[2]):
        S_m = S * x.e_m[:, :, n]
        before.append(cast("S", S_m))
        U.append(x.solve(X[:, :, n] + x.a[:, :, n] @ before[n].mT, n))
        S = (S_m + gain[:, :, n] + U[n].mT @ x.b[:, :, n]) * x.e_end[:, :, n]
    S_m, U = torch.stack(before, 2), torch.stack(U, 2)  # (B,H,n,value,key): S~; (B,H,n,L,value)
    Y = x.q @ S_m.mT + x.A_q @ torch.cat([x.V, U], -2)
    return from_chunks(Y, r), S, S_m if save else state.new_empty(0)


def backward(r, w, k, v, a, b, state, saved, dy, dstate, cast: Cast = as_is):
    """As op.py asks."""
    x, S_m, dY = Chunks(r, w, k, v, a, b, state.dtype, cast), saved, to_chunks(dy, state.dtype)
    dU, gain = x.A_q[..., x.length :].mT @ dY, dY.mT @ x.q  # (B,H,n,L,value), (B,H,n,value,key)
    D, after, Z = dstate, [], []
    for n in reversed(range(dU.shape[2])):
        D_m = D * x.e_end[:, :, n]
        after.insert(0, cast("D", D_m))
        Z.insert(0, x.solve_transposed(dU[:, :, n] + x.b[:, :, n] @ after[0].mT, n))
        D = (D_m + gain[:, :, n] + Z[0].mT @ x.a[:, :, n]) * x.e_m[:, :, n]
    D_m, Z = torch.stack(after, 2), torch.stack(Z, 2)  # (B,H,n,value,key): D~; (B,H,n,L,value)

    U = x.solve(x.A_ak @ x.V + x.a @ S_m.mT)  # (B,H,n,L,value)
    dY_Z, V_U = torch.cat([dY, Z], -2), torch.cat([x.V, U], -2)  # (B,H,n,2L,value)
    P = cast("P", (dY_Z @ V_U.mT).masked_fill_(~x.mask, 0))  # (B,H,n,2L,2L)
    dQ = P @ x.K + dY_Z @ S_m  # (B,H,n,2L,key)
    dK_i, dK_s = P.mT @ x.Q, V_U @ D_m
    dV = x.A[..., : x.length].mT @ dY_Z + x.k @ D_m.mT  # (B,H,n,L,value)
    dq, da = dQ.chunk(2, -2)  # (B,H,n,L,key)
    dk, db = (dK_i + dK_s).chunk(2, -2)

    (q_dq, a_da), inside, leaving = (x.Q * dQ).chunk(2, -2), x.K * dK_i, x.K * dK_s
    h = q_dq + a_da - sum(inside.chunk(2, -2))
    left = sum(leaving.chunk(2, -2))
    dg = h.flip(-2).cumsum(-2).flip(-2) - a_da + (left.cumsum(-2) - left) + (D_m * S_m).sum(-2, keepdim=True)
    w = w.to(state.dtype)
    dw = (from_chunks(dg, w) * (-C * torch.sigmoid(w) * torch.sigmoid(-w))).to(r.dtype)
    dr, dk, dv, da, db = (from_chunks(d, r) for d in (dq * x.e_q, dk * x.e_k, dV, da * x.e_a, db * x.e_k))
    return dr, dw, dk, dv, da, db, D
