// WKV-7 on the CPU: the recurrence token by token, forward and backward, in float or double.
//
// Per batch and head, with column vectors of length N = 64, c = exp(-1/2), S_0 given, t = 1..T:
//
//     d = exp(-c sigma(w))    u = S a    S <- S diag(d) + u b^T + v k^T    y = S r            S: [value, key]
//
// Backward, t = T..1, starting from G = dL/dS_T:
//
//     G <- G + dy r^T                                          now G = dL/dS_t
//     z = G b          dv = G k                                sums over keys: along a row of G
//     dr = S_t^T dy    dk = G^T v    db = G^T u                sums over values: down the columns of G and S
//     da = S_{t-1}^T z               dd_j = sum_i G_ij S_{t-1},ij
//     G <- G diag(d) + z a^T                                   now G = dL/dS_{t-1}
//     dw = dd * d * (-c) sigma(w) sigma(-w)
//
// Saved, if at all: [B,H,ceil(T/16),N + 16,N], for each 16 tokens the state before them (N rows, [value, key]) and their
// u (16 rows). The backward replays the 16 tokens from there and keeps the states: nothing is ever divided by d.
//
// What makes it fast. Rows of S (values) never mix, therefore
//   forward:  S lies transposed, [key, value]; every sum is over the outer index, so no vector is ever summed up. The u
//             of the next token is gathered while S is written: one pass over S per token.
//   backward: 4 rows of S and G go through all 16 tokens before the next 4 do. Their 17 states (17 KB) stay in L1, and
//             the five sums down the columns are loaded and stored once per 4 rows.
//
// Limits: N = 64; contiguous r w k v a b y [B,T,H,N] and states [B,H,N,N]. Threads share out the B*H heads. A head is
// the work of one thread in one order, so results do not depend on the number of threads.

#include "cpu.h"

