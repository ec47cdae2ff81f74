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
//   products   A_qk, A_qb, A_ak or A_ab; the warp that has A_ab inverts the 16x16 blocks on the diagonal of I - A_ab
//   walk       X, U, Y, S of 16 values. FORWARD ends here
//   P          P_qk, P_qb, P_ak or P_ab
//   gradients  dQ, dK of 16 keys, dw from them; results go to memory
//
// LATENCY is what a block of four warps has too much of: within a stage nothing should wait that need not. So what is
// computed depends on no branch but the inverse; inputs are read before results are written, since the compiler does
// not know that they lie apart; and products that do not need each other stand side by side.
//
// SEGMENTS. With a block for each of B*H heads, SMs of a large GPU are idle unless there are many heads. With fewer, a
// head's tokens are cut into segments that are walked at once; for that the state before each must be known. A segment
// maps it affinely, S' = S M + N, and the same walk finds both at once (TRANSITION): N is what becomes of 0, M what
// becomes of the identity without V. wkv7_scan then joins the segments. Backward likewise, from the last segment to the
// first.
//
// MEMORY. `saved`, if asked for: S~ of every chunk in bf16, 256 bytes per token and head, in the order of the
// fragments. Nothing else is kept. Scratch with n > 1 segments: 3 * 16 KB each.
//
// NUMERICS. Rounded to bf16: q~ a~ k~ b~, A, the inverses, X, U, dU, Z, P, and S~, D~ where they are factors. fp32: G,
// all sums, the carried S and D, the system that is inverted, dw. `chunk.py` with `cast=to_bf16` rounds the same
// tensors, and tests compare. dw is summed from the *rounded* factors: contributions that must cancel then do. The
// order of all sums is fixed: no atomics, the same bits in every run with the same number of segments.
//
// LIMITS. bf16, N = 64, T >= 1 (the tail is filled with tokens that change nothing), sm_80 or newer with 99 KB of
// shared memory a block; pointers aligned to 16 bytes (the binding checks); H < 2^20, at most 2^31 - 1 blocks a launch.
#include "blocks.cuh"

namespace {

constexpr float MINUS_RATE = -0.60653066f;  // -e^(-1/2): log d at sigma = 1

enum Mode { FORWARD, GRADIENTS, TRANSITION, TRANSITION_MIRRORED };

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
    Row A[2 * L];            // four quarters, of which what is above the diagonal is not read; on A_ab's the inverses
    Row out[L];              // Y or dV, on its way to memory
    float system[2][16][16 + 4];  // the blocks on the diagonal of A_ab, transposed. (4: for the banks)
    float sums[WARPS][N];    // log decay of 8 tokens each
    float e_middle[N], e_end[N];  // e^c, e^(G_L-c)
    Row in[2 * L];           // V (mirrored: dY); below it, if gradients are computed, U (Z)
};
struct GradientTiles : WalkTiles {
    Row VU[2 * L], S[N], D[N];  // S~ and D~, [value,key]
    float e[L + 1][N + 8];      // e[t + 1] = e^(G_t-c), e[0] = e^(-c). (8: rows start 8 banks apart)
    float gamma[WARPS][N];      // the diagonal of D~^T S~: what 16 values each add
};

// ---------------------------------------------------------------------------------------------- the stages of a chunk

// A chunk of [B,T,H,N] that begins at x -> tile, without waiting; zeros after `tokens`.
__device__ inline void fetch(Row* tile, const bf16* x, int stride, int tokens) {
#pragma unroll
    for (int part = 0; part < L * 8 / THREADS; part++) {
        const int n = part * THREADS + threadIdx.x, t = n / 8, column = n % 8 * 8;
        cp_async16(at(tile, t, column), x + (t * stride + column), t < tokens);
    }
}
__device__ inline void write_out(const Row* tile, bf16* x, int stride, int tokens) {
#pragma unroll
    for (int part = 0; part < L * 8 / THREADS; part++) {
        const int n = part * THREADS + threadIdx.x, t = n / 8, column = n % 8 * 8;
        if (t < tokens) {
            *reinterpret_cast<uint4*>(x + (t * stride + column)) = *reinterpret_cast<const uint4*>(at(tile, t, column));
        }
    }
}

