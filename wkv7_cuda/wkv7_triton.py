"""WKV-7 in Triton: four kernels that do what chunk.py does, in its letters. triton.py launches them.

Definitions and derivation stand in chunk.py and README.md, "The chunk algebra". Rows are tokens, S is the state before
the chunk and D the gradient of the one after it, both [value, key], and

    q~ a~ k~ b~    r a k b, decayed to the chunk's middle (m = G there): a~ = a o e^(E-m), k~ = k o e^(m-G) ...
    S~ = S o e^m    D~ = D o e^(G_L-m)    A_ab = stril(a~ b~^T)    A_ak = stril(a~ k~^T)    A_qb = tril(q~ b~^T)
    J  = (I - A_ab)^-1

The chunk as a map of the state, and its mirror image that carries the gradient back, are one formula twice:

    S' = (S~ + S~ M + gain) o e^(G_L-m)     M = (J a~)^T b~      gain = V^T k~  + (J A_ak V)^T b~
    D' = (D~ + D~ M + gain) o e^m           M = (J^T b~)^T a~    gain = dY^T q~ + (J^T A_qb^T dY)^T a~

| kernel | a program is | reads | writes |
|---|---|---|---|
| `transitions` | a chunk of a head | inputs (mirrored: dY) | M, gain, the two decays, J |
| `walk` | 16 values of a head, chunk after chunk | M, gain, decays | S~ (D~) of every chunk; the last state |
| `outputs` | a chunk of a head | inputs, S~, J | Y |
| `gradients` | a chunk of a head | inputs, dY, S~, D~, J | dr dw dk dv da db |

forward = transitions, walk, outputs; backward = transitions and walk mirrored, gradients. Only `walk` is sequential,
and a step of it is one product. Each number is written by one program, no atomics: the same bits in every run.

**Numerics.** A chunk is L = 32 tokens, or 16 where operands are fp32: larger tiles would not fit the registers, and no
exponent then exceeds 5, whose rounding to fp32 is an error of 2e-7. All sums, the carried state, exponents, A_ab, the
substitution that finds J, and dw are fp32. Factors of products, called operands, are

| inputs | operands | because |
|---|---|---|
| fp32 | fp32, products exact ("ieee") | the precise mode |
| bf16 | bf16 | the tensor core's type; rounding the inputs to it has cost as much already |
| fp16 | fp32 rounded to 11 bits, in TF32 | fp16 is too narrow for k~, up to e^5 k, and gradients; bf16 drops 3 bits |

In dw pairs of terms must cancel; they do if q~, k~ ... and P are the very numbers that entered the products: hence all
terms use the rounded ones. J is found by substitution, never by powers of A_ab (see README.md, step 4).
"""

import triton
import triton.language as tl

C = tl.constexpr(0.6065306597126334)  # e^(-1/2)


@triton.jit
def operand(x, IO: tl.constexpr):
    """fp32 -> what a product may read, for inputs of dtype IO."""
    if IO == tl.bfloat16:
        return x.to(tl.bfloat16)
    elif IO == tl.float16:  # the nearest number with 11 significant bits
        return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def dot(x, y, IO: tl.constexpr):
    """Product of two operands (or, in `solved`, of two fp32 matrices), accumulated in fp32."""
    return tl.dot(x, y, input_precision="ieee" if IO == tl.float32 else "tf32")


