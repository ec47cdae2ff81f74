// WKV-7 on tensor cores: chunks of 32 tokens as products of bf16 matrices, summed in fp32.
//
// EQUATION, per batch entry and head: that of wkv7.cu. In a chunk of L = 32 tokens (chunk.py and README.md derive it),
// rows being tokens, S the state before the chunk, [value, key], c the cumulative log decay G after the chunk's first
// half:
//
//     q~ = r e^(G-c)    a~ = a e^(E-c)    k~ = k e^(c-G)    b~ = b e^(c-G)          E = G one token earlier
//     Q = [q~ ; a~]     K = [k~ ; b~]     A = mask(Q K^T) = [A_qk A_qb ; A_ak A_ab]          S~ = S e^c
//
//     forward    X = A_ak V + a~ S~^T           backward   dU = A_qb^T dY + b~ D~^T         D~ = D e^(G_L-c),
//                U = (I - A_ab)^-1 X                       Z  = (I - A_ab)^-T dU            D  = dL/dS'
//                Y = A_qk V + q~ S~^T + A_qb U             dV = A_qk^T dY + k~ D~^T + A_ak^T Z
//                S' = (S~ + V^T k~ + U^T b~) e^(G_L-c)     dL/dS = (D~ + dY^T q~ + Z^T a~) e^c
//
//     gradients  P = mask([dY ; Z] [V ; U]^T)   dQ = P K + [dY ; Z] S~   dK = P^T Q + [V ; U] D~   and dw, see below
//
// THE MIRROR. The backward walk is the forward walk with S, V, U, Y, Q, K, A called D, dY, Z, dV, K, Q, A^T and the two
// halves of the chunk in reverse order. So there is one walk here, template parameter MIRROR.
//
// HOW IT IS CUT. One block walks the chunks of one *segment* of one head, in order. Everything is made of 16x16 blocks.
// Of the state, X, U and Y a warp owns 16 values (of D, dU, Z, dV likewise) and holds them transposed, value by token
// or value by key: then its accumulators are, rounded, at once the left factors of its next products, no warp needs
// another's values, and the state never leaves the registers.
//
// A chunk, from barrier to barrier; what one of the four warps does:
//   factors    inputs -> Q, K in shared memory: 8 tokens (one barrier inside). The next chunk's inputs start to arrive
//   products   A: 16 of its 64 rows; then the 16x16 blocks on the diagonal of I - A_ab are inverted, in fp32, by rows
//   walk       X, U, Y, S of 16 values. FORWARD ends here
//   P          16 rows of dY and of Z, with V or with U
//   gradients  dQ, dK of 16 tokens and 32 keys, dw from them (one barrier inside); results go to memory
//
// SEGMENTS. With B*H blocks of its own every SM of a GPU is busy only from about 128 heads on. With fewer, a head's
// tokens are cut into segments that are walked at once; for that the state before each must be known. A segment maps it
// affinely, S' = S M + N, and the same walk finds both: N started from 0, M from the identity without V (TRANSITION).
// wkv7_scan then joins the segments one after another. Backward likewise, from the last segment to the first.
//
// MEMORY. `saved`, if asked for: S~ of every chunk in bf16, 256 bytes per token and head, in the order of the
// fragments. Nothing else is kept. Scratch with n > 1 segments: 3 * 16 KB each.
//
// NUMERICS. Rounded to bf16: q~ a~ k~ b~, A, the inverses, X, U, dU, Z, P, and S~, D~ where they are factors. fp32: G,
// all sums, the carried S and D, the system that is inverted, dw. `chunk.py` with `cast=to_bf16` rounds the same
// tensors, and tests compare. dw is summed from the *rounded* factors: contributions that must cancel then do. The order of all sums is fixed: no atomics, the same bits in every run with the same number of segments.
//
// LIMITS. bf16, N = 64, T >= 1 (the tail is filled with tokens that change nothing), sm_80 or newer with 99 KB of
// shared memory a block; pointers aligned to 16 bytes (the binding checks); at most 2^31 - 1 blocks a launch.
#include "blocks.cuh"