__device__ inline float sigma(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
__device__ inline float slope(float x) {  // sigma(x) sigma(-x), its derivative; as 1 - sigma it would cancel
    const float e = __expf(-fabsf(x)), large = __fdividef(1.0f, 1.0f + e);
    return e * large * large;
}

__device__ inline uint32_t scaled(uint32_t pair, float2 by) {
    const float2 x = unpack(pair);
    return pack(by.x * x.x, by.y * x.y);
}

// Inputs -> Q, K, e^c, e^(G_L-c). Each warp does 8 tokens, each lane 2 channels; one barrier inside. `tokens`: how many
// of the chunk exist; the others decay by nothing (and their r, k, a, b are zeros).
template <typename Tiles>
__device__ void factors(Tiles& tiles, const Row* w, int warp, int tokens) {
    const int j = threadIdx.x % 32 * 2, first = 8 * warp;
    uint32_t r[8], k[8], a[8], b[8];  // (read before anything is written, or each would wait for the token before)
    float2 G[8];                      // from the first of the 8 tokens on
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int t = 0; t < 8; t++) {
        const int row = first + t;
        const float2 logit = pair_at(w, row, j);
        const float rate = row < tokens ? MINUS_RATE : 0.0f;
        sum.x += rate * sigma(logit.x), sum.y += rate * sigma(logit.y);
        G[t] = sum;
        r[t] = word_at(tiles.r, row, j), k[t] = word_at(tiles.k, row, j);
        a[t] = word_at(tiles.a, row, j), b[t] = word_at(tiles.b, row, j);
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
        put_pair(tiles.Q, row, j, scaled(r[t], e_q)), put_pair(tiles.Q, row + L, j, scaled(a[t], e_a));
        put_pair(tiles.K, row, j, scaled(k[t], e_k)), put_pair(tiles.K, row + L, j, scaled(b[t], e_k));
        if constexpr (std::is_same_v<Tiles, GradientTiles>) *reinterpret_cast<float2*>(&tiles.e[row + 1][j]) = e_q;
        e_a = e_q;
    }
}

// U, Y or Z, dV of 16 values, which their warp holds as value by token, into a tile, token by value.
__device__ inline void put_transposed(Row* tile, int row, int column, const Block (&x)[2]) {
#pragma unroll
    for (int t = 0; t < 2; t++) put(tile, row + 16 * t, column, transposed(x[t].round()));
}

// mask(X Y^T), X and Y of two times 32 tokens: A and, in its place later, P. A warp computes what 32 tokens (`half` of
// X) read of what 32 wrote (`source` of Y): two blocks on the diagonal, and the one below; the one above is not
// written. Half 1 reads before its token writes: there the diagonal is 0. to_system: the blocks on the diagonal are
// kept in fp32 too.
template <typename Tiles>
__device__ void masked_product(Tiles& tiles, const Row* X, const Row* Y, int half, int source, bool to_system) {
    Block on_it[2], below;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const Factor x0 = left(X, L * half, 16 * n), x1 = left(X, L * half + 16, 16 * n),
                     y0 = right_t(Y, L * source, 16 * n), y1 = right_t(Y, L * source + 16, 16 * n);
        on_it[0].add(x0, y0), below.add(x1, y0), on_it[1].add(x1, y1);
    }
    const Lane lane;
#pragma unroll
    for (int t = 0; t < 2; t++) {
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const int row = lane.i + n / 2 % 2 * 8, column = lane.j + n / 4 * 8 + n % 2;
            if (row < column + half) on_it[t].x[n] = 0.0f;
        }
        put(tiles.A, L * half + 16 * t, L * source + 16 * t, on_it[t].round());
    }
    if (to_system) {
#pragma unroll
        for (int t = 0; t < 2; t++) {
#pragma unroll
            for (int n = 0; n < 8; n++) {
                tiles.system[t][lane.j + n / 4 * 8 + n % 2][lane.i + n / 2 % 2 * 8] = on_it[t].x[n];
            }
        }
    }
    put(tiles.A, L * half + 16, L * source, below.round());
}

