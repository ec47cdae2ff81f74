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

    U  = (I - A_ab)^-1 (A_ak V + a~ S~^T) = U0 + W S~^T
    Y  = q~ S~^T + A_qk V + A_qb U
    S' = (S~ + V^T k~ + U^T b~) o e^(G_L-m) = (S~ + S~ M + V^T k~ + U0^T b~) o e^(G_L-m)        M = W^T b~

**Backward.** D = dL/dS', D~ = D o e^(G_L-m), dU = A_qb^T dY + b~ D~^T:

    Z  = (I - A_ab)^-T dU = Z0 + X D~^T                        the gradient of the system's right-hand side
    dL/dS = (D~ + dY^T q~ + Z^T a~) o e^m = (D~ + D~ M^T + dY^T q~ + Z0^T a~) o e^m
    P  = mask([dY ; Z] [V ; U]^T)                              dL/dA
    dQ = P K + [dY ; Z] S~      dK = P^T Q + [V ; U] D~ =: dK_i + dK_s      dV = (A^T [dY ; Z])_first L rows + k~ D~^T

and dr = e^(G-m) o dq~ and so on. g_t sits in G_s for s >= t, in E_s for s > t, and in e^(G_L):

    h    = q~ o dq~ + a~ o da~ - k~ o dk_i - b~ o db_i
    dg_t = sum_{s>=t} h_s - (a~ o da~)_t + sum_{s<t} (k~ o dk_s + b~ o db_s)_s + sum_value D~ o S~

dK is kept in its two parts because what happens inside the chunk must cancel in h, while what leaves it does not.

Saved: S~ of every chunk, N^2/L numbers per token and head. All else is computed again.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import op

L = 32
C = math.exp(-0.5)


def load() -> op.WKV7:
    """Return the operator."""
    return op.register("chunk", forward, backward, new_saved)


class Chunks:
    """What forward and backward both need of the inputs, for all chunks at once; the letters are those above."""

    def __init__(self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype):
        # An exponent near 10 rounded to float32 is an error of 3e-7 in all that it scales; Metal has no float64.
        wide = dtype if w.device.type == "mps" else torch.float64
        g = to_chunks(-C * torch.sigmoid(w.to(wide)), wide)  # (B,H,n,L,N)
        G = g.cumsum(-2)
        m = G[..., G.shape[-2] // 2, None, :]  # (B,H,n,1,N)
        self.e_q, self.e_a, self.e_k = (torch.exp(x).to(dtype) for x in (G - m, G - g - m, m - G))  # (B,H,n,L,N)
        self.e_m, self.e_end = (torch.exp(x).to(dtype) for x in (m, G[..., -1:, :] - m))  # (B,H,n,1,N)
        self.q, self.a = self.e_q * to_chunks(r, dtype), self.e_a * to_chunks(a, dtype)
        self.k, self.b = self.e_k * to_chunks(k, dtype), self.e_k * to_chunks(b, dtype)
        self.V = to_chunks(v, dtype)
        self.Q, self.K = torch.cat([self.q, self.a], -2), torch.cat([self.k, self.b], -2)  # (B,H,n,2L,N)
        self.length = length = G.shape[-2]
        lower = torch.ones(length, length, dtype=torch.bool, device=w.device).tril()
        self.mask = torch.cat([lower, lower.tril(-1)]).repeat(1, 2)  # (2L,2L)
        self.A = (self.Q @ self.K.mT).masked_fill_(~self.mask, 0)  # (B,H,n,2L,2L)
        self.A_q, (self.A_ak, self.A_ab) = self.A[..., :length, :], self.A[..., length:, :].chunk(2, -1)

    def solve(self, x: Tensor) -> Tensor:
        """(I - A_ab)^-1 x."""
        return torch.linalg.solve_triangular(-self.A_ab, x, upper=False, unitriangular=True)  # reads no diagonal

    def solve_transposed(self, x: Tensor) -> Tensor:
        """(I - A_ab)^-T x."""
        return torch.linalg.solve_triangular(-self.A_ab.mT, x, upper=True, unitriangular=True)


def to_chunks(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,T,H,N) -> (B,H,n,L,N), zeros after the last token: with g = 0 they change no state. L = T for T < 32."""
    length = min(L, x.shape[1])
    x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, -x.shape[1] % length))
    return x.unflatten(1, (-1, length)).permute(0, 3, 1, 2, 4).contiguous()


def from_chunks(x: Tensor, like: Tensor) -> Tensor:
    """(B,H,n,L,N) -> (B,T,H,N), contiguous, of the length and dtype of `like`."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : like.shape[1]].to(like.dtype).contiguous()


def new_saved(r: Tensor, state: Tensor) -> Tensor:
    """Uninitialised: one state per chunk, (B,H,n,N,N)."""
    batch, time, heads, size = r.shape
    return state.new_empty(batch, heads, -(-time // min(L, time)), size, size)


def forward(r, w, k, v, a, b, state, save):
    """As op.py asks."""
    x = Chunks(r, w, k, v, a, b, state.dtype)
    U0, W = x.solve(torch.cat([x.A_ak @ x.V, x.a], -1)).chunk(2, -1)  # (B,H,n,L,N)
    M, gain = W.mT @ x.b, x.V.mT @ x.k + U0.mT @ x.b  # (B,H,n,key,key), (B,H,n,value,key)
    S, centred = state, []
    for n in range(M.shape[2]):
        centred.append(S * x.e_m[:, :, n])
        S = (centred[-1] + centred[-1] @ M[:, :, n] + gain[:, :, n]) * x.e_end[:, :, n]
    S_m = torch.stack(centred, 2)  # (B,H,n,value,key): S~
    U = U0 + W @ S_m.mT  # (B,H,n,L,value)
    Y = x.q @ S_m.mT + x.A_q @ torch.cat([x.V, U], -2)
    return from_chunks(Y, r), S, S_m if save else state.new_empty(0)


def backward(r, w, k, v, a, b, state, saved, dy, dstate):
    """As op.py asks."""
    x, S_m, dY = Chunks(r, w, k, v, a, b, state.dtype), saved, to_chunks(dy, state.dtype)
    A_qb = x.A_q[..., x.length :]
    Z0, X = x.solve_transposed(torch.cat([A_qb.mT @ dY, x.b], -1)).chunk(2, -1)  # (B,H,n,L,N)
    M_T, gain = X.mT @ x.a, dY.mT @ x.q + Z0.mT @ x.a  # (B,H,n,key,key), (B,H,n,value,key)
    D, centred = dstate, []
    for n in reversed(range(M_T.shape[2])):
        centred.append(D * x.e_end[:, :, n])
        D = (centred[-1] + centred[-1] @ M_T[:, :, n] + gain[:, :, n]) * x.e_m[:, :, n]
    D_m = torch.stack(centred[::-1], 2)  # (B,H,n,value,key): D~

    U, Z = x.solve(x.A_ak @ x.V + x.a @ S_m.mT), Z0 + X @ D_m.mT  # (B,H,n,L,value)
    dY_Z, V_U = torch.cat([dY, Z], -2), torch.cat([x.V, U], -2)  # (B,H,n,2L,value)
    P = (dY_Z @ V_U.mT).masked_fill_(~x.mask, 0)  # (B,H,n,2L,2L)
    dQ = P @ x.K + dY_Z @ S_m  # (B,H,n,2L,key)
    dK_i, dK_s = P.mT @ x.Q, V_U @ D_m
    dV = (x.A[..., : x.length].mT @ dY_Z) + x.k @ D_m.mT  # (B,H,n,L,value)
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
