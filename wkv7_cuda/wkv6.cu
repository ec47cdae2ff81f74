// WKV-6, the recurrence of RWKV-6 and of RWKV-5, on tensor cores: steps of 16 tokens, every factor a product of decays.
//
// EQUATION, per batch entry and head; all vectors are columns of length N = 64, S is [value, key]:
//
//     d_t = exp(-exp(w_t))                                  0 <= d <= 1: no floor, a token may erase all
//     y_t = (S_(t-1) + v_t (u k_t)^T) r_t                   the state before the token, and the token with a bonus u
//     S_t = S_(t-1) diag(d_t) + v_t k_t^T
//
// A STEP of 16 tokens, S before it, S' after it; rows of R, K, V, Y are tokens. Write d(s,t) for the product of the d
// of all tokens strictly between s and t; before the step's first token stands "(", behind its last ")":
//
//     Q_t = r_t d((,t)     K_s = k_s d(s,))     P = d((,))     A_ts = sum over keys of r_t k_s d(s,t),  s < t
//                                                              A_tt = sum over keys of r_t u k_t
//     forward    Y = Q S^T + A V         backward   dV = K D^T + A^T dY        D = dL/dS'
//                S' = S diag(P) + V^T K             dL/dS = D diag(P) + dY^T Q
//
//     gradients  dQ = dY S     dK = V D     C = dY V^T, s <= t
//                dr_t = d((,t) dQ_t + sum_(s<t) C_ts k_s d(s,t) + C_tt u k_t
//                dk_s = d(s,)) dK_s + sum_(t>s) C_ts r_t d(s,t) + C_ss u r_s      du = sum_t C_tt r_t k_t
//                dw_t = -exp(w_t) X_t, where X_t gathers all that d_t is a factor of, old (before t) times new (after):
//                X_t  = sum_(s<t<z) C_zs r_z k_s d(s,z) + sum_(s<t) K_s dK_s + sum_(z>t) Q_z dQ_z + P diag(S^T D)
//
// No decay is ever divided by, no logarithm of one is summed: all d(s,t) are running products of numbers in [0,1].
// They cannot overflow, where they underflow zero is right, and no term of X must cancel another.
//
// THE MIRROR. The backward walk is the forward walk with S, V, Y, Q, K, A called D, dY, dV, K, Q, A^T and the steps in
// reverse order. So there is one walk here, template parameter MODE.
//
// HOW IT IS CUT. A block has four warps and walks the chunks of one *segment* of one head, 32 tokens = two steps each,
// in order. A thread has three roles. For what belongs to tokens a warp is a step and half of the keys, a lane of it
// one key; for A a lane is two tokens and 8 keys; and of the state a warp owns 16 values, transposed as in
// wkv7_fast.cu, value by token and value by key: it never leaves the registers, no warp needs another's values.
//
//   stage      reads            computes                                              a thread holds
//   factors    r k w            d, Q, K, P                                            d of 16 tokens, one key
//   pairs      r k d            A, two halves of the keys apart                       r d(s,t) of 2 tokens, 8 keys
//   walk       Q K A V (dY)     Y over V (dV over dY), S of the next step             S: 16 values a warp, 32 numbers
//   and in the backward
//   replay     saved, K V dY    S before both steps; C                                (before the walk)
//   products   dY S; V D        dQ before the walk, which puts D over S; dK after it  16 + 16 sums
//   channels   r k d C dQ dK w  dr dk dw du                                           k d, sums of 16 tokens, one key
//
// SEGMENTS. B*H blocks of their own fill a GPU only if there are many heads. With fewer, a head's tokens are cut into
// segments that are walked at once; for that the state before each must be known. The walk from zero without outputs
// (LOCAL) gives what a segment adds to the state, and the product of its decays is what it leaves of it:
// S' = S diag(decay) + gain. wkv6_scan joins them, number by number. Backward likewise, from the last to the first.
//
// MEMORY. `saved`, if asked for: S before each chunk, as factors (below): 256 bytes per token and head, 512 unless I/O
// is bf16. Scratch with n > 1 segments: n (16 + 1/4) KB. du leaves as one row per segment and step; the binding adds.
//
// NUMERICS. Factors of products on tensor cores are one bf16 (PARTS = 1) if I/O is bf16; else two, high + low, 16 bits
// together, and a product is three: high high + high low + low high. As factors are rounded: r k v dy (exact in bf16),
// Q K A, and S, D where they are multiplied. fp32: decays, sums, carried S and D, A and C until they are rounded, the
// gradients' sums over pairs. Errors against float64: about 2.5e-3 in bf16, 7e-6 in fp32 (tests/test_wkv6_cuda.py).
// The order of all sums is fixed: no atomics, the same bits in every run with the same number of segments.
//
// LIMITS. N = 64, T >= 1 (the tail is filled with tokens that change nothing: d = 1, the rest 0), sm_80 or newer with
// 99 KB of shared memory a block; pointers aligned to 16 bytes (the binding checks); at most 2^31 - 1 blocks a launch.
#include "blocks.cuh"