// The inverses of the 16x16 blocks on the diagonal of I - A_ab, in their place, a column a lane: row i of an inverse is
// row i of the identity plus what A_ab makes of the rows above.
template <typename Tiles>
__device__ void invert(Tiles& tiles) {
    __syncwarp();
    const int t = threadIdx.x % 32 / 16, column = threadIdx.x % 16;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; i++) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int m = 0; m < 15; m++) {
#pragma unroll
        for (int i = m + 1; i < 16; i++) x[i] += tiles.system[t][m][i] * x[m];
    }
#pragma unroll
    for (int i = 0; i < 16; i++) *at(tiles.A, L + 16 * t + i, L + 16 * t + column) = __float2bfloat16(x[i]);
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
    // X (dU) with half 1; with half 0 Y (dV) but for what U (Z) adds: what comes from the state, what from the input.
    __device__ static void add_state(Block (&x)[2], int half, const Factor (&S)[4], const Row* reads) {
#pragma unroll
        for (int t = 0; t < 2; t++) {
#pragma unroll
            for (int m = 0; m < 4; m++) x[t].add(S[m], right_t(reads, L * half + 16 * t, 16 * m));
        }
    }
    __device__ static void add_input(Block (&x)[2], int half, const Factor (&in)[2], const Row* A) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int s = 0; s <= n; s++) x[nth(n)].add(in[nth(s)], link(A, half, nth(n), 0, nth(s)));
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

// What a warp's 16 values add to Gamma, the diagonal of D~^T S~; each lane 2 keys.
__device__ inline void put_gamma(GradientTiles& tiles, int warp) {
    const int j = threadIdx.x % 32 * 2;
    float2 sum = {0.0f, 0.0f};
    __syncwarp();
#pragma unroll
    for (int i = 16 * warp; i < 16 * warp + 16; i++) {
        const float2 s = pair_at(tiles.S, i, j), d = pair_at(tiles.D, i, j);
        sum.x += s.x * d.x, sum.y += s.y * d.y;
    }
    *reinterpret_cast<float2*>(&tiles.gamma[warp][j]) = sum;
}

// Every column becomes sums over the chunk's tokens: of this token and all after it; or, BEFORE, of those before it. Of
// a column a thread holds every 8th token.
template <bool BEFORE>
__device__ void running_sums(Block (&x)[2]) {
#pragma unroll
    for (int column = 0; column < 4; column++) {
        float* part[4];
        float all[4], mine[4], sum = 0.0f;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            part[n] = &x[n / 2].x[column / 2 * 4 + n % 2 * 2 + column % 2];
            all[n] = *part[n], mine[n] = BEFORE ? 0.0f : all[n];
        }
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2) {
            const bool later = threadIdx.x & bit;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float other = __shfl_xor_sync(0xffffffffu, all[n], bit);
                if (later == BEFORE) mine[n] += other;
                all[n] += other;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int n = BEFORE ? i : 3 - i;
            *part[n] = mine[n] + sum, sum += all[n];
        }
    }
}

// All gradients of a chunk but dV, of this warp's 16 keys (16 m ..).
//
//     dg_t = sum_(s >= t) h_s - (a~ da~)_t + sum_(s < t) (k~ dk_s + b~ db_s)_s + Gamma,    with
//     h = q~ dq~ + a~ da~ - k~ dk_i - b~ db_i;     dk_i, db_i are the parts that come from P, dk_s, db_s those from D~
struct Gradients {
    GradientTiles& tiles;
    const Tensors& x;
    const Row* w;
    const int m;
    const int64_t at_chunk;    // the chunk's first token in [B,T,H,N]
    const int stride, tokens;  // from a token to the next; of the chunk that exist
    Block h[2] = {}, dg[2] = {};  // 16 tokens each

