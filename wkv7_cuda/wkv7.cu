// WKV-7 in exact fp32 arithmetic: the sequential recurrence, spread over lanes, warps and blocks.
//
// EQUATION, per batch entry and head; all vectors are columns of length N = 64, S is [value, key]:
//
//     d_t = exp(-e^(-1/2) sigma(w_t))                       w is the raw decay logit, so 0.545 < d < 1
//     u_t = S_(t-1) a_t                                     what the state answers to the removal key
//     S_t = S_(t-1) diag(d_t) + u_t b_t^T + v_t k_t^T
//     y_t = S_t r_t
//
// GRADIENTS. G is dL/dS: it starts as the gradient of the final state, and t runs from T down to 1:
//
//     G  <- G + dy_t r_t^T                                  now dL/dS_t
//     z_t = G b_t                                           dL/du_t
//     dv_t = G k_t     dr_t = S_t^T dy_t     dk_t = G^T v_t     db_t = G^T u_t     da_t = S_(t-1)^T z_t
//     dd_t[j] = sum_i G[i,j] S_(t-1)[i,j]                   dw = dd d (-e^(-1/2)) sigma(w) sigma(-w)
//     G  <- G diag(d_t) + z_t a_t^T                         now dL/dS_(t-1); after t = 1 the initial state's gradient
//
// HOW IT IS CUT. Two independences leave only short sums between threads and no atomics:
//
//  * Rows of S (values) never meet: row i needs u_t[i], a sum along that row. The same holds for rows of G and z_t[i].
//    So both recurrences walk over *rows*, 16 of a head's 64 per block, in time order:
//        wkv7_forward        t = 1..T     y, final state     saves u and, every 16 tokens, S
//        wkv7_backward_rows  t = T..1     dv, dL/dS_0        keeps z and, every 16 tokens, G
//  * With u and z known, columns of S and G (keys) never meet either: S[:,j] <- S[:,j] d_j + u b_j + v k_j. All other
//    gradients are sums down a column. And with S and G known every 16 tokens, chunks of 16 tokens never meet:
//        wkv7_backward_columns  one block per chunk and 16 columns      dr dw dk da db
//    G runs backward in time and S is needed at the same t. S is not stepped back (dividing by d loses 1.83x accuracy
//    a token) but replayed: once over the chunk leaving it every 4 tokens in shared memory, then 4 tokens at a time
//    into registers.
//
//   kernel     grid                  block          a thread holds                             shared memory
//   rows       B*H*4                 64 threads     2 rows x 8 keys of S or G; the next        23 KB
//                                                   chunk's inputs, on their way from memory
//   columns    B*H*ceil(T/16)*4      128 threads    1 column x 8 values of G, and of S at 5    43 KB
//                                                   neighbouring times
//   In all of them 8 lanes share one sum along the long axis of 64 (three shuffles); lane q of the 8 owns the places
//   4q..4q+3 and 32+4q..32+4q+3, so that the 8 lanes read 128 consecutive bytes of shared memory at once.
//
// MEMORY, beyond inputs and outputs, all fp32; `states` are [B,H,chunk,N key,N value], transposed because the columns
// kernel reads columns, and the row kernels write whole 32-byte sectors either way:
//     saved    by the forward, if asked:  S before every chunk of 16 tokens; then u [B,T,H,N]
//     scratch  during the backward:       G after every chunk of 16 tokens; then z [B,T,H,N]
// each 1024 + 256 bytes per token and head while T is a multiple of 16.
//
// NUMERICS. Inputs and outputs are fp32, bf16 or fp16; all else is fp32 with IEEE division and expf, no TF32, no fast
// math. Sums run 8 terms in order, then a tree over the lanes: the result does not depend on the schedule, and the
// error is that of the plain recurrence in fp32 or below (tests/test_wkv_cuda.py).
//
// LIMITS. N = 64. T >= 1: a short last chunk is filled with tokens that change nothing (d = 1, the rest 0). At most
// 2^31 - 1 blocks a launch. Pointers aligned to 16 bytes (the binding checks). Offsets are 64-bit.
#include "device.cuh"

