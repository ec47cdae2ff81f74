// WKV-7 token after token, one thread per row of the state: what the fast kernels are measured against.
//
// Models are usually trained with a kernel of this form (RWKV-LM publishes one, and others derive from it). This one
// is written anew in the same tiling, so that the comparison needs no code of others. Only the benchmark uses it.
//
// EQUATION, per batch entry and head; vectors are columns of length N = 64, S is [value, key] and starts at zero:
//
//     d_t = exp(-e^(-1/2) sigma(w_t))     u_t = S_(t-1) a_t     S_t = S_(t-1) diag(d_t) + u_t b_t^T + v_t k_t^T
//     y_t = S_t r_t
//
// TILING. One block of 64 threads per batch entry and head, whatever T: B*H blocks that do T dependent steps.
//
//   forward    thread i holds row i of S (64 registers). A token: each thread brings channel i of the six inputs to
//              shared memory, one barrier (two buffers take turns), then two sums of 64 terms, u_t[i] and y_t[i].
//   backward   thread i holds column i of S, row i and column i of G = dL/dS (192 registers). t runs from T down to 1:
//                  dr = S_t^T dy      S_(t-1) = (S_t - v k^T - u b^T) / d      G += dy r^T      z = G b     dv = G k
//                  dk = G^T v     db = G^T u     dd = sum over values of G o S_(t-1)     da = S_(t-1)^T z
//                  G <- G diag(d) + z a^T
//              A second barrier hands z round, since column i of G needs all of it.
//
// MEMORY, beyond inputs and outputs, fp32: S after every 16 tokens, [B,H,T/16,N key,N value], and u [B,T,H,N]: 1280 bytes
// per token and head. The backward reloads the true state every 16 tokens, because each division by d >= 0.545 may
// double the rounding error.
//
// LIMITS. T a multiple of 16; no initial state in, no final state out; a tensor of [B,T,H,N] has less than 2^32
// elements. Inputs and outputs are fp32 or bf16, all arithmetic fp32.
#include "device.cuh"