namespace {

constexpr int L = 32, WARPS = 4, THREADS = 32 * WARPS;
constexpr float MINUS_RATE = -0.60653066f;  // -e^(-1/2): log d at sigma = 1

enum Mode { FORWARD, GRADIENTS, TRANSITION, TRANSITION_MIRRORED };

struct Sizes {
    int64_t B, T, H, segment_chunks;  // the last: of a segment, but maybe the last one
    __host__ __device__ int64_t heads() const { return B * H; }
    __host__ __device__ int64_t chunks() const { return (T + L - 1) / L; }
    __host__ __device__ int64_t segments() const { return (chunks() + segment_chunks - 1) / segment_chunks; }
    __host__ __device__ int64_t cells() const { return heads() * segments(); }
    // Of the first token of a head (numbered b H + h) in [B,T,H,N].
    __device__ int64_t offset(int64_t head) const { return (head / H * T * H + head % H) * N; }
};

struct Tensors {
    const bf16 *r, *w, *k, *v, *a, *b, *dy = nullptr;
    const float* start;   // [head,segment,value,key] the state before (mirrored: the gradient after) each segment
    float* end;           // [head,value,key] the state after the last (mirrored: the gradient before the first)
    float* transitions;   // [head,segment]: N [value,key] in fp32, then M [key,key] in two bf16 parts, high and low
    uint4* saved;         // [head,chunk,warp,key / 16,lane]: S~
    bf16* out;            // y (mirrored: dv)
    bf16 *dr, *dw, *dk, *da, *db;

    explicit Tensors(const bf16* const* inputs)
        : r(inputs[0]), w(inputs[1]), k(inputs[2]), v(inputs[3]), a(inputs[4]), b(inputs[5]) {}
};

// ---------------------------------------------------------------------------------------------- shared memory

struct WalkTiles {
    Row r[L], k[L], a[L], b[L], w[2][L];  // inputs as they arrive; w of the chunk before is needed until its dw is done
    Row Q[2 * L], K[2 * L];
    Row A[2 * L];            // A_ab: below the diagonal block A; on the diagonal the inverses; above nothing is read
    Row out[L];              // Y or dV, on its way to memory
    float system[2][16 * 16];  // the blocks on the diagonal of A_ab
    float sums[WARPS][N];    // log decay of 8 tokens each
    float e_middle[N], e_end[N];  // e^c, e^(G_L-c)
    Row in[2 * L];           // V (mirrored: dY); below it, if gradients are computed, U (Z)
};
struct GradientTiles : WalkTiles {
    Row VU[2 * L], S[N], D[N];  // S~ and D~, [value,key]
    float e[L + 1][N + 8];      // e[t + 1] = e^(G_t-c), e[0] = e^(-c). (8: rows start 8 banks apart)
    float diagonal[WARPS][N];   // of D~^T S~: what 16 values each add
    float across[2][N];         // sums over the other 16 tokens of the chunk
};

// ---------------------------------------------------------------------------------------------- the stages of a chunk

// Tokens first .. first + 31 of one head's [B,T,H,N] -> tile, without waiting; zeros from token T on.
__device__ inline void fetch(Row* tile, const bf16* x, int64_t stride, int64_t first, int64_t T) {
#pragma unroll
    for (int part = 0; part < L * 8 / THREADS; part++) {
        const int n = part * THREADS + threadIdx.x, t = n / 8, column = n % 8 * 8;
        cp_async16(at(tile, t, column), x + (first + t) * stride + column, first + t < T);
    }
}
__device__ inline void write_out(const Row* tile, bf16* x, int64_t stride, int64_t first, int64_t T) {
#pragma unroll
    for (int part = 0; part < L * 8 / THREADS; part++) {
        const int n = part * THREADS + threadIdx.x, t = n / 8, column = n % 8 * 8;
        if (first + t < T) {
            *reinterpret_cast<uint4*>(x + (first + t) * stride + column) =
                *reinterpret_cast<const uint4*>(at(tile, t, column));
        }
    }
}

// sigma(x) and sigma(-x), without overflow and without 1 - sigma, which cancels.
struct Sigmoid {
    float plus, minus;
};
__device__ inline Sigmoid sigmoid(float x) {
    const float e = __expf(-fabsf(x)), large = __fdividef(1.0f, 1.0f + e), small = e * large;
    return x >= 0.0f ? Sigmoid{large, small} : Sigmoid{small, large};
}

// Inputs -> Q, K, e^c, e^(G_L-c). Each warp does 8 tokens, each lane 2 channels; one barrier inside. `tokens`: how many
// of the chunk exist; the others decay by nothing (and their r, k, a, b are zeros).
template <typename Tiles>
__device__ void factors(Tiles& tiles, const Row* w, int warp, int tokens) {
    const int j = threadIdx.x % 32 * 2, first = 8 * warp;
    float2 G[8];  // from the first of the 8 tokens on
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int t = 0; t < 8; t++) {
        const float2 logit = pair_at(w, first + t, j);
        if (first + t < tokens) {
            sum.x += MINUS_RATE * sigmoid(logit.x).plus, sum.y += MINUS_RATE * sigmoid(logit.y).plus;
        }
        G[t] = sum;
    }
    *reinterpret_cast<float2*>(&tiles.sums[warp][j]) = sum;
    __syncthreads();
    float2 before = {0.0f, 0.0f}, all = {0.0f, 0.0f}, c = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < WARPS; n++) {
        if (n == warp) before = all;
        sum = *reinterpret_cast<const float2*>(&tiles.sums[n][j]);
        all.x += sum.x, all.y += sum.y;
        if (n == WARPS / 2 - 1) c = all;
    }
    before.x -= c.x, before.y -= c.y;
    float2 e_a = {__expf(before.x), __expf(before.y)};  // e^(E-c)
    if (warp == 0) {
        *reinterpret_cast<float2*>(&tiles.e_middle[j]) = {__expf(c.x), __expf(c.y)};
        *reinterpret_cast<float2*>(&tiles.e_end[j]) = {__expf(all.x - c.x), __expf(all.y - c.y)};
        if constexpr (std::is_same_v<Tiles, GradientTiles>) *reinterpret_cast<float2*>(&tiles.e[0][j]) = e_a;
    }