namespace {

constexpr int STEP = 16, STEPS = L / STEP;

enum Mode { FORWARD, GRADIENTS, LOCAL, LOCAL_MIRRORED };

template <typename IO>
constexpr int parts = std::is_same_v<IO, bf16> ? 1 : 2;  // how many bf16 a factor is

template <typename IO>
struct Tensors {
    const IO *r, *w, *k, *v, *u, *dy = nullptr;
    const float* start = nullptr;   // [head,segment,value,key] the state before (mirrored: gradient after) each segment
    float* end = nullptr;           // [head,value,key] the state after the last (mirrored: gradient before the first)
    float *gains = nullptr, *decays = nullptr;  // of segments: [head,segment,value,key], [head,segment,key]
    uint4* saved = nullptr;         // [head,chunk,part,warp,key / 16,lane]: S before each chunk
    IO* out = nullptr;              // y (mirrored: dv)
    IO *dr = nullptr, *dw = nullptr, *dk = nullptr;
    float* du = nullptr;            // [head,segment,step,key]

    explicit Tensors(const void* const* inputs)
        : r(static_cast<const IO*>(inputs[0])), w(static_cast<const IO*>(inputs[1])),
          k(static_cast<const IO*>(inputs[2])), v(static_cast<const IO*>(inputs[3])),
          u(static_cast<const IO*>(inputs[4])) {}
};

// ---------------------------------------------------------------------------------------------- numbers in parts

template <int PARTS>
struct Parts {  // a 16x16 block as a factor: its sum is meant
    Factor part[PARTS];

    __device__ explicit Parts() {}
    __device__ explicit Parts(const Block& x) {
        if constexpr (PARTS == 1) part[0] = x.round();
        else split(x, part[0], part[1]);
    }
    __device__ Block sum() const {
        Block x;
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float2 pair = unpack(part[p].x[n]);
                x.x[2 * n] += pair.x, x.x[2 * n + 1] += pair.y;
            }
        }
        return x;
    }
};

// sum += left right, but for the product of the low parts.
template <int PARTS>
__device__ inline void add(Block& sum, const Parts<PARTS>& left, const Parts<PARTS>& right) {
    sum.add(left.part[0], right.part[0]);
    if constexpr (PARTS == 2) sum.add(left.part[0], right.part[1]), sum.add(left.part[1], right.part[0]);
}

template <int PARTS, int ROWS>
struct Tile {  // [ROWS][64] numbers in shared memory
    Row part[PARTS][ROWS];

    __device__ float get(int row, int column) const {
        float x = to_float(*at(part[0], row, column));
        if constexpr (PARTS == 2) x += to_float(*at(part[1], row, column));
        return x;
    }
    __device__ void set(int row, int column, float x) {
        const bf16 high = __float2bfloat16(x);
        *at(part[0], row, column) = high;
        if constexpr (PARTS == 2) *at(part[1], row, column) = __float2bfloat16(x - to_float(high));
    }
    // Two or eight neighbours; column a multiple of as many.
    __device__ float2 get_pair(int row, int column) const {
        float2 x = pair_at(part[0], row, column);
        if constexpr (PARTS == 2) {
            const float2 low = pair_at(part[1], row, column);
            x.x += low.x, x.y += low.y;
        }
        return x;
    }
    __device__ void set_pair(int row, int column, float x, float y) {
        const uint32_t high = pack(x, y);
        put_pair(part[0], row, column, high);
        if constexpr (PARTS == 2) put_pair(part[1], row, column, pack(x - unpack(high).x, y - unpack(high).y));
    }
    __device__ void get_eight(int row, int column, float (&x)[8]) const {
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            const uint4 words = *reinterpret_cast<const uint4*>(at(part[p], row, column));
            const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float2 pair = unpack(word[n]);
                x[2 * n] = p ? x[2 * n] + pair.x : pair.x, x[2 * n + 1] = p ? x[2 * n + 1] + pair.y : pair.y;
            }
        }
    }
    __device__ void put(int row, int column, const Parts<PARTS>& x) {
#pragma unroll
        for (int p = 0; p < PARTS; p++) ::put(part[p], row, column, x.part[p]);
    }
    // A block whose rows are values and whose columns are tokens, into a tile of tokens by values.
    __device__ void put_transposed(int row, int column, const Block& x) {
        const Lane lane;
#pragma unroll
        for (int n = 0; n < 8; n++) {
            set(row + lane.j + n / 4 * 8 + n % 2, column + lane.i + n / 2 % 2 * 8, x.x[n]);
        }
    }
};