namespace {

constexpr int N = 64;          // head size
constexpr int CHUNK = 16;      // tokens in shared memory at a time, and between two kept states
constexpr int ROWS = 16;       // rows of the state per block of a rows kernel
constexpr int COLUMNS = 16;    // columns of the state per block of the columns kernel
constexpr int GROUP = 4;       // tokens replayed into registers at a time
constexpr int ROW_THREADS = ROWS / 2 * 8;
constexpr int COLUMN_THREADS = COLUMNS * 8;
constexpr float MINUS_RATE = -0.60653066f;  // -e^(-1/2): log d at sigma = 1

struct Sizes {
    int64_t B, T, H;
    __host__ __device__ int64_t heads() const { return B * H; }
    __host__ __device__ int64_t chunks() const { return (T + CHUNK - 1) / CHUNK; }
    __host__ __device__ int64_t states() const { return heads() * chunks() * N * N; }  // floats in all kept states
    // Of the first token of a head (numbered b H + h) in [B,T,H,N].
    __device__ int64_t offset(int64_t head) const { return (head / H * T * H + head % H) * N; }
};

template <typename IO>
struct Inputs {
    const IO *r, *w, *k, *v, *a, *b;
};

// d and its derivative to the logit. With e = exp(-|w|) neither overflow nor 1 - sigma (which cancels) can occur.
struct Decay {
    float d, slope;
};
__device__ inline Decay decay(float w) {
    const float e = expf(-fabsf(w)), large = 1.0f / (1.0f + e), small = e * large;
    const float sigma = w >= 0.0f ? large : small;
    const float d = expf(MINUS_RATE * sigma);
    return {d, MINUS_RATE * large * small * d};
}

// Eight values along the long axis (keys in a walk over rows, values in a chunk of columns), those of lane q.
struct Eight {
    float x[8];
};
__device__ inline Eight eight(const float* row, int q) {
    const float4 low = *reinterpret_cast<const float4*>(row + 4 * q);
    const float4 high = *reinterpret_cast<const float4*>(row + 32 + 4 * q);
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}
__device__ inline void put_eight(float* row, int q, const Eight& s) {
    *reinterpret_cast<float4*>(row + 4 * q) = {s.x[0], s.x[1], s.x[2], s.x[3]};
    *reinterpret_cast<float4*>(row + 32 + 4 * q) = {s.x[4], s.x[5], s.x[6], s.x[7]};
}
__device__ inline int place(int q, int m) { return (m < 4 ? 0 : 28) + 4 * q + m; }  // of Eight::x[m] on the long axis
__device__ inline float dot(const Eight& p, const Eight& s) {
    float sum = p.x[0] * s.x[0];
    for (int m = 1; m < 8; m++) sum += p.x[m] * s.x[m];
    return sum8(sum);
}
// x <- x d + p m + s n, elementwise in the long axis; the two forms are a row's (d, m, n vectors) and a column's.
__device__ inline void step_row(Eight& x, const Eight& d, float p, const Eight& m, float s, const Eight& n) {
    for (int i = 0; i < 8; i++) x.x[i] = x.x[i] * d.x[i] + p * m.x[i] + s * n.x[i];
}
__device__ inline void step_column(Eight& x, float d, const Eight& p, float m, const Eight& s, float n) {
    for (int i = 0; i < 8; i++) x.x[i] = x.x[i] * d + p.x[i] * m + s.x[i] * n;
}

// A tile is [CHUNK tokens][WIDTH channels] fp32 in shared memory. It is the part of a tensor [B,T,H,N] that belongs to
// one head, tokens first.. and WIDTH channels; x points to token 0, `stride` is H*N, tokens >= T are filled.
// read() only starts the loads into registers; the thread waits for them in put(), after other work.
template <typename IO, int WIDTH, int THREADS>
struct Fetch {
    static constexpr int QUADS = CHUNK * WIDTH / 4;
    static constexpr int EACH = (QUADS + THREADS - 1) / THREADS;
    Quad<IO> quads[EACH];