namespace {

// d = exp(-c sigma(w)) and its derivative: slope = dd/dw = -c d sigma(w) sigma(-w).
template <class F> void decay(const F* w, F* d, F* slope) {
    constexpr F c = F(0.6065306597126334);
    #pragma omp simd
    for (int j = 0; j < N; j++) {
        const F e = exp_negative(w[j] < 0 ? w[j] : -w[j]), s = 1 / (1 + e);  // e = exp(-|w|), s = sigma(|w|)
        d[j] = exp_negative(-c * (w[j] < 0 ? e * s : s));
        slope[j] = -c * d[j] * e * s * s;
    }
}

// One token. S, [key, value]: S_{t-1} in, S_t out. u = S_{t-1} a_t in; u_next = S_t a_{t+1} and y = S_t r_t out.
template <class F>
void step(F* __restrict S, const F* r, const F* d, const F* k, const F* __restrict v, const F* a_next, const F* b,
          const F* __restrict u, F* __restrict u_next, F* __restrict y) {
    std::memset(y, 0, N * sizeof(F));
    std::memset(u_next, 0, N * sizeof(F));
    for (int j = 0; j < N; j += 4) {  // four keys at a time: u, v, y, u_next are loaded once for all of them
        F* rows = S + j * N;
        #pragma omp simd
        for (int i = 0; i < N; i++) {
            F sum_y = y[i], sum_u = u_next[i];
            for (int q = 0; q < 4; q++) {
                const F s = rows[q * N + i] * d[j + q] + u[i] * b[j + q] + v[i] * k[j + q];
                rows[q * N + i] = s;
                sum_y += s * r[j + q];
                sum_u += s * a_next[j + q];
            }
            y[i] = sum_y;
            u_next[i] = sum_u;
        }
    }
}

// in: r w k v a b, token t of this head at in[n] + t * stride; so is y. saved: null, or this head's.
template <class F>
void forward_head(long T, long stride, const F* const (&in)[6], const F* state, F* y, F* state_T, F* saved) {
    const auto& [r, w, k, v, a, b] = in;
    alignas(64) F S[N * N], u[N] = {}, u_next[N], d[N], slope[N];
    transpose(S, state);
    for (int j = 0; j < N; j++)
        for (int i = 0; i < N; i++) u[i] += S[j * N + i] * a[j];
    for (long t = 0; t < T; t++) {
        const long x = t * stride, x_next = t + 1 < T ? x + stride : x;
        if (saved) {
            F* segment = saved + t / SEGMENT * (N + SEGMENT) * N;
            if (t % SEGMENT == 0) transpose(segment, S);
            std::memcpy(segment + (N + t % SEGMENT) * N, u, sizeof u);
        }
        decay(w + x, d, slope);
        step(S, r + x, d, k + x, v + x, a + x_next, b + x, u, u_next, y + x);
        std::memcpy(u, u_next, sizeof u);
    }
    if (saved && T % SEGMENT)  // the u past the end: never read, but defined
        std::memset(saved + (T / SEGMENT * (N + SEGMENT) + N + T % SEGMENT) * N, 0, (SEGMENT - T % SEGMENT) * sizeof u);
    transpose(state_T, S);
}

// All that the backward reads and sums up of one token.
template <class F> struct Token {
    alignas(64) F r[N], w[N], k[N], v[N], a[N], b[N], dy[N], d[N], slope[N];
    alignas(64) F dr[N], dd[N], dk[N], dv[N], da[N], db[N];
};

// Rows i .. i+3 through a segment, forward and back. S0, u: as saved. G: these rows of dL/dS.
template <class F>
void rows_of_segment(int tokens, int i, Token<F>* x, const F* S0, const F* u, F (*__restrict G)[N]) {
    alignas(64) F S[SEGMENT + 1][ROWS][N];
    std::memcpy(S[0], S0 + i * N, sizeof S[0]);
    for (int t = 0; t < tokens; t++)
        for (int q = 0; q < ROWS; q++) {
            const F v = x[t].v[i + q], u_t = u[t * N + i + q];
            #pragma omp simd
            for (int j = 0; j < N; j++) S[t + 1][q][j] = S[t][q][j] * x[t].d[j] + u_t * x[t].b[j] + v * x[t].k[j];
        }
    for (int t = tokens; t-- > 0;) {
        Token<F>& p = x[t];
        F z[ROWS], dy[ROWS], v[ROWS], u_t[ROWS];
        for (int q = 0; q < ROWS; q++) {
            dy[q] = p.dy[i + q], v[q] = p.v[i + q], u_t[q] = u[t * N + i + q];
            F sum_z = 0, sum_dv = 0;
            #pragma omp simd reduction(+ : sum_z, sum_dv)
            for (int j = 0; j < N; j++) {
                const F g = G[q][j] + dy[q] * p.r[j];
                G[q][j] = g;
                sum_z += g * p.b[j];
                sum_dv += g * p.k[j];
            }
            z[q] = sum_z;
            p.dv[i + q] = sum_dv;
        }
        #pragma omp simd
        for (int j = 0; j < N; j++) {
            F dr = p.dr[j], dd = p.dd[j], dk = p.dk[j], da = p.da[j], db = p.db[j];
            for (int q = 0; q < ROWS; q++) {
                const F g = G[q][j], s = S[t][q][j];
                dr += S[t + 1][q][j] * dy[q];
                dd += g * s;
                dk += g * v[q];
                da += s * z[q];
                db += g * u_t[q];
                G[q][j] = g * p.d[j] + z[q] * p.a[j];
            }
            p.dr[j] = dr, p.dd[j] = dd, p.dk[j] = dk, p.da[j] = da, p.db[j] = db;
        }
    }
}

// in: r w k v a b dy, out: dr dw dk dv da db, token t of this head at in[n] + t * stride. saved: this head's.
template <class F>
void backward_head(long T, long stride, const F* const (&in)[7], const F* saved, const F* dstate_T, F* const (&out)[6],
                   F* dstate_0) {
    Token<F> x[SEGMENT];
    std::memcpy(dstate_0, dstate_T, N * N * sizeof(F));  // G lives where dL/dS_0 is to stand
    for (long segment = (T - 1) / SEGMENT; segment >= 0; segment--) {
        const long start = segment * SEGMENT;
        const int tokens = static_cast<int>(T - start < SEGMENT ? T - start : SEGMENT);
        for (int t = 0; t < tokens; t++) {
            F* const local[7] = {x[t].r, x[t].w, x[t].k, x[t].v, x[t].a, x[t].b, x[t].dy};
            for (int n = 0; n < 7; n++) std::memcpy(local[n], in[n] + (start + t) * stride, N * sizeof(F));
            for (F* sums : {x[t].dr, x[t].dd, x[t].dk, x[t].da, x[t].db}) std::memset(sums, 0, N * sizeof(F));
            decay(x[t].w, x[t].d, x[t].slope);
        }
        const F *S0 = saved + segment * (N + SEGMENT) * N, *u = S0 + N * N;
        for (int i = 0; i < N; i += ROWS)
            rows_of_segment(tokens, i, x, S0, u, reinterpret_cast<F(*)[N]>(dstate_0 + i * N));
        for (int t = 0; t < tokens; t++) {
            for (int j = 0; j < N; j++) x[t].dd[j] *= x[t].slope[j];  // now dw
            const F* const local[6] = {x[t].dr, x[t].dd, x[t].dk, x[t].dv, x[t].da, x[t].db};
            for (int n = 0; n < 6; n++) std::memcpy(out[n] + (start + t) * stride, local[n], N * sizeof(F));
        }
    }
}

// in: r w k v a b state. out: y state_T saved (null: save nothing).
template <class F> void forward(long B, long T, long H, int threads, const F* const* in, F* const* out) {
    const long saved_size = (T + SEGMENT - 1) / SEGMENT * (N + SEGMENT) * N;
    parallel(B * H, threads, [=](long head) {
        const long first = (head / H * T * H + head % H) * N, square = head * N * N;
        const F* x[6];
        for (int n = 0; n < 6; n++) x[n] = in[n] + first;
        forward_head(T, H * N, x, in[6] + square, out[0] + first, out[1] + square,
                     out[2] ? out[2] + head * saved_size : nullptr);
    });
}

// in: r w k v a b dy saved dstate_T. out: dr dw dk dv da db dstate_0.
template <class F> void backward(long B, long T, long H, int threads, const F* const* in, F* const* out) {
    const long saved_size = (T + SEGMENT - 1) / SEGMENT * (N + SEGMENT) * N;
    parallel(B * H, threads, [=](long head) {
        const long first = (head / H * T * H + head % H) * N, square = head * N * N;
        const F* x[7];
        F* dx[6];
        for (int n = 0; n < 7; n++) x[n] = in[n] + first;
        for (int n = 0; n < 6; n++) dx[n] = out[n] + first;
        backward_head(T, H * N, x, in[7] + head * saved_size, in[8] + square, dx, out[6] + square);
    });
}

}  // namespace

EXPORT(wkv7)