#pragma unroll
    for (int t = 0; t < 8; t++) {
        const int row = first + t;
        const float2 e_q = {__expf(before.x + G[t].x), __expf(before.y + G[t].y)};
        const float2 e_k = {__fdividef(1.0f, e_q.x), __fdividef(1.0f, e_q.y)};
        const float2 r = pair_at(tiles.r, row, j), k = pair_at(tiles.k, row, j), a = pair_at(tiles.a, row, j),
                     b = pair_at(tiles.b, row, j);
        put_pair(tiles.Q, row, j, pack(e_q.x * r.x, e_q.y * r.y));
        put_pair(tiles.Q, row + L, j, pack(e_a.x * a.x, e_a.y * a.y));
        put_pair(tiles.K, row, j, pack(e_k.x * k.x, e_k.y * k.y));
        put_pair(tiles.K, row + L, j, pack(e_k.x * b.x, e_k.y * b.y));
        if constexpr (std::is_same_v<Tiles, GradientTiles>) *reinterpret_cast<float2*>(&tiles.e[row + 1][j]) = e_q;
        e_a = e_q;
    }
}

// X, U, Y or dU, Z, dV of 16 values, which their warp holds as value by token, into a tile, token by value.
__device__ inline void put_transposed(Row* tile, int row, int column, const Block (&x)[2]) {
    const Lane lane;
#pragma unroll
    for (int t = 0; t < 2; t++) {
#pragma unroll
        for (int n = 0; n < 8; n++) {
            *at(tile, row + 16 * t + lane.j + n / 4 * 8 + n % 2, column + lane.i + n / 2 % 2 * 8) =
                __float2bfloat16(x[t].x[n]);
        }
    }
}

// A or P, of which a warp computes a 16x16 block: keep what lies below the diagonal (`strict`) or on it as well.
__device__ inline void mask(Block& x, bool strict) {
    const Lane lane;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const int row = lane.i + n / 2 % 2 * 8, column = lane.j + n / 4 * 8 + n % 2;
        if (row < column + strict) x.x[n] = 0.0f;
    }
}

// The inverse of I - A_ab's 16x16 block t on the diagonal, a column a lane (of the lower 16): row i of the inverse is
// row i of the identity plus what A_ab makes of the rows above.
template <typename Tiles>
__device__ void invert(Tiles& tiles, int t) {
    const int column = threadIdx.x % 16;
    const float* system = tiles.system[t];
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
        for (int m = 0; m < i; m++) x[i] += system[16 * i + m] * x[m];
        if (threadIdx.x % 32 < 16) *at(tiles.A, L + 16 * t + i, L + 16 * t + column) = __float2bfloat16(x[i]);
    }
}

// A = mask(Q K^T), rows 16 warp ...; blocks above the diagonal are left out. A_ab's own diagonal goes to `system`.
template <typename Tiles>
__device__ void products(Tiles& tiles, int warp) {
    const int half = warp / 2, t = warp % 2;
    Factor q[4];
#pragma unroll
    for (int n = 0; n < 4; n++) q[n] = left(tiles.Q, 16 * warp, 16 * n);
#pragma unroll
    for (int source = 0; source < 2; source++) {
        for (int s = 0; s <= t; s++) {
            Block x;
#pragma unroll
            for (int n = 0; n < 4; n++) x.add(q[n], right_t(tiles.K, L * source + 16 * s, 16 * n));
            if (s == t) mask(x, half == 1);
            if (s == t && half == 1 && source == 1) {
                const Lane lane;
#pragma unroll
                for (int n = 0; n < 8; n++) {
                    tiles.system[t][(lane.i + n / 2 % 2 * 8) * 16 + lane.j + n / 4 * 8 + n % 2] = x.x[n];
                }
            } else {
                put(tiles.A, 16 * warp, L * source + 16 * s, x.round());
            }
        }
    }
    if (half == 1) {
        __syncwarp();
        invert(tiles, t);
    }
}