    // Two neighbouring numbers of a fragment, x[2 pair] and x[2 pair + 1]: their place in the chunk.
    __device__ static int row(int t, int pair) { return 16 * t + Lane().i + pair % 2 * 8; }
    __device__ int column(int pair) const { return 16 * m + Lane().j + pair / 2 * 8; }

    // 16 tokens' to memory.
    __device__ void store(bf16* out, int t, const Block& block) const {
        const Factor f = block.round();
#pragma unroll
        for (int l = 0; l < 2; l++) {
            const Four four = four_in_a_row(f, l);
            bf16* place = out + at_chunk + ((16 * t + four.row) * stride + 16 * m + four.column);
            if (16 * t + four.row < tokens) ::store(place, four.words);
        }
    }

    __device__ void compute() {
        written(), running_sums<true>(dg);
        read(), running_sums<false>(h);
        decay();
    }

    // dk, db, and what they give to h and to the sum over s < t.
    __device__ void written() {
#pragma unroll
        for (int t = 0; t < 2; t++) {
            Block dx[2];  // of k~, b~
            const auto times_K = [&](int pair) {  // k~ dk~ + b~ db~, as they stand now
                const float2 k = pair_at(tiles.K, row(t, pair), column(pair)),
                             b = pair_at(tiles.K, L + row(t, pair), column(pair));
                const float *dk = dx[0].x + 2 * pair, *db = dx[1].x + 2 * pair;
                return float2{k.x * dk[0] + b.x * db[0], k.y * dk[1] + b.y * db[1]};
            };
#pragma unroll
            for (int n = 0; n < 2 * (2 - t); n++) {
                const int to = L * (n % 2) + 16 * (t + n / 2);
                const Factor q = right(tiles.Q, to, 16 * m);
#pragma unroll
                for (int source = 0; source < 2; source++) {
                    dx[source].add(left_t(tiles.A, to, L * source + 16 * t), q);
                }
            }
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                const float2 inside = times_K(pair);
                h[t].x[2 * pair] = -inside.x, h[t].x[2 * pair + 1] = -inside.y;
            }
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const Factor d = right(tiles.D, 16 * n, 16 * m);
#pragma unroll
                for (int source = 0; source < 2; source++) {
                    dx[source].add(left(tiles.VU, L * source + 16 * t, 16 * n), d);
                }
            }
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                const float2 all = times_K(pair),
                             e_q = *reinterpret_cast<const float2*>(&tiles.e[row(t, pair) + 1][column(pair)]),
                             e_k = {__fdividef(1.0f, e_q.x), __fdividef(1.0f, e_q.y)};
                dg[t].x[2 * pair] = all.x + h[t].x[2 * pair], dg[t].x[2 * pair + 1] = all.y + h[t].x[2 * pair + 1];
#pragma unroll
                for (int source = 0; source < 2; source++) {
                    dx[source].x[2 * pair] *= e_k.x, dx[source].x[2 * pair + 1] *= e_k.y;
                }
            }
            store(x.dk, t, dx[0]), store(x.db, t, dx[1]);
        }
    }

    // dr, da, what they give to h, and - a~ da~.
    __device__ void read() {
#pragma unroll
        for (int t = 0; t < 2; t++) {
            Block dx[2];  // of q~, a~
#pragma unroll
            for (int n = 0; n < 2 * (t + 1); n++) {
                const int from = L * (n % 2) + 16 * (n / 2);
                const Factor k = right(tiles.K, from, 16 * m);
#pragma unroll
                for (int half = 0; half < 2; half++) dx[half].add(left(tiles.A, L * half + 16 * t, from), k);
            }
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const Factor s = right(tiles.S, 16 * n, 16 * m);
#pragma unroll
                for (int half = 0; half < 2; half++) dx[half].add(left(tiles.in, L * half + 16 * t, 16 * n), s);
            }
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                const float2 q = pair_at(tiles.Q, row(t, pair), column(pair)),
                             a = pair_at(tiles.Q, L + row(t, pair), column(pair)),
                             e_a = *reinterpret_cast<const float2*>(&tiles.e[row(t, pair)][column(pair)]),
                             e_q = *reinterpret_cast<const float2*>(&tiles.e[row(t, pair) + 1][column(pair)]);
                float *dq = dx[0].x + 2 * pair, *da = dx[1].x + 2 * pair;
                const float2 a_da = {a.x * da[0], a.y * da[1]};
                h[t].x[2 * pair] += q.x * dq[0] + a_da.x, h[t].x[2 * pair + 1] += q.y * dq[1] + a_da.y;
                dg[t].x[2 * pair] -= a_da.x, dg[t].x[2 * pair + 1] -= a_da.y;
                dq[0] *= e_q.x, dq[1] *= e_q.y, da[0] *= e_a.x, da[1] *= e_a.y;
            }
            store(x.dr, t, dx[0]), store(x.da, t, dx[1]);
        }
    }

    // dw, where h has become the sum over s >= t.
    __device__ void decay() {
        float2 gamma[2] = {};  // of these keys
#pragma unroll
        for (int n = 0; n < 2 * WARPS; n++) {
            const float2 part = *reinterpret_cast<const float2*>(&tiles.gamma[n / 2][column(n % 2 * 2)]);
            gamma[n % 2].x += part.x, gamma[n % 2].y += part.y;
        }
#pragma unroll
        for (int t = 0; t < 2; t++) {
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                const float2 logit = pair_at(w, row(t, pair), column(pair));
                float *g = dg[t].x + 2 * pair, *later = h[t].x + 2 * pair;
                g[0] = (later[0] + g[0] + gamma[pair / 2].x) * MINUS_RATE * slope(logit.x);
                g[1] = (later[1] + g[1] + gamma[pair / 2].y) * MINUS_RATE * slope(logit.y);
            }
            store(x.dw, t, dg[t]);
        }
    }
};