    __device__ void read(const IO* x, int64_t stride, int64_t first, int64_t T, float fill = 0.0f) {
        for (int e = 0; e < EACH; e++) {
            const int i = e * THREADS + threadIdx.x, t = i / (WIDTH / 4), channel = i % (WIDTH / 4) * 4;
            quads[e] = i < QUADS && first + t < T
                           ? *reinterpret_cast<const Quad<IO>*>(x + (first + t) * stride + channel)
                           : Quad<IO>::pack(fill, fill, fill, fill);
        }
    }
    template <typename F>
    __device__ void put(float (*tile)[WIDTH], F&& convert) const {
        for (int e = 0; e < EACH; e++) {
            const int i = e * THREADS + threadIdx.x, t = i / (WIDTH / 4), channel = i % (WIDTH / 4) * 4;
            const float4 x = quads[e].unpack();
            if (i < QUADS) {
                const float4 y = {convert(x.x), convert(x.y), convert(x.z), convert(x.w)};
                *reinterpret_cast<float4*>(&tile[t][channel]) = y;
            }
        }
    }
    __device__ void put(float (*tile)[WIDTH]) const {
        put(tile, [](float x) { return x; });
    }
};

template <typename IO, int WIDTH, int THREADS>
__device__ void write_tile(const float (*tile)[WIDTH], IO* x, int64_t stride, int64_t first, int64_t T) {
    for (int i = threadIdx.x; i < CHUNK * WIDTH / 4; i += THREADS) {
        const int t = i / (WIDTH / 4), channel = i % (WIDTH / 4) * 4;
        const float4 y = *reinterpret_cast<const float4*>(&tile[t][channel]);
        const Quad<IO> quad = Quad<IO>::pack(y.x, y.y, y.z, y.w);
        if (first + t < T) store(x + (first + t) * stride + channel, quad.words);
    }
}

// ---------------------------------------------------------------------------------------------- walks over rows

struct RowTiles {
    float r[CHUNK][N], d[CHUNK][N], k[CHUNK][N], a[CHUNK][N], b[CHUNK][N];
    float in[CHUNK][ROWS];                      // v forward, dy backward
    float out[CHUNK][ROWS], inner[CHUNK][ROWS];  // y and u forward, dv and z backward
};

// The block of a walk is 64 threads: 8 pairs of rows times 8 parts of the keys. Per token a thread does 5 multiply-adds
// per state element and 10 reads of 16 bytes. Only u (or z) makes a token wait for the one before it: a dot product,
// three shuffles, one multiply-add. y (or dv) hangs off that chain and overlaps with the next token.
// d is computed by each of the 4 blocks of a head anew, once per chunk: cheaper than a kernel and a tensor for it.
//
// What the two walks have in common: who a thread is, and the way of a chunk into and out of shared memory.
template <typename IO>
struct RowWalk {
    const Sizes sizes;
    const Inputs<IO> inputs;
    const int64_t head, stride, offset;  // the head's number; from a token to the next; to its first token
    const int first_row, pair, q;        // rows first_row + 2 pair, + 1; part q of the keys
    RowTiles& tiles;
    Fetch<IO, N, ROW_THREADS> r, w, k, a, b;
    Fetch<IO, ROWS, ROW_THREADS> in;

    __device__ RowWalk(Sizes sizes, Inputs<IO> inputs)
        : sizes(sizes), inputs(inputs), head(blockIdx.x / (N / ROWS)), stride(sizes.H * N), offset(sizes.offset(head)),
          first_row(blockIdx.x % (N / ROWS) * ROWS), pair(threadIdx.x / 8), q(threadIdx.x % 8),
          tiles(*reinterpret_cast<RowTiles*>(dyn_smem())) {}