// The walk's direction. `half` 0 are the rows of Q or K that belong to r or k, half 1 those of a or b.
template <bool MIRROR>
struct Walk {
    // The chunk's two times 16 tokens in the order in which the walk meets them.
    __device__ static int nth(int n) { return MIRROR ? 1 - n : n; }
    // What 16 tokens t of one half get from 16 tokens s of the other: a block of A or, in the mirror, of its transpose.
    __device__ static Factor link(const Row* A, int half, int t, int source, int s) {
        return MIRROR ? right(A, L * source + 16 * s, L * half + 16 * t)
                      : right_t(A, L * half + 16 * t, L * source + 16 * s);
    }
    // From the state and from the input: X (dU) with half 1; with half 0 Y (dV) but for what U (Z) adds.
    __device__ static void begin(Block (&x)[2], int half, const Factor (&S)[4], const Factor (&in)[2], const Row* reads,
                                 const Row* A) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int t = nth(n);
#pragma unroll
            for (int m = 0; m < 4; m++) x[t].add(S[m], right_t(reads, L * half + 16 * t, 16 * m));
#pragma unroll
            for (int s = 0; s <= n; s++) x[t].add(in[nth(s)], link(A, half, t, 0, nth(s)));
        }
    }
    // U = (I - A_ab)^-1 X, or Z: by substitution, 16 tokens at a time.
    __device__ static void solve(Block (&u)[2], Block (&x)[2], const Row* A) {
        const int t = nth(0), next = nth(1);
        u[t].add(x[t].round(), link(A, 1, t, 1, t));
        x[next].add(u[t].round(), link(A, 1, next, 1, t));
        u[next].add(x[next].round(), link(A, 1, next, 1, next));
    }
    __device__ static void end(Block (&y)[2], const Factor (&u)[2], const Row* A) {
        const int t = nth(0), next = nth(1);
        y[t].add(u[t], link(A, 0, t, 1, t));
        y[next].add(u[t], link(A, 0, next, 1, t));
        y[next].add(u[next], link(A, 0, next, 1, next));
    }
};

// ---------------------------------------------------------------------------------------------- gradients

// What a warp's 16 values add to the diagonal of D~^T S~; each lane 2 keys.
__device__ inline void diagonal(GradientTiles& tiles, int warp) {
    const int j = threadIdx.x % 32 * 2;
    float2 sum = {0.0f, 0.0f};
    __syncwarp();
#pragma unroll
    for (int i = 16 * warp; i < 16 * warp + 16; i++) {
        const float2 s = pair_at(tiles.S, i, j), d = pair_at(tiles.D, i, j);
        sum.x += s.x * d.x, sum.y += s.y * d.y;
    }
    *reinterpret_cast<float2*>(&tiles.diagonal[warp][j]) = sum;
}

// P = mask([dY ; Z] [V ; U]^T), over A, which is done with. A warp: 16 tokens of dY and of Z, with V or with U.
__device__ inline void gradient_of_A(GradientTiles& tiles, int t, int source) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        for (int s = 0; s <= t; s++) {
            Block x;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                x.add(left(tiles.in, L * half + 16 * t, 16 * n), right_t(tiles.VU, L * source + 16 * s, 16 * n));
            }
            if (s == t) mask(x, half == 1);
            put(tiles.A, L * half + 16 * t, L * source + 16 * s, x.round());
        }
    }
}

// Sums over the 16 tokens of a warp's block, in one column of which a thread holds tokens i (low) and i + 8 (high): of
// this token and those behind it; or, with BEFORE, of those before it. Returns the sum of all 16.
template <bool BEFORE>
__device__ float running_sums(float& low, float& high) {
    float all[2] = {low, high}, mine[2] = {BEFORE ? 0.0f : low, BEFORE ? 0.0f : high};
    for (int bit = 4; bit < 32; bit *= 2) {
        const bool later = threadIdx.x & bit;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float other = __shfl_xor_sync(0xffffffffu, all[n], bit);
            if (later == BEFORE) mine[n] += other;
            all[n] += other;
        }
    }
    low = mine[0] + (BEFORE ? 0.0f : all[1]), high = mine[1] + (BEFORE ? all[0] : 0.0f);
    return all[0] + all[1];
}

// All gradients of a chunk but dV: this warp's 16 tokens (16 t ..) and 32 keys (16 m, m = first_m, first_m + 1).
//
//     dg_t = sum_(s >= t) h_s - (a~ da~)_t + sum_(s < t) (k~ dk_s + b~ db_s)_s + diagonal,    with
//     h = q~ dq~ + a~ da~ - k~ dk_i - b~ db_i;     dk_i, db_i are the parts that come from P, dk_s, db_s those from D~
struct Gradients {
    GradientTiles& tiles;
    const Tensors& x;
    const Row* w;
    const int t, first_m;
    const int64_t at_chunk;     // the chunk's first token in [B,T,H,N]
    const int stride, tokens;  // from a token to the next; of the chunk that exist
    Block dg[2] = {};