// ---------------------------------------------------------------------------------------------- the walk

template <Mode MODE>
struct Traits {
    static constexpr bool mirror = MODE == GRADIENTS || MODE == TRANSITION_MIRRORED;
    static constexpr bool transition = MODE == TRANSITION || MODE == TRANSITION_MIRRORED;
    static constexpr bool gradients = MODE == GRADIENTS;
    static constexpr int states = transition ? 2 : 1;
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
#pragma unroll
    for (int m = 0; m < 4; m++) {
        Factor part[2];
        split(S[m], part[0], part[1]);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const Four x = four_in_a_row(part[n / 2], n % 2);
            store(parts + n / 2 * N * N + (16 * warp + x.row) * N + 16 * m + x.column, x.words);
        }
    }
}

// So many blocks an H100's multiprocessor takes: of GRADIENTS by its 227 KB, of transitions by its registers.
template <Mode MODE>
__global__ void __launch_bounds__(THREADS, MODE == FORWARD ? 3 : 2) wkv7_walk_kernel(Sizes sizes, Tensors x) {
    using M = Traits<MODE>;
    using Direction = Walk<M::mirror>;
    typename M::Tiles& tiles = *reinterpret_cast<typename M::Tiles*>(dyn_smem());
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // so that nvcc knows it is the same in all lanes
    // Of each head all segments; but nothing asks how the walk's last one changes the state.
    const unsigned each = sizes.segments - M::transition;
    const unsigned head = blockIdx.x / each, segment = blockIdx.x % each + (MODE == TRANSITION_MIRRORED);
    const int64_t cell = int64_t{head} * sizes.segments + segment;
    const int first = segment * sizes.segment_chunks;  // a chunk's number; below, the count of this segment's
    const int count = lesser(sizes.segment_chunks, sizes.chunks - first);
    const int stride = sizes.H * N;  // from a token to the next
    const int64_t offset = sizes.offset(head);
    Row* const reads = M::mirror ? tiles.K : tiles.Q;   // what the state is multiplied with
    Row* const writes = M::mirror ? tiles.Q : tiles.K;  // and what is written into it
    const float* e_before = M::mirror ? tiles.e_end : tiles.e_middle;
    const float* e_after = M::mirror ? tiles.e_middle : tiles.e_end;

    struct Chunk {
        int64_t token, at;  // its first one; where it is in [B,T,H,N]
        int tokens;         // that exist
    };
    const auto chunk = [&](int n) {
        const int64_t token = int64_t{L} * (first + (M::mirror ? count - 1 - n : n));
        return Chunk{token, offset + token * stride, static_cast<int>(lesser(sizes.T - token, L))};
    };
    const auto prefetch = [&](int n) {
        if (n < count) {
            const Chunk c = chunk(n);
            fetch(tiles.r, x.r + c.at, stride, c.tokens), fetch(tiles.k, x.k + c.at, stride, c.tokens);
            fetch(tiles.a, x.a + c.at, stride, c.tokens), fetch(tiles.b, x.b + c.at, stride, c.tokens);
            fetch(tiles.w[n % 2], x.w + c.at, stride, c.tokens);
        }
        cp_async_commit();
    };
    const auto write_back = [&](int n) { write_out(tiles.out, x.out + chunk(n).at, stride, chunk(n).tokens); };

    Block S[M::states][4];  // mirrored: D. A transition walks from 0, with input, and from the identity without
    if constexpr (M::transition) {
        set_identity(S[1], warp);
    } else {
        load_state(S[0], x.start + cell * N * N, warp);
    }
    prefetch(0);
    for (int n = 0; n < count; n++) {
        const Chunk c = chunk(n);
        cp_async_wait<0>();
        __syncthreads();  // inputs are here; all is done with the chunk before
        if (!M::transition && n > 0) write_back(n - 1);
        fetch(tiles.in, (M::mirror ? x.dy : x.v) + c.at, stride, c.tokens);
        if constexpr (M::gradients) fetch(tiles.VU, x.v + c.at, stride, c.tokens);
        cp_async_commit();
        const int64_t of_warp = (int64_t{head} * sizes.chunks + c.token / L) * WARPS + warp;
        uint4* saved = x.saved + of_warp * 4 * 32 + threadIdx.x % 32;
        Factor S_before[4];  // if gradients are computed: S~ of the forward walk. It takes as long as the factors do
        if constexpr (M::gradients) {
#pragma unroll
            for (int m = 0; m < 4; m++) {
                const uint4 s = saved[32 * m];
                S_before[m] = {{s.x, s.y, s.z, s.w}};
            }
        }
        factors(tiles, tiles.w[n % 2], warp, c.tokens);
        __syncthreads();
        prefetch(n + 1);
        masked_product(tiles, tiles.Q, tiles.K, warp / 2, warp % 2, warp == 3);
        if (warp == 3) invert(tiles);
        cp_async_wait<1>();
        __syncthreads();

        Factor before[M::states][4];  // S~; mirrored: D~
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int i = 0; i < M::states; i++) {
                S[i][m].scale_columns(e_before + 16 * m), before[i][m] = S[i][m].round();
            }
        }
