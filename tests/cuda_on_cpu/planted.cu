// Kernels with mistakes in them, for tests/test_cuda_on_cpu.py: an instrument is trusted after it has found what was
// planted. Bug 0 is none.
#include <algorithm>

#include "device.cuh"

namespace {

constexpr int ROUNDS = 5;

enum Rotate { READ_TOO_EARLY = 1, WRITE_TOO_EARLY, DIVERGENT_BARRIER, EARLY_RETURN, HOLE, ONE_TOO_FAR };

// y[t] = x[(t + ROUNDS) % threads]: each round every thread takes its neighbour's value through shared memory.
__global__ void rotate_kernel(const float* x, float* y, int bug) {
    float* shared = reinterpret_cast<float*>(dyn_smem());
    const int t = threadIdx.x, threads = blockDim.x;
    const int64_t block = int64_t{blockIdx.x} * threads;
    float value = x[block + t];
    for (int round = 0; round < ROUNDS; round++) {
        if (bug == EARLY_RETURN && t == 5) return;
        if (!(bug == HOLE && t == 3)) shared[t + (bug == ONE_TOO_FAR)] = value;
        if (bug == DIVERGENT_BARRIER && t < 7) {
            __syncthreads();
        } else if (bug != READ_TOO_EARLY) {
            __syncthreads();
        }
        value = shared[(t + 1) % threads];
        if (bug != WRITE_TOO_EARLY) __syncthreads();
    }
    y[block + t] = value;
}

enum Warp { HALF_SHUFFLES = 1, NOT_IN_MASK, OUTSIDE_MASK, LANE_RETURNED };

// y[t] = sum of x over the half warp of t; the halves meet under masks of their own, at their own pace.
__global__ void half_warp_sums_kernel(const float* x, float* y, int bug) {
    const int lane = threadIdx.x % 32;
    unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    float sum = x[threadIdx.x];
    if (bug == LANE_RETURNED && lane == 9) return;
    if (bug == NOT_IN_MASK && lane == 20) half = ~half;
    for (int bit = bug == OUTSIDE_MASK ? 16 : 8; bit > 0; bit /= 2) sum += __shfl_xor_sync(half, sum, bit);
    if (bug == HALF_SHUFFLES && lane < 16) sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    __syncwarp();
    y[threadIdx.x] = sum;
}

enum Product { NO_WAIT = 1, NEVER_WAITED, NOT_ALIGNED, SOURCE_WRITTEN };

// c (16x8) = a (16x16) b, where b (8x16) is given transposed: a and b through shared memory, one warp.
__global__ void product_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int bug) {
    __nv_bfloat16* shared = reinterpret_cast<__nv_bfloat16*>(dyn_smem());
    const int lane = threadIdx.x;
    cp_async16(shared + 8 * lane, a + 8 * lane, true);
    cp_async16(shared + 256 + 8 * lane, b + 8 * (lane % 16), lane < 16);  // and 8 rows of zeros
    cp_async_commit();
    if (bug == SOURCE_WRITTEN) {
        __syncwarp();  // the copy has begun, and that is all
        if (lane == 0) const_cast<__nv_bfloat16*>(a)[8 * 5] = b[0];  // what lane 5 copies
    }
    if (bug != NO_WAIT && bug != NEVER_WAITED) cp_async_wait<0>();
    __syncwarp();
    uint32_t left[4], right[4];
    ldmatrix(left, shared + 16 * (lane % 16) + lane / 16 * 8 + (bug == NOT_ALIGNED));
    ldmatrix(right, shared + 256 + 16 * (lane % 8 + lane / 16 * 8) + lane / 8 % 2 * 8);
    float sum[4] = {}, none[4] = {};
    mma_bf16(sum, left, right[0], right[1]);
    mma_bf16(none, left, right[2], right[3]);
    for (int n = 0; n < 4; n++) c[(lane / 4 + n / 2 * 8) * 8 + lane % 4 * 2 + n % 2] = sum[n] + none[n];
    if (bug != NEVER_WAITED) cp_async_wait<0>();
}

}  // namespace

extern "C" {

int product(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int bug) {
    return launch(product_kernel, 1, 32, 1024, nullptr, a, b, c, bug);
}

int rotate(int blocks, int threads, int smem, const float* x, float* y, int bug) {
    return launch(rotate_kernel, blocks, threads, smem, nullptr, x, y, bug);
}
int half_warp_sums(int threads, const float* x, float* y, int bug) {
    return launch(half_warp_sums_kernel, 1, threads, 0, nullptr, x, y, bug);
}
const char* text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// The I/O types, on n values: fp32 -> 16 bits, and 16 bits -> fp32.
void to_bf16(const float* x, __nv_bfloat16* y, int n) { std::transform(x, x + n, y, from_float<__nv_bfloat16>); }
void to_fp16(const float* x, __half* y, int n) { std::transform(x, x + n, y, from_float<__half>); }
void of_bf16(const __nv_bfloat16* x, float* y, int n) { while (n--) *y++ = to_float(*x++); }
void of_fp16(const __half* x, float* y, int n) { while (n--) *y++ = to_float(*x++); }

}  // extern "C"