    // Two neighbouring numbers of a fragment, x[2 pair] and x[2 pair + 1]: their place in the chunk.
    __device__ int row(int pair) const { return 16 * t + Lane().i + pair % 2 * 8; }
    __device__ int column(int m, int pair) const { return 16 * (first_m + m) + Lane().j + pair / 2 * 8; }

    __device__ void store(bf16* out, int m, int pair, float2 x) const {
        bf16* place = out + at_chunk + (row(pair) * stride + column(m, pair));
        if (row(pair) < tokens) *reinterpret_cast<uint32_t*>(place) = pack(x.x, x.y);
    }

    // dr dk da db of 16 keys, and dg but for the other 16 tokens' part and the diagonal. dx: of q, a or of k, b.
    __device__ void begin(int m) {
        Block h, a_da, leaving;
        {
            Block dx[2];
#pragma unroll
            for (int source = 0; source < 2; source++) {
                for (int s = 0; s <= t; s++) {
                    const Factor k = right(tiles.K, L * source + 16 * s, 16 * (first_m + m));
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        dx[half].add(left(tiles.A, L * half + 16 * t, L * source + 16 * s), k);
                    }
                }
            }
#pragma unroll 2  // all 4 at once take more registers than there are
            for (int n = 0; n < 4; n++) {
                const Factor s = right(tiles.S, 16 * n, 16 * (first_m + m));
#pragma unroll
                for (int half = 0; half < 2; half++) dx[half].add(left(tiles.in, L * half + 16 * t, 16 * n), s);
            }
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                const float2 q = pair_at(tiles.Q, row(pair), column(m, pair)),
                             a = pair_at(tiles.Q, row(pair) + L, column(m, pair)),
                             e_a = *reinterpret_cast<const float2*>(&tiles.e[row(pair)][column(m, pair)]),
                             e_q = *reinterpret_cast<const float2*>(&tiles.e[row(pair) + 1][column(m, pair)]);
                const float *dq = dx[0].x + 2 * pair, *da = dx[1].x + 2 * pair;
                store(x.dr, m, pair, {e_q.x * dq[0], e_q.y * dq[1]});
                store(x.da, m, pair, {e_a.x * da[0], e_a.y * da[1]});
                a_da.x[2 * pair] = a.x * da[0], a_da.x[2 * pair + 1] = a.y * da[1];
                h.x[2 * pair] = q.x * dq[0] + a.x * da[0], h.x[2 * pair + 1] = q.y * dq[1] + a.y * da[1];
            }
        }
        Block dx[2];
        const auto times_K = [&](int pair) {  // k~ dk~ + b~ db~, as they stand now
            const float2 k = pair_at(tiles.K, row(pair), column(m, pair)),
                         b = pair_at(tiles.K, row(pair) + L, column(m, pair));
            const float *dk = dx[0].x + 2 * pair, *db = dx[1].x + 2 * pair;
            return float2{k.x * dk[0] + b.x * db[0], k.y * dk[1] + b.y * db[1]};
        };
#pragma unroll
        for (int half = 0; half < 2; half++) {
            for (int s = t; s < 2; s++) {
                const Factor q = right(tiles.Q, L * half + 16 * s, 16 * (first_m + m));
#pragma unroll
                for (int source = 0; source < 2; source++) {
                    dx[source].add(left_t(tiles.A, L * half + 16 * s, L * source + 16 * t), q);
                }
            }
        }
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
            const float2 inside = times_K(pair);
            leaving.x[2 * pair] = -inside.x, leaving.x[2 * pair + 1] = -inside.y;
            h.x[2 * pair] -= inside.x, h.x[2 * pair + 1] -= inside.y;
        }
#pragma unroll 2  // all 4 at once take more registers than there are
        for (int n = 0; n < 4; n++) {
            const Factor d = right(tiles.D, 16 * n, 16 * (first_m + m));
#pragma unroll
            for (int source = 0; source < 2; source++) dx[source].add(left(tiles.VU, L * source + 16 * t, 16 * n), d);
        }
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
            const float2 all = times_K(pair),
                         e_q = *reinterpret_cast<const float2*>(&tiles.e[row(pair) + 1][column(m, pair)]),
                         e_k = {__fdividef(1.0f, e_q.x), __fdividef(1.0f, e_q.y)};
            const float *dk = dx[0].x + 2 * pair, *db = dx[1].x + 2 * pair;
            store(x.dk, m, pair, {e_k.x * dk[0], e_k.y * dk[1]});
            store(x.db, m, pair, {e_k.x * db[0], e_k.y * db[1]});
            leaving.x[2 * pair] += all.x, leaving.x[2 * pair + 1] += all.y;
        }