#pragma unroll
        for (int m = 0; m < 4; m++) {
            if constexpr (M::gradients) {
                put(tiles.S, 16 * warp, 16 * m, S_before[m]), put(tiles.D, 16 * warp, 16 * m, before[0][m]);
            } else if (MODE == FORWARD && x.saved) {
                const uint32_t(&s)[4] = before[0][m].x;
                saved[32 * m] = {s[0], s[1], s[2], s[3]};
            }
        }
        const Factor in[2] = {left_t(tiles.in, 0, 16 * warp), left_t(tiles.in, 16, 16 * warp)};
        Block X[M::states][2], U[M::states][2];  // mirrored: dU, Z
#pragma unroll
        for (int i = 0; i < M::states; i++) {
            Direction::add_state(X[i], 1, before[i], reads);
            if (i == 0) Direction::add_input(X[i], 1, in, tiles.A);
            Direction::solve(U[i], X[i], tiles.A);
        }
        if constexpr (M::gradients) {  // U as in the forward walk
            Block forward_X[2], forward_U[2];
            const Factor V[2] = {left_t(tiles.VU, 0, 16 * warp), left_t(tiles.VU, 16, 16 * warp)};
            Walk<false>::add_state(forward_X, 1, S_before, tiles.Q), Walk<false>::add_input(forward_X, 1, V, tiles.A);
            Walk<false>::solve(forward_U, forward_X, tiles.A);
            put_transposed(tiles.in, L, 16 * warp, U[0]), put_transposed(tiles.VU, L, 16 * warp, forward_U);
        }
        if constexpr (!M::transition) {
            Block Y[2];  // mirrored: dV
            Direction::add_state(Y, 0, before[0], reads), Direction::add_input(Y, 0, in, tiles.A);
            Direction::end(Y, {U[0][0].round(), U[0][1].round()}, tiles.A);
            put_transposed(tiles.out, 0, 16 * warp, Y);
        }