// The block of a tile whose corner is (row, column), as LOAD takes it: left, right, left_t or right_t.
template <Factor (&LOAD)(const Row*, int, int), int PARTS, int ROWS>
__device__ inline Parts<PARTS> take(const Tile<PARTS, ROWS>& tile, int row, int column) {
    Parts<PARTS> x;
#pragma unroll
    for (int p = 0; p < PARTS; p++) x.part[p] = LOAD(tile.part[p], row, column);
    return x;
}

// ---------------------------------------------------------------------------------------------- shared memory

template <int PARTS>
struct LocalTiles {
    Tile<PARTS, L> r, k, in;  // in: v (mirrored: dy), later y (dv)
    Tile<PARTS, L> Q, K;
    float P[STEPS][N];
};
template <int PARTS>
struct OutputTiles : LocalTiles<PARTS> {
    float d[L][N], u[N];
    float A[STEPS][2][STEP][STEP + 8];  // [step][half of the keys]: their sum is A. (8: rows start 24 banks apart)
};
template <int PARTS>
struct GradientTiles : OutputTiles<PARTS> {
    Tile<PARTS, L> v;
    union {
        Tile<PARTS, N> S[STEPS];  // [value,key] before each step; then D after it
        float dQK[2][L][N + 8];   // then dQ, dK. (8: rows start 8 banks apart)
    };
    float C[STEPS][STEP][STEP];
    float SD[STEPS][WARPS][N];  // diag(S^T D): what 16 values each add
};

// ---------------------------------------------------------------------------------------------- the stages of a chunk

// A chunk of one head's [B,T,H,N] -> tile, bf16 without waiting. x: its first token; stride: from one token to the
// next; of the chunk `tokens` exist, for the others there are zeros.
template <typename IO>
__device__ void fetch(Tile<parts<IO>, L>& tile, const IO* x, int stride, int tokens) {
    constexpr int UNIT = std::is_same_v<IO, bf16> ? 8 : 4;  // numbers a thread fetches at once
#pragma unroll
    for (int part = 0; part < L * N / UNIT / THREADS; part++) {
        const int n = part * THREADS + threadIdx.x, t = n / (N / UNIT), column = n % (N / UNIT) * UNIT;
        const IO* from = x + (t * stride + column);
        if constexpr (std::is_same_v<IO, bf16>) {
            cp_async16(at(tile.part[0], t, column), from, t < tokens);
        } else {
            const Quad<IO> quad = t < tokens ? *reinterpret_cast<const Quad<IO>*>(from) : Quad<IO>::pack(0, 0, 0, 0);
            const float4 y = quad.unpack();
            tile.set_pair(t, column, y.x, y.y), tile.set_pair(t, column + 2, y.z, y.w);
        }
    }
}
// The same as numbers of IO [L][64], over a tile that is done with.
template <typename IO>
__device__ void fetch_raw(void* tile, const IO* x, int stride, int tokens) {
    constexpr int UNIT = 16 / sizeof(IO);
#pragma unroll
    for (int part = 0; part < L * N / UNIT / THREADS; part++) {
        const int n = part * THREADS + threadIdx.x, t = n / (N / UNIT), column = n % (N / UNIT) * UNIT;
        cp_async16(static_cast<IO*>(tile) + n * UNIT, x + (t * stride + column), t < tokens);
    }
}
// Its lines of 128 bytes on their way from memory: what the next chunk fetches is then near.
template <typename IO>
__device__ void expect(const IO* x, int stride, int tokens) {
    constexpr int UNIT = 128 / sizeof(IO), LINES = N / UNIT;
    const int t = threadIdx.x / LINES;
    if (t < lesser(tokens, L)) prefetch(x + (t * stride + threadIdx.x % LINES * UNIT));
}
template <typename IO>
__device__ void write_out(const Tile<parts<IO>, L>& tile, IO* x, int stride, int tokens) {
#pragma unroll
    for (int part = 0; part < L * N / 4 / THREADS; part++) {
        const int n = part * THREADS + threadIdx.x, t = n / (N / 4), column = n % (N / 4) * 4;
        const float2 low = tile.get_pair(t, column), high = tile.get_pair(t, column + 2);
        if (t < tokens) store(x + (t * stride + column), Quad<IO>::pack(low.x, low.y, high.x, high.y).words);
    }
}