#pragma unroll
        for (int n = 0; n < 8; n++) {
            if (n / 2 % 2) continue;  // a column has its upper 8 tokens in x[n], the lower 8 in x[n + 2]
            const float behind = running_sums<false>(h.x[n], h.x[n + 2]);
            const float before = running_sums<true>(leaving.x[n], leaving.x[n + 2]);
            if (Lane().i == 0) tiles.across[t][column(m, n / 2) + n % 2] = t == 1 ? behind : before;
        }
#pragma unroll
        for (int n = 0; n < 8; n++) dg[m].x[n] = h.x[n] - a_da.x[n] + leaving.x[n];
    }

    // dw, after a barrier.
    __device__ void end(int m) const {
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
            const int j = column(m, pair);
            const float2 logit = pair_at(w, row(pair), j);
            float2 dw = {dg[m].x[2 * pair] + tiles.across[1 - t][j], dg[m].x[2 * pair + 1] + tiles.across[1 - t][j + 1]};
#pragma unroll
            for (int n = 0; n < WARPS; n++) dw.x += tiles.diagonal[n][j], dw.y += tiles.diagonal[n][j + 1];
            const Sigmoid x0 = sigmoid(logit.x), x1 = sigmoid(logit.y);
            store(x.dw, m, pair, {dw.x * MINUS_RATE * x0.plus * x0.minus, dw.y * MINUS_RATE * x1.plus * x1.minus});
        }
    }
};

// ---------------------------------------------------------------------------------------------- the walk

template <Mode MODE>
struct Traits {
    static constexpr bool mirror = MODE == GRADIENTS || MODE == TRANSITION_MIRRORED;
    static constexpr bool transition = MODE == TRANSITION || MODE == TRANSITION_MIRRORED;
    static constexpr bool gradients = MODE == GRADIENTS;
    using Tiles = std::conditional_t<gradients, GradientTiles, WalkTiles>;
    // Without gradients the lower half of `in`, which is the last member, is not used.
    static constexpr size_t smem = sizeof(Tiles) - (gradients ? 0 : sizeof(Row) * L);
};

// A warp's 16 rows of a state [value,key] in fp32.
__device__ inline void set_identity(Block (&S)[4], int warp) {
    const Lane lane;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const bool on_it = lane.i + n / 2 % 2 * 8 == lane.j + n / 4 * 8 + n % 2;
#pragma unroll
        for (int m = 0; m < 4; m++) S[m].x[n] = on_it && m == warp ? 1.0f : 0.0f;
    }
}
__device__ inline void store_split(const Block (&S)[4], bf16* parts, int warp) {
    const Lane lane;
#pragma unroll
    for (int m = 0; m < 4; m++) {
        Factor part[2];
        split(S[m], part[0], part[1]);
#pragma unroll
        for (int p = 0; p < 2; p++) {
#pragma unroll
            for (int n = 0; n < 4; n++) {
                bf16* place = parts + p * N * N + (16 * warp + lane.i + n % 2 * 8) * N + 16 * m + lane.j + n / 2 * 8;
                *reinterpret_cast<uint32_t*>(place) = part[p].x[n];  // (by memcpy it would be four stores of a byte)
            }
        }
    }
}

