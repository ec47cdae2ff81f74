// WKV-6 on the CPU: the recurrence token by token, forward and backward, in float or double.
//
// Per batch and head, with column vectors of length N = 64, S_0 given, t = 1..T; `o` is the product element by element:
//
//     d = exp(-exp(w))    y = S r + (r . (u o k)) v    S <- S diag(d) + v k^T                 S: [value, key]
//
// Backward, t = T..1, starting from G = dL/dS_T; c = v . dy:
//
//     dv = G k + (r . (u o k)) dy                              sums over keys: along a row of G
//     dk = G^T v + c u o r           dr = S_{t-1}^T dy + c u o k        du += c r o k
//     dd_j = sum_i G_ij S_{t-1},ij                             sums over values: down the columns of G and S
//     dw = dd * d * -exp(w)
//     G <- G diag(d) + dy r^T                                  now G = dL/dS_{t-1}
//
// Saved, if at all: [B,H,ceil(T/16),N,N], the state before each 16 tokens, [value, key]. The backward replays the 16
// tokens from there and keeps the states: nothing is ever divided by d, which may be 0.
//
// What makes it fast is what makes wkv7_cpu.cpp fast. Rows of S (values) never mix, therefore
//   forward:  S lies transposed, [key, value]; every sum is over the outer index; one pass over S per token.
//   backward: 4 rows of S and G go through all 16 tokens before the next 4 do, their states in L1.
//
// Limits: N = 64; contiguous r w k v y [B,T,H,N], u [H,N], states [B,H,N,N]. Threads share out the B*H heads. A head is
// the work of one thread in one order, and du is summed over the batch by one thread at the end, so results do not depend
// on the number of threads.

#include "cpu.h"

namespace {

// d = exp(-exp(w)) and slope = dd/dw = -d exp(w). Where d is below the smallest normal number both are 0, which d truly
// is soon after; exp(w) is kept below infinity, or slope would be 0 * infinity.
template <class F> void decay(const F* w, F* d, F* slope) {
    #pragma omp simd
    for (int j = 0; j < N; j++) {
        const F e = exp_negative(w[j] < 0 ? w[j] : -w[j]), inverse = 1 / e;
        const F rate = w[j] < 0 ? e : inverse, some = exp_negative(-rate);
        d[j] = rate > -LOWEST<F> ? 0 : some;  // thus NaN stays NaN
        slope[j] = -d[j] * rate;
    }
}

template <class F> F dot(const F* r, const F* u, const F* k) {
    F sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int j = 0; j < N; j++) sum += r[j] * u[j] * k[j];
    return sum;
}

// One token. S, [key, value]: S_{t-1} in, S_t out.
template <class F>
void step(F* __restrict S, const F* r, const F* d, const F* k, const F* __restrict v, F bonus, F* __restrict y) {
    for (int i = 0; i < N; i++) y[i] = bonus * v[i];
    for (int j = 0; j < N; j += 4) {  // four keys at a time: v and y are loaded once for all of them
        F* rows = S + j * N;
        #pragma omp simd
        for (int i = 0; i < N; i++) {
            F sum = y[i];
            for (int q = 0; q < 4; q++) {
                const F s = rows[q * N + i];
                sum += s * r[j + q];
                rows[q * N + i] = s * d[j + q] + v[i] * k[j + q];
            }
            y[i] = sum;
        }
    }
}

// in: r w k v, token t of this head at in[n] + t * stride; so is y. u: this head's. saved: null, or this head's.
template <class F>
void forward_head(long T, long stride, const F* const (&in)[4], const F* u, const F* state, F* y, F* state_T, F* saved) {
    const auto& [r, w, k, v] = in;
    alignas(64) F S[N * N], d[N], slope[N];
    transpose(S, state);
    for (long t = 0; t < T; t++) {
        const long x = t * stride;
        if (saved && t % SEGMENT == 0) transpose(saved + t / SEGMENT * N * N, S);
        decay(w + x, d, slope);
        step(S, r + x, d, k + x, v + x, dot(r + x, u, k + x), y + x);
    }
    transpose(state_T, S);
}

// All that the backward reads and sums up of one token.
template <class F> struct Token {
    alignas(64) F r[N], w[N], k[N], v[N], dy[N], d[N], slope[N];
    alignas(64) F dr[N], dd[N], dk[N], dv[N];
    F bonus;
};