// d of this lane's key in a step's 16 tokens, from its w of the chunk's first token; tokens that do not exist decay by
// nothing, as w = -inf does. (In their place the last one's w is read: no load or exponential waits for a branch.)
template <typename IO>
__device__ void decays(float (&d)[STEP], const IO* w, int stride, int step, int tokens) {
    IO raw[STEP];
#pragma unroll
    for (int t = 0; t < STEP; t++) raw[t] = w[lesser(STEP * step + t, tokens - 1) * stride];
#pragma unroll
    for (int t = 0; t < STEP; t++) {
        const float logit = STEP * step + t < tokens ? to_float(raw[t]) : -INFINITY;
        d[t] = expf(-expf(logit));
    }
}

// Q, K (what the mode needs of them) and P of 16 tokens, a key j a lane.
template <Mode MODE, typename Tiles>
__device__ void factors(Tiles& tiles, const float (&d)[STEP], int step, int j) {
    float r[STEP], k[STEP];  // read before anything is written, or each would wait for the one before
#pragma unroll
    for (int t = 0; t < STEP; t++) {
        if constexpr (MODE != LOCAL) r[t] = tiles.r.get(STEP * step + t, j);
        if constexpr (MODE != LOCAL_MIRRORED) k[t] = tiles.k.get(STEP * step + t, j);
    }
    float before = 1.0f, behind = 1.0f;
#pragma unroll
    for (int t = 0; t < STEP; t++) {
        const int row = STEP * step + t;
        if constexpr (MODE != LOCAL) tiles.Q.set(row, j, r[t] * before);
        if constexpr (MODE == FORWARD || MODE == GRADIENTS) tiles.d[row][j] = d[t];
        before *= d[t];
    }
    tiles.P[step][j] = before;
    if constexpr (MODE != LOCAL_MIRRORED) {
#pragma unroll
        for (int t = STEP - 1; t >= 0; t--) {
            tiles.K.set(STEP * step + t, j, k[t] * behind);
            behind *= d[t];
        }
    }
}

// A, summed over 32 keys: a lane has tokens t = i and i + 8, and 8 keys. As s goes down x is 0 to t, then r, then times
// one more d each time: no lane leaves the others' way. A_tt, with u, is summed by itself.
template <typename Tiles>
__device__ void pairs(Tiles& tiles, int step, int half) {
    // (0 4 1 5 ..: eight lanes read two rows, whose halves lie in the same banks unless they are 4 apart.)
    const int i = threadIdx.x % 32 / 8 + threadIdx.x / 4 % 2 * 4, part = threadIdx.x % 4, column = 32 * half + 8 * part;
    const auto sum4 = [](float x) {  // over the lanes that share a token
        x += __shfl_xor_sync(0xffffffffu, x, 1);
        return x + __shfl_xor_sync(0xffffffffu, x, 2);
    };
    float r[2][8], x[2][8] = {}, A_tt[2] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float k[8];
        tiles.r.get_eight(STEP * step + i + 8 * h, column, r[h]), tiles.k.get_eight(STEP * step + i + 8 * h, column, k);
#pragma unroll
        for (int c = 0; c < 8; c++) A_tt[h] += r[h][c] * tiles.u[column + c] * k[c];
        A_tt[h] = sum4(A_tt[h]);
    }
#pragma unroll 4
    for (int s = STEP - 1; s >= 0; s--) {
        const int row = STEP * step + s;
        float k[8];
        tiles.k.get_eight(row, column, k);
        const float4 low = *reinterpret_cast<const float4*>(&tiles.d[row][column]),
                     high = *reinterpret_cast<const float4*>(&tiles.d[row][column + 4]);
        const float d[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int t = i + 8 * h;
            float sum = 0.0f;
#pragma unroll
            for (int c = 0; c < 8; c++) sum += x[h][c] * k[c], x[h][c] = s == t ? r[h][c] : x[h][c] * d[c];
            sum = sum4(sum);
            if (part == s % 4) tiles.A[step][half][t][s] = s == t ? A_tt[h] : sum;
        }
    }
}

// A's transpose as a right factor; mirrored: A.
template <bool MIRROR, int PARTS>
__device__ Parts<PARTS> link(const float (&A)[2][STEP][STEP + 8]) {
    const Lane lane;
    Block x;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const int from = lane.j + n / 2 % 2 * 8 + n % 2, to = lane.i + n / 4 * 8;
        const int t = MIRROR ? from : to, s = MIRROR ? to : from;
        x.x[n] = A[0][t][s] + A[1][t][s];
    }
    return Parts<PARTS>(x);
}

// S <- S diag(P) + in^T writes: what a step makes of a warp's 16 rows. in: already transposed.
template <int PARTS>
__device__ void advance(Block (&S)[4], const Parts<PARTS>& in, const Tile<PARTS, L>& writes, const float* P, int step) {
#pragma unroll
    for (int m = 0; m < 4; m++) {
        S[m].scale_columns(P + 16 * m);
        add(S[m], in, take<right>(writes, STEP * step, 16 * m));
    }
}