    __device__ void read(int64_t chunk, const IO* x) {
        const int64_t first = chunk * CHUNK, T = sizes.T;
        r.read(inputs.r + offset, stride, first, T);
        w.read(inputs.w + offset, stride, first, T, -INFINITY);  // d = 1
        k.read(inputs.k + offset, stride, first, T);
        a.read(inputs.a + offset, stride, first, T);
        b.read(inputs.b + offset, stride, first, T);
        in.read(x + offset + first_row, stride, first, T);
    }
    // Before a chunk: what was read goes to shared memory. The barrier also keeps the last results until all are out.
    __device__ void begin() {
        r.put(tiles.r), k.put(tiles.k), a.put(tiles.a), b.put(tiles.b), in.put(tiles.in);
        w.put(tiles.d, [](float logit) { return decay(logit).d; });
        __syncthreads();
    }
    // After it: results go to memory, [B,T,H,N]; `inner` may be null.
    __device__ void end(int64_t chunk, IO* out, float* inner) {
        __syncthreads();
        const int64_t at = offset + first_row;
        write_tile<IO, ROWS, ROW_THREADS>(tiles.out, out + at, stride, chunk * CHUNK, sizes.T);
        if (inner) write_tile<float, ROWS, ROW_THREADS>(tiles.inner, inner + at, stride, chunk * CHUNK, sizes.T);
    }
    __device__ void load_state(Eight (&s)[2], const float* state) const {
        const float* row = state + (head * N + first_row + 2 * pair) * N;
        s[0] = eight(row, q), s[1] = eight(row + N, q);
    }
    __device__ void store_state(const Eight (&s)[2], float* state) const {
        float* row = state + (head * N + first_row + 2 * pair) * N;
        put_eight(row, q, s[0]), put_eight(row + N, q, s[1]);
    }
    // Into states [B,H,chunk,key,value].
    __device__ void keep_state(const Eight (&s)[2], float* states, int64_t chunk) const {
        float* column = states + (head * sizes.chunks() + chunk) * N * N + first_row + 2 * pair;
        for (int m = 0; m < 8; m++) {
            *reinterpret_cast<float2*>(column + place(q, m) * N) = {s[0].x[m], s[1].x[m]};
        }
    }
};

// t = 1..T: y, the final state, and for the backward (if saved is not null) S before every chunk and u.
template <typename IO>
__global__ void __launch_bounds__(ROW_THREADS)
wkv7_forward_kernel(Sizes sizes, Inputs<IO> inputs, const float* state, IO* y, float* state_T, float* saved) {
    RowWalk<IO> walk(sizes, inputs);
    RowTiles& tiles = walk.tiles;
    const int q = walk.q, pair = walk.pair;
    float* u = saved ? saved + sizes.states() : nullptr;
    Eight S[2];
    walk.load_state(S, state);
    walk.read(0, inputs.v);
    for (int64_t chunk = 0; chunk < sizes.chunks(); chunk++) {
        walk.begin();
        walk.read(chunk + 1, inputs.v);  // past the end it only fills
        if (saved) walk.keep_state(S, saved, chunk);
#pragma unroll 2
        for (int t = 0; t < CHUNK; t++) {
            const Eight r = eight(tiles.r[t], q), d = eight(tiles.d[t], q), k = eight(tiles.k[t], q),
                        a = eight(tiles.a[t], q), b = eight(tiles.b[t], q);
            for (int i = 0; i < 2; i++) {
                const int row = 2 * pair + i;
                const float u_t = dot(S[i], a);
                step_row(S[i], d, u_t, b, tiles.in[t][row], k);
                const float y_t = dot(S[i], r);
                if (q == 0) tiles.out[t][row] = y_t, tiles.inner[t][row] = u_t;
            }
        }
        walk.end(chunk, y, u);
    }
    walk.store_state(S, state_T);
}

// t = T..1: dv, the gradient of the initial state, and for the columns kernel G after every chunk and z. It needs no S:
// G obeys a recurrence of its own, whose inputs are those of the operator and dy.
template <typename IO>
__global__ void __launch_bounds__(ROW_THREADS)
wkv7_backward_rows_kernel(Sizes sizes, Inputs<IO> inputs, const IO* dy, const float* dstate_T, IO* dv, float* dstate,
                          float* scratch) {
    RowWalk<IO> walk(sizes, inputs);
    RowTiles& tiles = walk.tiles;
    const int q = walk.q, pair = walk.pair;
    float* z = scratch + sizes.states();
    Eight G[2];
    walk.load_state(G, dstate_T);
    walk.read(sizes.chunks() - 1, dy);
    for (int64_t chunk = sizes.chunks() - 1; chunk >= 0; chunk--) {
        walk.begin();
        if (chunk > 0) walk.read(chunk - 1, dy);
        walk.keep_state(G, scratch, chunk);
#pragma unroll 2
        for (int t = CHUNK - 1; t >= 0; t--) {
            const Eight r = eight(tiles.r[t], q), d = eight(tiles.d[t], q), k = eight(tiles.k[t], q),
                        a = eight(tiles.a[t], q), b = eight(tiles.b[t], q);
            for (int i = 0; i < 2; i++) {
                const int row = 2 * pair + i;
                for (int m = 0; m < 8; m++) G[i].x[m] += tiles.in[t][row] * r.x[m];
                const float z_t = dot(G[i], b), dv_t = dot(G[i], k);
                for (int m = 0; m < 8; m++) G[i].x[m] = G[i].x[m] * d.x[m] + z_t * a.x[m];
                if (q == 0) tiles.out[t][row] = dv_t, tiles.inner[t][row] = z_t;
            }
        }
        walk.end(chunk, dv, z);
    }
    walk.store_state(G, dstate);
}

// ---------------------------------------------------------------------------------------------- chunks of columns

struct ColumnTiles {
    float v[CHUNK][N], u[CHUNK][N], dy[CHUNK][N], z[CHUNK][N];
    float r[CHUNK][COLUMNS], d[CHUNK][COLUMNS], slope[CHUNK][COLUMNS], k[CHUNK][COLUMNS], a[CHUNK][COLUMNS],
        b[CHUNK][COLUMNS];
    float dr[CHUNK][COLUMNS], dw[CHUNK][COLUMNS], dk[CHUNK][COLUMNS], da[CHUNK][COLUMNS], db[CHUNK][COLUMNS];
    float S[CHUNK / GROUP][COLUMNS][N];  // before every GROUP-th token; each thread reads only what it wrote
};

template <typename IO>
struct ColumnGrads {
    IO *dr, *dw, *dk, *da, *db;
};

// One chunk of one head, 16 keys: dr dw dk da db of 16 tokens. 128 threads: 16 columns times 8 parts of the values.
// At each token all five sums need S_(t-1) or S_t together with G_t, although S is computed forwards and G backwards.
// Keeping S of all 16 tokens would take 64 KB of shared memory or 128 registers; so S goes over the chunk twice, first
// leaving every 4th state behind, then, 4 tokens at a time, into S[0..4] (40 registers). That is 28 column steps in
// place of 16, of 3 multiply-adds per element, beside 8 of them for G and the sums.
// At least 4 blocks per SM, or else ptxas saves registers on sm_120 until it spills.
template <typename IO>
__global__ void __launch_bounds__(COLUMN_THREADS, 4)
wkv7_backward_columns_kernel(Sizes sizes, Inputs<IO> inputs, const IO* dy, const float* saved, const float* scratch,
                             ColumnGrads<IO> grads) {
    constexpr int PARTS = N / COLUMNS;
    ColumnTiles& tiles = *reinterpret_cast<ColumnTiles*>(dyn_smem());
    const unsigned cell = blockIdx.x / PARTS, chunks = static_cast<unsigned>(sizes.chunks());  // fewer than blocks
    const int64_t head = cell / chunks, chunk = cell % chunks;
    const int64_t T = sizes.T, first = chunk * CHUNK, stride = sizes.H * N;
    const int64_t rows = sizes.offset(head);
    const int first_column = blockIdx.x % PARTS * COLUMNS, j = threadIdx.x / 8, q = threadIdx.x % 8;
    const int64_t columns = rows + first_column;

    const auto read_rows = [&](const auto* x, float (*tile)[N]) {
        Fetch<std::remove_cv_t<std::remove_pointer_t<decltype(x)>>, N, COLUMN_THREADS> fetch;
        fetch.read(x + rows, stride, first, T);
        fetch.put(tile);
    };
    Fetch<IO, COLUMNS, COLUMN_THREADS> fetch;
    const auto read_columns = [&](const IO* x, float (*tile)[COLUMNS]) {
        fetch.read(x + columns, stride, first, T);
        fetch.put(tile);
    };
    read_rows(inputs.v, tiles.v), read_rows(saved + sizes.states(), tiles.u);
    read_rows(dy, tiles.dy), read_rows(scratch + sizes.states(), tiles.z);
    read_columns(inputs.r, tiles.r), read_columns(inputs.k, tiles.k);
    read_columns(inputs.a, tiles.a), read_columns(inputs.b, tiles.b);
    fetch.read(inputs.w + columns, stride, first, T, -INFINITY);
    fetch.put(tiles.d, [](float logit) { return decay(logit).d; });
    fetch.put(tiles.slope, [](float logit) { return decay(logit).slope; });
    const int64_t column = (int64_t{cell} * N + first_column + j) * N;  // of the kept states
    Eight S[GROUP + 1], G = eight(scratch + column, q);
    S[0] = eight(saved + column, q);
    __syncthreads();

    for (int t = 0;; t++) {
        if (t % GROUP == 0) put_eight(tiles.S[t / GROUP][j], q, S[0]);
        if (t == CHUNK - GROUP) break;
        const Eight u = eight(tiles.u[t], q), v = eight(tiles.v[t], q);
        step_column(S[0], tiles.d[t][j], u, tiles.b[t][j], v, tiles.k[t][j]);
    }
#pragma unroll 1
    for (int start = CHUNK - GROUP; start >= 0; start -= GROUP) {
        S[0] = eight(tiles.S[start / GROUP][j], q);
#pragma unroll  // here and below, so that S stays in registers
        for (int s = 0; s < GROUP; s++) {
            const int t = start + s;
            const Eight u = eight(tiles.u[t], q), v = eight(tiles.v[t], q);
            S[s + 1] = S[s];
            step_column(S[s + 1], tiles.d[t][j], u, tiles.b[t][j], v, tiles.k[t][j]);
        }
#pragma unroll
        for (int s = GROUP - 1; s >= 0; s--) {  // S[s + 1] is S_t, S[s] is S_(t-1)
            const int t = start + s;
            const Eight u = eight(tiles.u[t], q), v = eight(tiles.v[t], q), dy_t = eight(tiles.dy[t], q),
                        z = eight(tiles.z[t], q);
            for (int m = 0; m < 8; m++) G.x[m] += dy_t.x[m] * tiles.r[t][j];
            const float dr = dot(S[s + 1], dy_t), dd = dot(G, S[s]), dk = dot(G, v), da = dot(S[s], z), db = dot(G, u);
            for (int m = 0; m < 8; m++) G.x[m] = G.x[m] * tiles.d[t][j] + z.x[m] * tiles.a[t][j];
            if (q == 0) {
                tiles.dr[t][j] = dr, tiles.dw[t][j] = dd * tiles.slope[t][j], tiles.dk[t][j] = dk;
                tiles.da[t][j] = da, tiles.db[t][j] = db;
            }
        }
    }
    __syncthreads();
    const auto write = [&](const float (*tile)[COLUMNS], IO* x) {
        write_tile<IO, COLUMNS, COLUMN_THREADS>(tile, x + columns, stride, first, T);
    };
    write(tiles.dr, grads.dr), write(tiles.dw, grads.dw), write(tiles.dk, grads.dk);
    write(tiles.da, grads.da), write(tiles.db, grads.db);
}

static_assert(sizeof(RowTiles) <= 48 * 1024 && sizeof(ColumnTiles) <= 48 * 1024, "more needs cudaFuncSetAttribute");

// ---------------------------------------------------------------------------------------------- launches

template <typename IO>
Inputs<IO> as_inputs(const void* const* x) {
    const IO* const* p = reinterpret_cast<const IO* const*>(x);
    return {p[0], p[1], p[2], p[3], p[4], p[5]};
}

template <typename IO>
int forward(Sizes sizes, const void* const* inputs, const float* state, void* y, float* state_T, float* saved,
            void* stream) {
    return launch(wkv7_forward_kernel<IO>, sizes.heads() * (N / ROWS), ROW_THREADS, sizeof(RowTiles), stream, sizes,
                  as_inputs<IO>(inputs), state, static_cast<IO*>(y), state_T, saved);
}

template <typename IO>
int backward(Sizes sizes, const void* const* inputs, const float* saved, const void* dy, const float* dstate_T,
             void* const* d, float* dstate, float* scratch, void* stream) {
    IO* const* grads = reinterpret_cast<IO* const*>(d);  // dr dw dk dv da db
    const int error = launch(wkv7_backward_rows_kernel<IO>, sizes.heads() * (N / ROWS), ROW_THREADS, sizeof(RowTiles),
                             stream, sizes, as_inputs<IO>(inputs), static_cast<const IO*>(dy), dstate_T, grads[3],
                             dstate, scratch);
    if (error) return error;
    return launch(wkv7_backward_columns_kernel<IO>, sizes.heads() * sizes.chunks() * (N / COLUMNS), COLUMN_THREADS,
                  sizeof(ColumnTiles), stream, sizes, as_inputs<IO>(inputs), static_cast<const IO*>(dy), saved,
                  scratch, ColumnGrads<IO>{grads[0], grads[1], grads[2], grads[4], grads[5]});
}

}  // namespace

// C interface, bound in cuda.py. dtype of the [B,T,H,N] tensors: 0 fp32, 1 bf16, 2 fp16. `inputs` and `grads` are
// arrays of six pointers in the order r w k v a b; `saved` may be null. Each function returns the cudaError_t of its
// launches.
extern "C" {

int wkv7_forward(int dtype, int64_t B, int64_t T, int64_t H, const void* const* inputs, const float* state, void* y,
                 float* state_T, float* saved, void* stream) {
    const auto run = dtype == 0 ? forward<float> : dtype == 1 ? forward<__nv_bfloat16> : forward<__half>;
    return run({B, T, H}, inputs, state, y, state_T, saved, stream);
}

int wkv7_backward(int dtype, int64_t B, int64_t T, int64_t H, const void* const* inputs, const float* saved,
                  const void* dy, const float* dstate_T, void* const* grads, float* dstate, float* scratch,
                  void* stream) {
    const auto run = dtype == 0 ? backward<float> : dtype == 1 ? backward<__nv_bfloat16> : backward<__half>;
    return run({B, T, H}, inputs, saved, dy, dstate_T, grads, dstate, scratch, stream);
}

const char* wkv7_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // extern "C"