// So many blocks fit into the 227 KB of an H100's multiprocessor; registers must suffice for them too.
template <Mode MODE>
__global__ void __launch_bounds__(THREADS, MODE == GRADIENTS ? 2 : 3) wkv7_walk_kernel(Sizes sizes, Tensors x) {
    using M = Traits<MODE>;
    using Direction = Walk<M::mirror>;
    typename M::Tiles& tiles = *reinterpret_cast<typename M::Tiles*>(dyn_smem());
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // so that nvcc knows it is the same in all lanes
    // Of each head all segments; but nothing asks how the walk's last one changes the state.
    const int64_t each = sizes.segments() - M::transition, block = M::transition ? blockIdx.x / 2 : blockIdx.x;
    const bool identity = M::transition && blockIdx.x % 2;  // start from the identity, without input
    const int64_t head = block / each, segment = block % each + (MODE == TRANSITION_MIRRORED);
    const int64_t cell = head * sizes.segments() + segment;
    const int64_t first = segment * sizes.segment_chunks, end = lesser(first + sizes.segment_chunks, sizes.chunks());
    const int64_t T = sizes.T, stride = sizes.H * N, offset = sizes.offset(head);
    Row* const reads = M::mirror ? tiles.K : tiles.Q;   // what the state is multiplied with
    Row* const writes = M::mirror ? tiles.Q : tiles.K;  // and what is written into it
    const float* e_before = M::mirror ? tiles.e_end : tiles.e_middle;
    const float* e_after = M::mirror ? tiles.e_middle : tiles.e_end;

    const auto token_of = [&](int64_t n) { return L * (M::mirror ? end - 1 - n : first + n); };
    const auto prefetch = [&](int64_t n) {
        if (first + n < end) {
            fetch(tiles.r, x.r + offset, stride, token_of(n), T), fetch(tiles.k, x.k + offset, stride, token_of(n), T);
            fetch(tiles.a, x.a + offset, stride, token_of(n), T), fetch(tiles.b, x.b + offset, stride, token_of(n), T);
            fetch(tiles.w[n % 2], x.w + offset, stride, token_of(n), T);
        }
        cp_async_commit();
    };

    Block S[4];  // mirrored: D
    if (!M::transition) load_state(S, x.start + cell * N * N, warp);
    if (identity) set_identity(S, warp);
    prefetch(0);
    for (int64_t n = 0; first + n < end; n++) {
        const int64_t token = token_of(n);
        const int tokens = static_cast<int>(lesser(T - token, L));
        cp_async_wait<0>();
        __syncthreads();  // inputs are here; all is done with the chunk before
        if (!M::transition && n > 0) write_out(tiles.out, x.out + offset, stride, token_of(n - 1), T);
        fetch(tiles.in, (M::mirror ? x.dy : x.v) + offset, stride, token, identity ? 0 : T);
        if constexpr (M::gradients) fetch(tiles.VU, x.v + offset, stride, token, T);
        cp_async_commit();
        factors(tiles, tiles.w[n % 2], warp, tokens);
        __syncthreads();
        prefetch(n + 1);
        products(tiles, warp);
        cp_async_wait<1>();
        __syncthreads();

        uint4* saved = x.saved + ((head * sizes.chunks() + token / L) * WARPS + warp) * 4 * 32 + threadIdx.x % 32;
        Factor before[4];  // S~; mirrored: D~
        if constexpr (M::gradients) {
#pragma unroll
            for (int m = 0; m < 4; m++) {
                const uint4 s = saved[32 * m];
                before[m] = {{s.x, s.y, s.z, s.w}};
                put(tiles.S, 16 * warp, 16 * m, before[m]);
            }
            Block X[2], U[2];
            const Factor V[2] = {left_t(tiles.VU, 0, 16 * warp), left_t(tiles.VU, 16, 16 * warp)};
            Walk<false>::begin(X, 1, before, V, tiles.Q, tiles.A);
            Walk<false>::solve(U, X, tiles.A);
            put_transposed(tiles.VU, L, 16 * warp, U);
        }
#pragma unroll
        for (int m = 0; m < 4; m++) {
            S[m].scale_columns(e_before + 16 * m);
            before[m] = S[m].round();
            if constexpr (M::gradients) put(tiles.D, 16 * warp, 16 * m, before[m]);
            if (MODE == FORWARD && x.saved) {
                const uint32_t(&s)[4] = before[m].x;
                saved[32 * m] = {s[0], s[1], s[2], s[3]};
            }
        }
        if constexpr (M::gradients) diagonal(tiles, warp);
        const Factor in[2] = {left_t(tiles.in, 0, 16 * warp), left_t(tiles.in, 16, 16 * warp)};
        Block X[2], U[2];  // mirrored: dU, Z
        Direction::begin(X, 1, before, in, reads, tiles.A);
        Direction::solve(U, X, tiles.A);
        const Factor u[2] = {U[0].round(), U[1].round()};
        if constexpr (M::gradients) put_transposed(tiles.in, L, 16 * warp, U);
        if constexpr (!M::transition) {
            Block Y[2];  // mirrored: dV
            Direction::begin(Y, 0, before, in, reads, tiles.A);
            Direction::end(Y, u, tiles.A);
            put_transposed(tiles.out, 0, 16 * warp, Y);
        }
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int t = 0; t < 2; t++) {
                S[m].add(in[t], right(writes, 16 * t, 16 * m));
                S[m].add(u[t], right(writes, L + 16 * t, 16 * m));
            }
            S[m].scale_columns(e_after + 16 * m);
        }
        if constexpr (M::gradients) {
            __syncthreads();
            gradient_of_A(tiles, warp % 2, warp / 2);
            __syncthreads();
            Gradients d{tiles, x, tiles.w[n % 2], warp % 2, warp / 2 * 2, offset + token * stride,
                        static_cast<int>(stride), tokens};
            d.begin(0), d.begin(1);
            __syncthreads();
            d.end(0), d.end(1);
        }
    }
    cp_async_wait<0>();
    if constexpr (M::transition) {
        float* to = x.transitions + cell * 2 * N * N;
        identity ? store_split(S, reinterpret_cast<bf16*>(to + N * N), warp) : store_state(S, to, warp);
    } else {
        __syncthreads();
        write_out(tiles.out, x.out + offset, stride, token_of(end - first - 1), T);
        if (segment == (M::mirror ? 0 : sizes.segments() - 1)) store_state(S, x.end + head * N * N, warp);
    }
}

// ---------------------------------------------------------------------------------------------- joining segments

struct ScanTiles {
    Row M[2][2][N];  // of this segment and of the next; high and low part
};