#pragma unroll
        for (int t = 0; t < 2; t++) {
#pragma unroll
            for (int m = 0; m < 4; m++) {
                S[0][m].add(in[t], right(writes, 16 * t, 16 * m));
                const Factor write = right(writes, L + 16 * t, 16 * m);
#pragma unroll
                for (int i = 0; i < M::states; i++) S[i][m].add(U[i][t].round(), write);
            }
        }
        if constexpr (M::gradients) {
            put_gamma(tiles, warp);
            __syncthreads();
            masked_product(tiles, tiles.in, tiles.VU, warp / 2, warp % 2, false);
            __syncthreads();
            Gradients{tiles, x, tiles.w[n % 2], warp, c.at, stride, c.tokens}.compute();
        }
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int i = 0; i < M::states; i++) S[i][m].scale_columns(e_after + 16 * m);
        }
    }
    cp_async_wait<0>();
    if constexpr (M::transition) {
        float* to = x.transitions + cell * 2 * N * N;
        store_state(S[0], to, warp), store_split(S[1], reinterpret_cast<bf16*>(to + N * N), warp);
    } else {
        __syncthreads();
        write_back(count - 1);
        if (segment == (M::mirror ? 0 : sizes.segments - 1)) store_state(S[0], x.end + int64_t{head} * N * N, warp);
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
    const int64_t head = blockIdx.x, segments = sizes.segments;
    const auto cell = [&](int64_t n) { return head * segments + (MIRROR ? segments - 1 - n : n); };
    const auto fetch_M = [&](int64_t n) {
        const bf16* parts = reinterpret_cast<const bf16*>(transitions + (2 * cell(n) + 1) * N * N);
        for (int i = threadIdx.x; n < segments - 1 && i < 2 * N * 8; i += THREADS) {
            cp_async16(at(tiles.M[n % 2][0], i / 8, i % 8 * 8), parts + i * 8, true);
        }
        cp_async_commit();
    };
    Block S[4], gain[4];  // of this segment: N
    load_state(S, state + head * N * N, warp);
    fetch_M(0);
    load_state(gain, transitions + 2 * cell(0) * N * N, warp);
    for (int64_t n = 0; n < segments - 1; n++) {
        store_state(S, start + cell(n) * N * N, warp);
        fetch_M(n + 1);
        Factor high[4], low[4];
#pragma unroll
        for (int m = 0; m < 4; m++) split(S[m], high[m], low[m]), S[m] = gain[m];
        if (n + 2 < segments) load_state(gain, transitions + 2 * cell(n + 1) * N * N, warp);
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
    if (sizes.segments > 1) {
        float* start = scratch + sizes.cells * 2 * N * N;
        x.start = start, x.transitions = scratch;
        int error = launch(wkv7_walk_kernel<CROSS>, sizes.cells - sizes.heads, THREADS, Traits<CROSS>::smem,
                           stream, sizes, x);
        if (error) return error;
        error = launch(wkv7_scan_kernel<MIRROR>, sizes.heads, THREADS, sizeof(ScanTiles), stream, sizes, state,
                       static_cast<const float*>(scratch), start);
        if (error) return error;
    }
    return launch(wkv7_walk_kernel<MODE>, sizes.cells, THREADS, Traits<MODE>::smem, stream, sizes, x);
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