// ---------------------------------------------------------------------------------------------- gradients

// 16 rows of dY S or V D, 32 keys.
template <int PARTS>
__device__ void product(Block (&x)[2], const Tile<PARTS, L>& rows, const Tile<PARTS, N>& S, int step, int half) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const Parts<PARTS> f = take<left>(rows, STEP * step, 16 * n);
#pragma unroll
        for (int m = 0; m < 2; m++) add(x[m], f, take<right>(S, 16 * n, 32 * half + 16 * m));
    }
}
__device__ inline void put_sums(float (*to)[N + 8], const Block (&x)[2], int step, int half) {
    const Lane lane;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
            *reinterpret_cast<float2*>(
                &to[STEP * step + lane.i + n % 2 * 8][32 * half + 16 * m + lane.j + n / 2 * 8]) =
                {x[m].x[2 * n], x[m].x[2 * n + 1]};
        }
    }
}

// S before the chunk, as it was saved, and before its second step; C of a step, in the warp of its lower keys.
template <int PARTS>
__device__ void replay(GradientTiles<PARTS>& tiles, const uint4* saved, int warp) {
    const Parts<PARTS> in = take<left_t>(tiles.v, 0, 16 * warp);
    Block S[4];
#pragma unroll
    for (int m = 0; m < 4; m++) {
        Parts<PARTS> before;
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            const uint4 s = saved[(p * WARPS * 4 + m) * 32];
            memcpy(before.part[p].x, &s, sizeof s);
        }
        tiles.S[0].put(16 * warp, 16 * m, before);
        S[m] = before.sum();
    }
    advance(S, in, tiles.K, tiles.P[0], 0);
#pragma unroll
    for (int m = 0; m < 4; m++) tiles.S[1].put(16 * warp, 16 * m, Parts<PARTS>(S[m]));

    const int step = warp / 2;
    if (warp % 2) return;
    Block C;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        add(C, take<left>(tiles.in, STEP * step, 16 * n), take<right_t>(tiles.v, STEP * step, 16 * n));
    }
    const Lane lane;
#pragma unroll
    for (int n = 0; n < 8; n++) tiles.C[step][lane.i + n / 2 % 2 * 8][lane.j + n / 4 * 8 + n % 2] = C.x[n];
}

// What a warp's 16 values add to diag(S^T D); D is still in registers, S in its tile.
template <int PARTS>
__device__ void diagonal(GradientTiles<PARTS>& tiles, const Block (&D)[4], int step, int warp) {
    const Lane lane;
#pragma unroll
    for (int m = 0; m < 4; m++) {
        float2 sum[2] = {};
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const float2 s = tiles.S[step].get_pair(16 * warp + lane.i + n % 2 * 8, 16 * m + lane.j + n / 2 * 8);
            sum[n / 2].x += s.x * D[m].x[2 * n], sum[n / 2].y += s.y * D[m].x[2 * n + 1];
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            for (int bit = 4; bit < 32; bit *= 2) {
                sum[h].x += __shfl_xor_sync(0xffffffffu, sum[h].x, bit);
                sum[h].y += __shfl_xor_sync(0xffffffffu, sum[h].y, bit);
            }
            float* place = &tiles.SD[step][warp][16 * m + lane.j + 8 * h];
            if (lane.i == 0) *reinterpret_cast<float2*>(place) = sum[h];
        }
    }
}