// The state before (mirrored: the gradient after) every segment: S <- S M + N from one to the next. A block does a
// head, a warp 16 rows. S and M are each taken as two bf16 parts, which is as good as 16 bits: their low parts' product
// is left out.
template <bool MIRROR>
__global__ void __launch_bounds__(THREADS)
wkv7_scan_kernel(Sizes sizes, const float* state, const float* transitions, float* start) {
    ScanTiles& tiles = *reinterpret_cast<ScanTiles*>(dyn_smem());
    const int warp = threadIdx.x / 32;
    const int64_t head = blockIdx.x, segments = sizes.segments();
    const auto cell = [&](int64_t n) { return head * segments + (MIRROR ? segments - 1 - n : n); };
    const auto fetch_M = [&](int64_t n) {
        const bf16* parts = reinterpret_cast<const bf16*>(transitions + (2 * cell(n) + 1) * N * N);
        for (int i = threadIdx.x; n < segments - 1 && i < 2 * N * 8; i += THREADS) {
            cp_async16(at(tiles.M[n % 2][0], i / 8, i % 8 * 8), parts + i * 8, true);
        }
        cp_async_commit();
    };
    Block S[4];
    load_state(S, state + head * N * N, warp);
    fetch_M(0);
    for (int64_t n = 0; n < segments - 1; n++) {
        store_state(S, start + cell(n) * N * N, warp);
        fetch_M(n + 1);
        Factor high[4], low[4];
#pragma unroll
        for (int m = 0; m < 4; m++) split(S[m], high[m], low[m]);
        load_state(S, transitions + 2 * cell(n) * N * N, warp);
        cp_async_wait<1>();
        __syncthreads();
        const Row *M_high = tiles.M[n % 2][0], *M_low = tiles.M[n % 2][1];
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const Factor M = right(M_high, 16 * i, 16 * m);
                S[m].add(high[i], M), S[m].add(low[i], M), S[m].add(high[i], right(M_low, 16 * i, 16 * m));
            }
        }
        __syncthreads();
    }
    cp_async_wait<0>();
    store_state(S, start + cell(segments - 1) * N * N, warp);
}

// ---------------------------------------------------------------------------------------------- launches

// scratch: [head,segment] transitions, then [head,segment] starts; unused with one segment.
template <Mode MODE>
int run(Sizes sizes, Tensors x, const float* state, float* scratch, void* stream) {
    constexpr bool MIRROR = Traits<MODE>::mirror;
    constexpr Mode CROSS = MIRROR ? TRANSITION_MIRRORED : TRANSITION;
    x.start = state;
    if (sizes.segments() > 1) {
        float* start = scratch + sizes.cells() * 2 * N * N;
        x.start = start, x.transitions = scratch;
        int error = launch(wkv7_walk_kernel<CROSS>, 2 * (sizes.cells() - sizes.heads()), THREADS, Traits<CROSS>::smem,
                           stream, sizes, x);
        if (error) return error;
        error = launch(wkv7_scan_kernel<MIRROR>, sizes.heads(), THREADS, sizeof(ScanTiles), stream, sizes, state,
                       static_cast<const float*>(scratch), start);
        if (error) return error;
    }
    return launch(wkv7_walk_kernel<MODE>, sizes.cells(), THREADS, Traits<MODE>::smem, stream, sizes, x);
}

static_assert(sizeof(GradientTiles) <= 99 * 1024, "consumer cards have no more");

}  // namespace

// C interface, bound in fast.py. `inputs` and `grads` are arrays of six pointers in the order r w k v a b, to bf16;
// states and scratch are fp32; `saved` may be null in the forward. Each function returns the cudaError_t of its
// launches.
extern "C" {

int wkv7_fast_forward(int64_t B, int64_t T, int64_t H, int64_t segment_chunks, const bf16* const* inputs,
                      const float* state, bf16* y, float* state_T, void* saved, float* scratch, void* stream) {
    Tensors x(inputs);
    x.out = y, x.end = state_T, x.saved = static_cast<uint4*>(saved);
    return run<FORWARD>({B, T, H, segment_chunks}, x, state, scratch, stream);
}

int wkv7_fast_backward(int64_t B, int64_t T, int64_t H, int64_t segment_chunks, const bf16* const* inputs, void* saved,
                       const bf16* dy, const float* dstate_T, bf16* const* grads, float* dstate, float* scratch,
                       void* stream) {
    Tensors x(inputs);
    x.dy = dy, x.saved = static_cast<uint4*>(saved), x.end = dstate, x.out = grads[3];
    x.dr = grads[0], x.dw = grads[1], x.dk = grads[2], x.da = grads[4], x.db = grads[5];
    return run<GRADIENTS>({B, T, H, segment_chunks}, x, dstate_T, scratch, stream);
}

const char* wkv7_fast_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // extern "C"