namespace {

constexpr int N = 64;      // head size, and threads in a block
constexpr int CHUNK = 16;  // tokens between two kept states
constexpr float MINUS_RATE = -0.60653066f;  // -e^(-1/2)

struct Sizes {
    int64_t B, T, H;
    __device__ unsigned stride() const { return static_cast<unsigned>(H * N); }  // from a token to the next
    __device__ unsigned first(int64_t head) const { return static_cast<unsigned>((head / H * T * H + head % H) * N); }
    __device__ float* state(float* states, int64_t head, int64_t chunk) const {
        return states + (head * (T / CHUNK) + chunk) * N * N;
    }
};

template <typename IO>
struct Inputs {
    const IO *r, *w, *k, *v, *a, *b;
};
template <typename IO>
struct Gradients {
    IO *dr, *dw, *dk, *dv, *da, *db;
};

// One token of a head in shared memory.
struct Token {
    float r[N], d[N], k[N], v[N], a[N], b[N], dy[N], u[N];
};
// One channel of it in a thread's registers.
struct Channel {
    float r, w, k, v, a, b, dy, u;
};

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ inline float decay(float w) { return expf(MINUS_RATE * sigmoid(w)); }

template <typename IO>
__device__ Channel read(const Inputs<IO>& x, unsigned at) {
    return {to_float(x.r[at]), to_float(x.w[at]), to_float(x.k[at]), to_float(x.v[at]),
            to_float(x.a[at]), to_float(x.b[at]), 0.0f, 0.0f};
}

// t = 0..T-1: y, and if `states` is not null what the backward needs.
template <typename IO>
__global__ void __launch_bounds__(N)
sequential_forward_kernel(Sizes sizes, Inputs<IO> inputs, IO* y, float* states, float* us) {
    Token* buffers = reinterpret_cast<Token*>(dyn_smem());
    const int i = threadIdx.x;
    const int64_t head = blockIdx.x;
    unsigned at = sizes.first(head) + i;
    float S[N] = {};  // S[i][j]
    Channel next = read(inputs, at);
#pragma unroll 1
    for (int t = 0; t < sizes.T; t++, at += sizes.stride()) {
        const Channel own = next;
        Token& x = buffers[t % 2];
        x.r[i] = own.r, x.d[i] = decay(own.w), x.k[i] = own.k, x.a[i] = own.a, x.b[i] = own.b;
        __syncthreads();
        if (t + 1 < sizes.T) next = read(inputs, at + sizes.stride());  // arrives during the sums
        float u = 0.0f, sum = 0.0f;
#pragma unroll
        for (int j = 0; j < N; j++) u += S[j] * x.a[j];
#pragma unroll
        for (int j = 0; j < N; j++) {
            S[j] = S[j] * x.d[j] + u * x.b[j] + own.v * x.k[j];
            sum += S[j] * x.r[j];
        }
        y[at] = from_float<IO>(sum);
        if (states == nullptr) continue;
        us[at] = u;
        if (t % CHUNK == CHUNK - 1) {
            float* kept = sizes.state(states, head, t / CHUNK) + i;
#pragma unroll
            for (int j = 0; j < N; j++) kept[j * N] = S[j];
        }
    }
}

// t = T-1..0: the six gradients.
template <typename IO>
__global__ void __launch_bounds__(N)
sequential_backward_kernel(Sizes sizes, Inputs<IO> inputs, const IO* dy, float* states, const float* us,
                           Gradients<IO> grads) {
    Token* buffers = reinterpret_cast<Token*>(dyn_smem());
    float *z_of = reinterpret_cast<float*>(buffers + 2), *slope = z_of + N;  // dd -> dw
    const int i = threadIdx.x;
    const int64_t head = blockIdx.x;
    unsigned at = sizes.first(head) + static_cast<unsigned>(sizes.T - 1) * sizes.stride() + i;
    float S[N], row[N] = {}, column[N] = {};  // S[j][i], G[i][j], G[j][i]
    const auto fetch = [&](unsigned place) {
        Channel x = read(inputs, place);
        x.dy = to_float(dy[place]), x.u = us[place];
        return x;
    };
    Channel next = fetch(at);
#pragma unroll 1
    for (int t = static_cast<int>(sizes.T) - 1; t >= 0; t--, at -= sizes.stride()) {
        Token& x = buffers[t % 2];
        const float sigma = sigmoid(next.w), decayed = expf(MINUS_RATE * sigma);
        x.r[i] = next.r, x.d[i] = decayed, x.k[i] = next.k, x.v[i] = next.v, x.a[i] = next.a, x.b[i] = next.b;
        x.dy[i] = next.dy, x.u[i] = next.u, slope[i] = decayed * MINUS_RATE * sigma * sigmoid(-next.w);
        __syncthreads();  // from here on the thread's own channel is read back: registers are scarce
        if (t % CHUNK == CHUNK - 1) {
            const float* kept = sizes.state(states, head, t / CHUNK) + i * N;
#pragma unroll
            for (int j = 0; j < N; j++) S[j] = kept[j];
        }
        const float r = x.r[i], k = x.k[i], b = x.b[i], dy_t = x.dy[i], inverse = 1.0f / x.d[i];
        float dr = 0.0f, dd = 0.0f, dk = 0.0f, dv = 0.0f, da = 0.0f, db = 0.0f, z = 0.0f;
#pragma unroll
        for (int j = 0; j < N; j++) {
            dr += S[j] * x.dy[j];
            S[j] = (S[j] - k * x.v[j] - b * x.u[j]) * inverse;
            row[j] += dy_t * x.r[j];
            column[j] += r * x.dy[j];
            z += row[j] * x.b[j];
            dv += row[j] * x.k[j];
            dk += column[j] * x.v[j];
            db += column[j] * x.u[j];
            dd += column[j] * S[j];
        }
        grads.dr[at] = from_float<IO>(dr), grads.dw[at] = from_float<IO>(dd * slope[i]);
        grads.dk[at] = from_float<IO>(dk), grads.dv[at] = from_float<IO>(dv), grads.db[at] = from_float<IO>(db);
        z_of[i] = z;
        __syncthreads();
        const float a = x.a[i], d = x.d[i];
#pragma unroll
        for (int j = 0; j < N; j++) {
            da += S[j] * z_of[j];
            column[j] = column[j] * d + a * z_of[j];
        }
#pragma unroll
        for (int j = 0; j < N; j++) row[j] = row[j] * x.d[j] + z * x.a[j];
        grads.da[at] = from_float<IO>(da);
        if (t > 0) next = fetch(at - sizes.stride());  // not during the sums: they leave no register for it
    }
}

template <typename IO>
int forward(Sizes sizes, const void* const* x, void* y, float* states, float* us, void* stream) {
    const IO* const* p = reinterpret_cast<const IO* const*>(x);
    return launch(sequential_forward_kernel<IO>, sizes.B * sizes.H, N, 2 * sizeof(Token), stream, sizes,
                  Inputs<IO>{p[0], p[1], p[2], p[3], p[4], p[5]}, static_cast<IO*>(y), states, us);
}

template <typename IO>
int backward(Sizes sizes, const void* const* x, const void* dy, float* states, const float* us, void* const* grads,
             void* stream) {
    const IO* const* p = reinterpret_cast<const IO* const*>(x);
    IO* const* g = reinterpret_cast<IO* const*>(grads);
    return launch(sequential_backward_kernel<IO>, sizes.B * sizes.H, N, 2 * sizeof(Token) + 2 * N * sizeof(float),
                  stream, sizes, Inputs<IO>{p[0], p[1], p[2], p[3], p[4], p[5]}, static_cast<const IO*>(dy), states, us,
                  Gradients<IO>{g[0], g[1], g[2], g[3], g[4], g[5]});
}

}  // namespace

// C interface, bound in sequential.py. bf16: 1, or 0 for fp32. `inputs` and `grads` are arrays of six pointers in the
// order r w k v a b; `states` and `us` may be null in the forward. Each returns the cudaError_t of its launch.
extern "C" {

int sequential_forward(int bf16, int64_t B, int64_t T, int64_t H, const void* const* inputs, void* y, float* states,
                       float* us, void* stream) {
    return (bf16 ? forward<__nv_bfloat16> : forward<float>)({B, T, H}, inputs, y, states, us, stream);
}

int sequential_backward(int bf16, int64_t B, int64_t T, int64_t H, const void* const* inputs, const void* dy,
                        float* states, const float* us, void* const* grads, void* stream) {
    return (bf16 ? backward<__nv_bfloat16> : backward<float>)({B, T, H}, inputs, dy, states, us, grads, stream);
}

const char* sequential_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // extern "C"