// dr dk dw of 16 tokens, a key j a lane; returns what they add to du. at: the step's first token and this key in
// [B,T,H,N]. The sums over pairs go down in t and, for each t, down in s; then, for all s < t,
//     old = k_s d(s,t)      newer_s = sum_(z>t) C_zs r_z d(t,z)      after t:  newer_s <- newer_s d_t + C_ts r_t
// and at t = s newer_s is the sum in dk_s.
template <typename IO>
__device__ float channels(GradientTiles<parts<IO>>& tiles, const Tensors<IO>& x, int step, int j, int64_t at,
                          int stride, int tokens) {
    const IO(*w)[N] = reinterpret_cast<const IO(*)[N]>(&tiles.Q) + STEP * step;
    const float(*dQ)[N + 8] = tiles.dQK[0] + STEP * step, (*dK)[N + 8] = tiles.dQK[1] + STEP * step;
    const float(*its_d)[N] = tiles.d + STEP * step;
    const float(*C)[STEP] = tiles.C[step];
    float k[STEP], d[STEP], X[STEP], q[STEP], newer[STEP] = {};  // X: what leaves the step; q: dQ d((,t)
    float leaving = 0.0f, before = 1.0f;
#pragma unroll
    for (int n = 0; n < WARPS; n++) leaving += tiles.SD[step][n][j];
    leaving *= tiles.P[step][j];
#pragma unroll
    for (int t = 0; t < STEP; t++) {
        const int row = STEP * step + t;
        k[t] = tiles.k.get(row, j), d[t] = its_d[t][j], X[t] = leaving, q[t] = dQ[t][j] * before;
        leaving += tiles.K.get(row, j) * dK[t][j];
        before *= d[t];
    }
    const float u = tiles.u[j];
    at += (STEP - 1) * stride;
    float behind = 1.0f, arriving = 0.0f, du = 0.0f;
#pragma unroll
    for (int t = STEP - 1; t >= 0; t--, at -= stride) {
        const float r = tiles.r.get(STEP * step + t, j), C_tt = C[t][t];
        float dr = q[t] + C_tt * u * k[t], dk = behind * dK[t][j] + C_tt * u * r + newer[t];
        float across = 0.0f, product = 1.0f;
#pragma unroll
        for (int s = t - 1; s >= 0; s--) {
            const float old = k[s] * product;
            dr += C[t][s] * old;
            across += newer[s] * old;
            newer[s] = newer[s] * d[t] + C[t][s] * r;
            product *= d[s];
        }
        const float all = X[t] + arriving + across * d[t];
        arriving += r * q[t];
        behind *= d[t];
        du += C_tt * r * k[t];
        if (t < tokens) {
            x.dr[at] = from_float<IO>(dr), x.dk[at] = from_float<IO>(dk);
            // from w = 5 on d, and with it X, is 0; exp(w) alone would overflow
            const float rate = expf(fminf(to_float(w[t][j]), 80.0f));
            x.dw[at] = from_float<IO>(-rate * all);
        }
    }
    return du;
}

// ---------------------------------------------------------------------------------------------- the walk

template <Mode MODE, typename IO>
struct Traits {
    static constexpr bool mirror = MODE == GRADIENTS || MODE == LOCAL_MIRRORED;
    static constexpr bool gradients = MODE == GRADIENTS, outputs = gradients || MODE == FORWARD;
    static constexpr int PARTS = parts<IO>;
    using Tiles = std::conditional_t<gradients, GradientTiles<PARTS>,
                                     std::conditional_t<outputs, OutputTiles<PARTS>, LocalTiles<PARTS>>>;
    static constexpr size_t smem = sizeof(Tiles);
};