@triton.jit
def at_token(n, head, H, N: tl.constexpr, L: tl.constexpr, T):
    """Offsets (L,N) of chunk n into a (B,T,H,N) tensor, and which of them exist. head: b H + h."""
    t = n * L + tl.arange(0, L)
    rows = ((head // H) * T + t) * H + head % H
    return rows.to(tl.int64)[:, None] * N + tl.arange(0, N)[None, :], (t < T)[:, None] & (tl.arange(0, N) < N)[None, :]


@triton.jit
def row(x, i, L: tl.constexpr):
    """Row i of (L,N), as (N)."""
    return tl.sum(tl.where((tl.arange(0, L) == i)[:, None], x, 0.0), 0)


@triton.jit
def decays(w, at, exists, L: tl.constexpr):
    """e^(G-m), e^(E-m), e^(m-G), all (L,N); e^m, e^(G_L-m), (N). A token that does not exist has g = 0."""
    g = tl.where(exists, 1 / (1 + tl.exp(-tl.load(w + at, exists, 0.0).to(tl.float32))) * -C, 0.0)
    G = tl.cumsum(g, 0)
    m = row(G, L // 2, L)
    from_m = G - m[None, :]
    e_q, e_a, e_k = tl.exp(from_m), tl.exp(from_m - g), tl.exp(-from_m)
    return e_q, e_a, e_k, tl.exp(m), tl.exp(row(from_m, L - 1, L))


@triton.jit
def tile(x, at, exists, factor):
    """`factor` times the tile at `at`, as an operand; zero where there is no token."""
    return operand(tl.load(x + at, exists, 0.0).to(tl.float32) * factor, x.dtype.element_ty)


@triton.jit
def lower(x, L: tl.constexpr, DIAGONAL: tl.constexpr):
    """x (L,L) on and below the diagonal, or only below; zero elsewhere."""
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    return tl.where(i >= j if DIAGONAL else i > j, x, 0.0)


@triton.jit
def solved(A, L: tl.constexpr, IO: tl.constexpr):
    """J = (I - A)^-1 for A strictly lower triangular (L,L), in fp32, for L = 16 or 32.

    First its diagonal blocks of 16 by substitution, all at once: row i of each is e_i + sum_j A[i,j] (row j).
    With these as J_0, I - A = J_0^-1 - A_o, A_o the block below them; (J_0 A_o)^2 = 0, so J = J_0 + J_0 A_o J_0.
    """
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    same_block = i // 16 == j // 16
    A_T = tl.trans(tl.where(same_block, A, 0.0))
    J = tl.where(i == j, 1.0, 0.0)
    for s in range(1, 16):
        weights = tl.sum(tl.where(j % 16 == s, A_T, 0.0), 1)  # (L): A[s,j], each j within its block
        new = tl.sum(weights[:, None] * J, 0)[None, :]  # (1,L)
        J += tl.where((i % 16 == s) & same_block, new, 0.0)
    if L > 16:
        A_o = tl.where(same_block, 0.0, A)
        J += dot(dot(J, A_o, IO), J, IO)
    return J


@triton.jit(do_not_specialize=["T", "H"])
def transitions(
    r, w, k, v, a, b, M, gain, decay_in, decay_out, J, T, H, N: tl.constexpr, L: tl.constexpr, MIRRORED: tl.constexpr
):
    """M (N,N), gain (value,key), decays (N), J (L,L) of every chunk. Mirrored: of the gradient's map, with v = dY."""
    IO: tl.constexpr = r.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(T, L)
    at, exists = at_token(chunk % chunks, chunk // chunks, H, N, L, T)
    e_q, e_a, e_k, e_m, e_end = decays(w, at, exists, L)
    a_, b_ = tile(a, at, exists, e_a), tile(b, at, exists, e_k)
    V = tile(v, at, exists, 1.0)
    J_ = operand(solved(lower(dot(a_, tl.trans(b_), IO), L, False), L, IO), IO)  # (the same for all kernels)
    i, j, keys = tl.arange(0, L), tl.arange(0, L), tl.arange(0, N)
    tl.store(J + chunk * L * L + i[:, None] * L + j[None, :], J_.to(J.dtype.element_ty))
    if MIRRORED:
        write = tile(r, at, exists, e_q)  # q~, what dY is written under
        right = dot(operand(tl.trans(lower(dot(write, tl.trans(b_), IO), L, True)), IO), V, IO)  # A_qb^T dY
        read, again, J_ = b_, a_, tl.trans(J_)
        tl.store(decay_in + chunk * N + keys, e_end)
        tl.store(decay_out + chunk * N + keys, e_m)
    else:
        write = tile(k, at, exists, e_k)  # k~, what V is written under
        right = dot(operand(lower(dot(a_, tl.trans(write), IO), L, False), IO), V, IO)  # A_ak V
        read, again = a_, b_
        tl.store(decay_in + chunk * N + keys, e_m)
        tl.store(decay_out + chunk * N + keys, e_end)
    U0 = operand(dot(J_, operand(right, IO), IO), IO)  # (L,value)
    W = operand(dot(J_, read, IO), IO)  # (L,key)
    square = chunk * N * N + keys[:, None] * N + keys[None, :]
    tl.store(M + square, dot(tl.trans(W), again, IO).to(M.dtype.element_ty))
    tl.store(gain + square, dot(tl.trans(V), write, IO) + dot(tl.trans(U0), again, IO))


@triton.jit(do_not_specialize=["chunks"])
def walk(
    start, M, gain, decay_in, decay_out, centred, end, chunks, like,
    N: tl.constexpr, VALUES: tl.constexpr, MIRRORED: tl.constexpr,
):  # fmt: skip
    """S (or D) from `start` through all chunks to `end`, both (B,H,value,key); S~ (D~) of every chunk to `centred`."""
    IO: tl.constexpr = like.dtype.element_ty
    head = tl.program_id(0).to(tl.int64) // (N // VALUES)
    values = tl.program_id(0) % (N // VALUES) * VALUES + tl.arange(0, VALUES)
    keys = tl.arange(0, N)
    some = values[:, None] * N + keys[None, :]  # (VALUES,N) of a state
    square = keys[:, None] * N + keys[None, :]
    S = tl.load(start + head * N * N + some)
    for step in range(chunks):
        chunk = head * chunks + (chunks - 1 - step if MIRRORED else step)
        S *= tl.load(decay_in + chunk * N + keys)[None, :]
        S_m = operand(S, IO)
        tl.store(centred + chunk * N * N + some, S_m)
        S += dot(S_m, operand(tl.load(M + chunk * N * N + square), IO), IO)
        S += tl.load(gain + chunk * N * N + some)
        S *= tl.load(decay_out + chunk * N + keys)[None, :]
    tl.store(end + head * N * N + some, S)


@triton.jit(do_not_specialize=["T", "H"])
def outputs(r, w, k, v, a, b, centred, J, y, T, H, N: tl.constexpr, L: tl.constexpr):
    """U = J (A_ak V + a~ S~^T), Y = q~ S~^T + A_qk V + A_qb U."""
    IO: tl.constexpr = r.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(T, L)
    at, exists = at_token(chunk % chunks, chunk // chunks, H, N, L, T)
    e_q, e_a, e_k, _, _ = decays(w, at, exists, L)
    q_, a_ = tile(r, at, exists, e_q), tile(a, at, exists, e_a)
    k_, b_ = tile(k, at, exists, e_k), tile(b, at, exists, e_k)
    V = tile(v, at, exists, 1.0)
    i, keys = tl.arange(0, L), tl.arange(0, N)
    S_T = tl.load(centred + chunk * N * N + keys[None, :] * N + keys[:, None])  # (key,value): S~^T
    J_ = tl.load(J + chunk * L * L + i[:, None] * L + i[None, :])
    A_ak = operand(lower(dot(a_, tl.trans(k_), IO), L, False), IO)
    U = operand(dot(J_, operand(dot(A_ak, V, IO) + dot(a_, S_T, IO), IO), IO), IO)
    A_qk = operand(lower(dot(q_, tl.trans(k_), IO), L, True), IO)
    A_qb = operand(lower(dot(q_, tl.trans(b_), IO), L, True), IO)
    Y = dot(q_, S_T, IO) + dot(A_qk, V, IO) + dot(A_qb, U, IO)
    tl.store(y + at, Y.to(IO), exists)


@triton.jit(do_not_specialize=["T", "H"])
def gradients(
    r, w, k, v, a, b, dy, S, D, J, dr, dw, dk, dv, da, db, T, H, N: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """The six gradients of a chunk, from S~ and D~; the equations are chunk.py's, in its order."""
    IO: tl.constexpr = r.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(T, L)
    at, exists = at_token(chunk % chunks, chunk // chunks, H, N, L, T)
    e_q, e_a, e_k, _, _ = decays(w, at, exists, L)
    q_, a_ = tile(r, at, exists, e_q), tile(a, at, exists, e_a)
    k_, b_ = tile(k, at, exists, e_k), tile(b, at, exists, e_k)
    V, dY = tile(v, at, exists, 1.0), tile(dy, at, exists, 1.0)
    i, keys = tl.arange(0, L), tl.arange(0, N)
    square = chunk * N * N + keys[:, None] * N + keys[None, :]
    S_m, D_m = tl.load(S + square), tl.load(D + square)  # (value,key): S~, D~
    J_ = tl.load(J + chunk * L * L + i[:, None] * L + i[None, :])

    # U = J (A_ak V + a~ S~^T)    Z = J^T (A_qb^T dY + b~ D~^T)    dV = A_qk^T dY + A_ak^T Z + k~ D~^T
    A_ak = operand(lower(dot(a_, tl.trans(k_), IO), L, False), IO)
    A_qb = operand(lower(dot(q_, tl.trans(b_), IO), L, True), IO)
    A_qk = operand(lower(dot(q_, tl.trans(k_), IO), L, True), IO)
    U = operand(dot(J_, operand(dot(A_ak, V, IO) + dot(a_, tl.trans(S_m), IO), IO), IO), IO)
    dU = operand(dot(tl.trans(A_qb), dY, IO) + dot(b_, tl.trans(D_m), IO), IO)
    Z = operand(dot(tl.trans(J_), dU, IO), IO)
    dV = dot(tl.trans(A_qk), dY, IO) + dot(tl.trans(A_ak), Z, IO) + dot(k_, tl.trans(D_m), IO)
    tl.store(dv + at, dV.to(IO), exists)

    # P = mask([dY ; Z] [V ; U]^T)    dQ = P K + [dY ; Z] S~    dK_i = P^T Q    dK_s = [V ; U] D~
    P_qk = operand(lower(dot(dY, tl.trans(V), IO), L, True), IO)
    P_qb = operand(lower(dot(dY, tl.trans(U), IO), L, True), IO)
    P_ak = operand(lower(dot(Z, tl.trans(V), IO), L, False), IO)
    P_ab = operand(lower(dot(Z, tl.trans(U), IO), L, False), IO)
    d = dot(P_qk, k_, IO) + dot(P_qb, b_, IO) + dot(dY, S_m, IO)
    tl.store(dr + at, (d * e_q).to(IO), exists)
    h = q_.to(tl.float32) * d
    d = dot(P_ak, k_, IO) + dot(P_ab, b_, IO) + dot(Z, S_m, IO)
    tl.store(da + at, (d * e_a).to(IO), exists)
    a_da = a_.to(tl.float32) * d
    h += a_da
    inside, leaving = dot(tl.trans(P_qk), q_, IO) + dot(tl.trans(P_ak), a_, IO), dot(V, D_m, IO)
    tl.store(dk + at, ((inside + leaving) * e_k).to(IO), exists)
    h -= k_.to(tl.float32) * inside
    left = k_.to(tl.float32) * leaving
    inside, leaving = dot(tl.trans(P_qb), q_, IO) + dot(tl.trans(P_ab), a_, IO), dot(U, D_m, IO)
    tl.store(db + at, ((inside + leaving) * e_k).to(IO), exists)
    h -= b_.to(tl.float32) * inside
    left += b_.to(tl.float32) * leaving

    # dg_t = sum_{s>=t} h_s - (a~ o da~)_t + sum_{s<t} left_s + sum_value D~ o S~
    through = tl.sum(D_m.to(tl.float32) * S_m.to(tl.float32), 0)
    dg = tl.cumsum(h, 0, reverse=True) - a_da + (tl.cumsum(left, 0) - left) + through[None, :]
    w_ = tl.load(w + at, exists, 0.0).to(tl.float32)
    slope = 1 / ((1 + tl.exp(-w_)) * (1 + tl.exp(w_)))  # sigma(w) sigma(-w)
    tl.store(dw + at, (dg * slope * -C).to(IO), exists)