// Rows i .. i+3 through a segment, forward and back. S0: as saved. G: these rows of dL/dS.
template <class F> void rows_of_segment(int tokens, int i, Token<F>* x, const F* S0, F (*__restrict G)[N]) {
    alignas(64) F S[SEGMENT][ROWS][N];  // before each token
    std::memcpy(S[0], S0 + i * N, sizeof S[0]);
    for (int t = 0; t + 1 < tokens; t++)
        for (int q = 0; q < ROWS; q++) {
            const F v = x[t].v[i + q];
            #pragma omp simd
            for (int j = 0; j < N; j++) S[t + 1][q][j] = S[t][q][j] * x[t].d[j] + v * x[t].k[j];
        }
    for (int t = tokens; t-- > 0;) {
        Token<F>& p = x[t];
        F dy[ROWS], v[ROWS];
        for (int q = 0; q < ROWS; q++) {
            dy[q] = p.dy[i + q], v[q] = p.v[i + q];
            F sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (int j = 0; j < N; j++) sum += G[q][j] * p.k[j];
            p.dv[i + q] = sum + p.bonus * dy[q];
        }
        #pragma omp simd
        for (int j = 0; j < N; j++) {
            F dr = p.dr[j], dd = p.dd[j], dk = p.dk[j];
            for (int q = 0; q < ROWS; q++) {
                const F g = G[q][j], s = S[t][q][j];
                dr += s * dy[q];
                dd += g * s;
                dk += g * v[q];
                G[q][j] = g * p.d[j] + dy[q] * p.r[j];
            }
            p.dr[j] = dr, p.dd[j] = dd, p.dk[j] = dk;
        }
    }
}

// in: r w k v dy, out: dr dw dk dv, token t of this head at in[n] + t * stride. saved: this head's. du: this head's sum.
template <class F>
void backward_head(long T, long stride, const F* const (&in)[5], const F* u, const F* saved, const F* dstate_T,
                   F* const (&out)[4], double* du, F* dstate_0) {
    Token<F> x[SEGMENT];
    std::memcpy(dstate_0, dstate_T, N * N * sizeof(F));  // G lives where dL/dS_0 is to stand
    for (long segment = (T - 1) / SEGMENT; segment >= 0; segment--) {
        const long start = segment * SEGMENT;
        const int tokens = static_cast<int>(T - start < SEGMENT ? T - start : SEGMENT);
        for (int t = 0; t < tokens; t++) {
            F* const local[5] = {x[t].r, x[t].w, x[t].k, x[t].v, x[t].dy};
            for (int n = 0; n < 5; n++) std::memcpy(local[n], in[n] + (start + t) * stride, N * sizeof(F));
            for (F* sums : {x[t].dr, x[t].dd, x[t].dk}) std::memset(sums, 0, N * sizeof(F));
            decay(x[t].w, x[t].d, x[t].slope);
            x[t].bonus = dot(x[t].r, u, x[t].k);
        }
        for (int i = 0; i < N; i += ROWS)
            rows_of_segment(tokens, i, x, saved + segment * N * N, reinterpret_cast<F(*)[N]>(dstate_0 + i * N));
        for (int t = 0; t < tokens; t++) {
            Token<F>& p = x[t];
            F c = 0;
            for (int i = 0; i < N; i++) c += p.v[i] * p.dy[i];
            for (int j = 0; j < N; j++) {
                p.dr[j] += c * u[j] * p.k[j];
                p.dk[j] += c * u[j] * p.r[j];
                p.dd[j] *= p.slope[j];  // now dw
                du[j] += c * p.r[j] * p.k[j];
            }
            const F* const local[4] = {p.dr, p.dd, p.dk, p.dv};
            for (int n = 0; n < 4; n++) std::memcpy(out[n] + (start + t) * stride, local[n], N * sizeof(F));
        }
    }
}

// in: r w k v u state. out: y state_T saved (null: save nothing).
template <class F> void forward(long B, long T, long H, int threads, const F* const* in, F* const* out) {
    const long saved_size = (T + SEGMENT - 1) / SEGMENT * N * N;
    parallel(B * H, threads, [=](long head) {
        const long first = (head / H * T * H + head % H) * N, square = head * N * N;
        const F* const x[4] = {in[0] + first, in[1] + first, in[2] + first, in[3] + first};
        forward_head(T, H * N, x, in[4] + head % H * N, in[5] + square, out[0] + first, out[1] + square,
                     out[2] ? out[2] + head * saved_size : nullptr);
    });
}

// in: r w k v u dy saved dstate_T. out: dr dw dk dv du dstate_0.
template <class F> void backward(long B, long T, long H, int threads, const F* const* in, F* const* out) {
    const long saved_size = (T + SEGMENT - 1) / SEGMENT * N * N;
    std::vector<double> du(B * H * N);  // of every batch entry and head
    parallel(B * H, threads, [=, &du](long head) {
        const long first = (head / H * T * H + head % H) * N, square = head * N * N;
        const F* const x[5] = {in[0] + first, in[1] + first, in[2] + first, in[3] + first, in[5] + first};
        F* const dx[4] = {out[0] + first, out[1] + first, out[2] + first, out[3] + first};
        backward_head(T, H * N, x, in[4] + head % H * N, in[6] + head * saved_size, in[7] + square, dx,
                      du.data() + head * N, out[5] + square);
    });
    for (long j = 0; j < H * N; j++) {
        double sum = 0;
        for (long b = 0; b < B; b++) sum += du[b * H * N + j];
        out[4][j] = static_cast<F>(sum);
    }
}

}  // namespace

EXPORT(wkv6)