// So many blocks fit into the 227 KB of an H100's multiprocessor; registers must suffice for them too.
template <Mode MODE, typename IO>
__global__ void __launch_bounds__(THREADS, parts<IO> == 1 && MODE != GRADIENTS ? 3 : 2)
wkv6_walk_kernel(Sizes sizes, Tensors<IO> x) {
    using M = Traits<MODE, IO>;
    constexpr int PARTS = M::PARTS;
    typename M::Tiles& tiles = *reinterpret_cast<typename M::Tiles*>(dyn_smem());
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // so that nvcc knows it is the same in all lanes
    const int its_step = warp / 2, half = warp % 2, j = 32 * half + threadIdx.x % 32;
    // Of each head all segments; but nothing asks how the walk's last one changes the state.
    const unsigned each = sizes.segments - !M::outputs;
    const unsigned head = blockIdx.x / each, segment = blockIdx.x % each + (MODE == LOCAL_MIRRORED);
    const int64_t cell = int64_t{head} * sizes.segments + segment;
    const int first = segment * sizes.segment_chunks;  // a chunk's number; below, the count of this segment's
    const int count = lesser(sizes.segment_chunks, sizes.chunks - first);
    const int stride = sizes.H * N;
    const int64_t offset = sizes.offset(head);
    const auto& reads = M::mirror ? tiles.K : tiles.Q;   // what the state is multiplied with
    const auto& writes = M::mirror ? tiles.Q : tiles.K;  // and what is written into it

    Block S[4];  // mirrored: D
    float du = 0.0f, all = 1.0f;
    if constexpr (M::outputs) {
        load_state(S, x.start + cell * N * N, warp);
        if (threadIdx.x < N) tiles.u[threadIdx.x] = to_float(x.u[head % sizes.H * N + threadIdx.x]);
    }
    for (int n = 0; n < count; n++) {
        const int chunk = first + (M::mirror ? count - 1 - n : n);
        const int64_t token = int64_t{chunk} * L, at = offset + token * stride;
        const int tokens = lesser(sizes.T - token, L), its_at = STEP * its_step * stride + j;
        __syncthreads();  // all is done with the chunk before
        if constexpr (MODE != LOCAL) fetch<IO>(tiles.r, x.r + at, stride, tokens);
        if constexpr (MODE != LOCAL_MIRRORED) fetch<IO>(tiles.k, x.k + at, stride, tokens);
        if constexpr (M::gradients) fetch<IO>(tiles.v, x.v + at, stride, tokens);
        fetch<IO>(tiles.in, (M::mirror ? x.dy : x.v) + at, stride, tokens);
        cp_async_commit();
        if (n + 1 < count) {
            const int64_t next = at + (M::mirror ? -L : L) * stride;
            const int its_tokens = M::mirror ? L : lesser(sizes.T - token - L, L);
            expect(x.w + next, stride, its_tokens);
            if constexpr (MODE != LOCAL) expect(x.r + next, stride, its_tokens);
            if constexpr (MODE != LOCAL_MIRRORED) expect(x.k + next, stride, its_tokens);
            if constexpr (MODE != LOCAL_MIRRORED) expect(x.v + next, stride, its_tokens);
            if constexpr (M::mirror) expect(x.dy + next, stride, its_tokens);
        }
        float d[STEP];
        decays(d, x.w + at + j, stride, its_step, tokens);
        cp_async_wait<0>();
        __syncthreads();  // inputs are here
        factors<MODE>(tiles, d, its_step, j);
        if constexpr (M::outputs) {
            __syncwarp();
            pairs(tiles, its_step, half);
        }
        __syncthreads();  // Q, K, P, A are

        const int64_t chunks_before = (int64_t{head} * sizes.chunks + chunk) * PARTS;
        const int64_t its_saved = (chunks_before * WARPS + warp) * 4 * 32 + threadIdx.x % 32;
        Block dQ[2], dK[2];
        if constexpr (M::gradients) {
            replay(tiles, x.saved + its_saved, warp);
            __syncthreads();
            product(dQ, tiles.in, tiles.S[its_step], its_step, half);
            __syncthreads();  // nobody needs S of others any more, nor dY
        }
#pragma unroll 1  // both at once take more registers than there are
        for (int i = 0; i < STEPS; i++) {
            const int step = M::mirror ? STEPS - 1 - i : i;
            const Parts<PARTS> in = take<left_t>(tiles.in, STEP * step, 16 * warp);
            if constexpr (M::outputs) {
                Block Y;  // mirrored: dV
                if constexpr (M::gradients) diagonal(tiles, S, step, warp);
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    const Parts<PARTS> before(S[m]);
                    add(Y, before, take<right_t>(reads, STEP * step, 16 * m));
                    if constexpr (M::gradients) tiles.S[step].put(16 * warp, 16 * m, before);
                    if (MODE == FORWARD && i == 0 && x.saved) {
#pragma unroll
                        for (int p = 0; p < PARTS; p++) {
                            const uint32_t(&s)[4] = before.part[p].x;
                            x.saved[its_saved + (p * WARPS * 4 + m) * 32] = {s[0], s[1], s[2], s[3]};
                        }
                    }
                }
                add(Y, in, link<M::mirror, PARTS>(tiles.A[step]));
                __syncwarp();
                tiles.in.put_transposed(STEP * step, 16 * warp, Y);
            }
            advance(S, in, writes, tiles.P[step], step);
        }
        if constexpr (M::outputs) {
            __syncthreads();
            write_out<IO>(tiles.in, x.out + at, stride, tokens);
        } else if (threadIdx.x < N) {
            for (int step = 0; step < STEPS; step++) all *= tiles.P[step][threadIdx.x];
        }
        if constexpr (M::gradients) {
            fetch_raw(&tiles.Q, x.w + at, stride, tokens);  // once more: dw needs it
            cp_async_commit();
            product(dK, tiles.v, tiles.S[its_step], its_step, half);
            cp_async_wait<0>();
            __syncthreads();  // w is here; nobody needs D any more
            put_sums(tiles.dQK[0], dQ, its_step, half), put_sums(tiles.dQK[1], dK, its_step, half);
            __syncwarp();
            du += channels(tiles, x, its_step, j, at + its_at, stride, tokens - STEP * its_step);
        }
    }
    if constexpr (!M::outputs) {
        store_state(S, x.gains + cell * N * N, warp);
        if (threadIdx.x < N) x.decays[cell * N + threadIdx.x] = all;
    } else if (segment == (M::mirror ? 0 : sizes.segments - 1)) {
        store_state(S, x.end + int64_t{head} * N * N, warp);
    }
    if constexpr (M::gradients) x.du[(cell * STEPS + its_step) * N + j] = du;
}

// ---------------------------------------------------------------------------------------------- joining segments

// gains [head,segment,value,key] -> in its place the state before (mirrored: the gradient after) every segment. A
// thread does four numbers of a head's state.
__global__ void __launch_bounds__(THREADS)
wkv6_scan_kernel(Sizes sizes, bool mirror, const float* state, const float* decays, float* gains) {
    constexpr int BLOCKS = N * N / 4 / THREADS;  // of a head
    const int64_t head = blockIdx.x / BLOCKS, segments = sizes.segments;
    const int place = (blockIdx.x % BLOCKS * THREADS + threadIdx.x) * 4;
    float4 S = *reinterpret_cast<const float4*>(state + head * N * N + place);
    for (int64_t n = 0; n < segments; n++) {
        const int64_t cell = head * segments + (mirror ? segments - 1 - n : n);
        float4* at = reinterpret_cast<float4*>(gains + cell * N * N + place);
        const float4 before = S;
        if (n < segments - 1) {
            const float4 gain = *at, d = *reinterpret_cast<const float4*>(decays + cell * N + place % N);
            S = {S.x * d.x + gain.x, S.y * d.y + gain.y, S.z * d.z + gain.z, S.w * d.w + gain.w};
        }
        *at = before;
    }
}

// ---------------------------------------------------------------------------------------------- launches

// scratch: the gains, then the decays of all segments; unused with one segment.
template <Mode MODE, typename IO>
int run(Sizes sizes, Tensors<IO> x, const float* state, float* scratch, void* stream) {
    constexpr bool MIRROR = Traits<MODE, IO>::mirror;
    constexpr Mode ACROSS = MIRROR ? LOCAL_MIRRORED : LOCAL;
    x.start = state;
    if (sizes.segments > 1) {
        x.start = x.gains = scratch, x.decays = scratch + sizes.cells * N * N;
        int error = launch(wkv6_walk_kernel<ACROSS, IO>, sizes.cells - sizes.heads, THREADS,
                           Traits<ACROSS, IO>::smem, stream, sizes, x);
        if (error) return error;
        error = launch(wkv6_scan_kernel, sizes.heads * (N * N / 4 / THREADS), THREADS, 0, stream, sizes, MIRROR,
                       state, static_cast<const float*>(x.decays), x.gains);
        if (error) return error;
    }
    return launch(wkv6_walk_kernel<MODE, IO>, sizes.cells, THREADS, Traits<MODE, IO>::smem, stream, sizes, x);
}

template <typename IO>
int forward(Sizes sizes, const void* const* inputs, const float* state, void* y, float* state_T, void* saved,
            float* scratch, void* stream) {
    Tensors<IO> x(inputs);
    x.out = static_cast<IO*>(y), x.end = state_T, x.saved = static_cast<uint4*>(saved);
    return run<FORWARD>(sizes, x, state, scratch, stream);
}

template <typename IO>
int backward(Sizes sizes, const void* const* inputs, void* saved, const void* dy, const float* dstate_T,
             void* const* d, float* du, float* dstate, float* scratch, void* stream) {
    Tensors<IO> x(inputs);
    IO* const* grads = reinterpret_cast<IO* const*>(d);  // dr dw dk dv
    x.dy = static_cast<const IO*>(dy), x.saved = static_cast<uint4*>(saved), x.end = dstate;
    x.dr = grads[0], x.dw = grads[1], x.dk = grads[2], x.out = grads[3], x.du = du;
    return run<GRADIENTS>(sizes, x, dstate_T, scratch, stream);
}

static_assert(sizeof(GradientTiles<2>) <= 99 * 1024, "consumer cards have no more");

}  // namespace

// C interface, bound in wkv6_cuda.py. dtype of the [B,T,H,N] tensors and u: 0 fp32, 1 bf16, 2 fp16. `inputs`: five
// pointers in the order r w k v u; `grads`: four, of dr dw dk dv; `saved` may be null in the forward. du is fp32,
// [B,H,segment,step,key], to be summed over all but h and key. Each function returns the cudaError_t of its launches.
extern "C" {

int wkv6_forward(int dtype, int64_t B, int64_t T, int64_t H, int64_t segment_chunks, const void* const* inputs,
                 const float* state, void* y, float* state_T, void* saved, float* scratch, void* stream) {
    const auto run = dtype == 0 ? forward<float> : dtype == 1 ? forward<bf16> : forward<__half>;
    return run({B, T, H, segment_chunks}, inputs, state, y, state_T, saved, scratch, stream);
}

int wkv6_backward(int dtype, int64_t B, int64_t T, int64_t H, int64_t segment_chunks, const void* const* inputs,
                  void* saved, const void* dy, const float* dstate_T, void* const* grads, float* du, float* dstate,
                  float* scratch, void* stream) {
    const auto run = dtype == 0 ? backward<float> : dtype == 1 ? backward<bf16> : backward<__half>;
    return run({B, T, H, segment_chunks}, inputs, saved, dy, dstate_T, grads, du, dstate, scratch, stream);
}

const char* wkv6_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // extern "C"
