// What the kernels of this folder share: the I/O types, dynamic shared memory, the launch.
//
// The same text is compiled by nvcc for a GPU and by g++ for the tests, which run it on a CPU: there `-I` puts
// tests/cuda_on_cpu before CUDA's own headers and -DCUDA_ON_CPU is set. Three habits make that possible, here and in
// every .cu: no <<<...>>> (launch() below is plain C++), shared memory only from dyn_smem(), and no header of torch,
// CUB or cooperative groups. The only #ifdef is in this file; functions that wrap PTX belong beside dyn_smem().
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef CUDA_ON_CPU
// The block's dynamic shared memory: as many bytes as launch() was told, aligned to 16, with arbitrary contents.
__device__ inline char* dyn_smem() {
    extern __shared__ __align__(16) char smem[];
    return smem;
}

// Tensor cores work on fragments: lane l of a warp holds, of an 8x8 matrix of bf16, row l/4, columns 2 (l%4) and + 1,
// in one 32-bit register, low half first; of fp32, two registers.
//
// Four 8x8 matrices from shared memory; lane l gives the address of row l%8 of matrix l/8, 16 bytes, aligned to 16.
__device__ inline void ldmatrix(uint32_t (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))) : "memory");
}
// The same, each matrix transposed.
__device__ inline void ldmatrix_trans(uint32_t (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))) : "memory");
}
// The transpose of an 8x8 matrix that the warp holds.
__device__ inline uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
// c (16x8) += a (16x16) b (16x8): bf16 products, fp32 sums. a: upper left, lower left, upper right, lower right 8x8
// matrix; b: the transposes of the upper and the lower one; c: two numbers of the upper, two of the lower one.
__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// 16 bytes from global to shared memory, or 16 zeros, without waiting. What a thread started since its last commit is a
// group; cp_async_wait<n> returns when all its groups but the newest n are there (for this thread: others need a
// barrier).
__device__ inline void cp_async16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int NEWEST>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(NEWEST) : "memory");
}
// One store of 8 or 16 bytes. (What is assigned as a struct, the compiler may store in its parts.)
__device__ inline void store(void* to, uint2 x) { __stwb(static_cast<uint2*>(to), x); }
__device__ inline void store(void* to, uint4 x) { __stwb(static_cast<uint4*>(to), x); }
// A hint: the 128 bytes around `from` will be read soon.
__device__ inline void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" :: "l"(from)); }
#endif

// I/O types <-> the fp32 in which everything is computed. Rounding is to nearest, ties to even.
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename IO>
__device__ IO from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16(x); }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half(x); }

// Four neighbouring channels: the unit in which memory is read and written, 8 or 16 bytes per thread. They travel as
// 32-bit words: as an array of four IO the compiler would take a load apart at once, and so wait for it.
template <typename IO>
struct Quad {
    std::conditional_t<sizeof(IO) == 2, uint2, uint4> words;

    __device__ static Quad pack(float x, float y, float z, float w) {
        const IO values[4] = {from_float<IO>(x), from_float<IO>(y), from_float<IO>(z), from_float<IO>(w)};
        Quad quad;
        memcpy(&quad.words, values, sizeof values);
        return quad;
    }
    __device__ float4 unpack() const {
        IO values[4];
        memcpy(values, &words, sizeof values);
        return {to_float(values[0]), to_float(values[1]), to_float(values[2]), to_float(values[3])};
    }
};

// Sum over the 8 lanes whose numbers differ in the last three bits; each of them gets it. In fp32 addition commutes,
// so the 8 results are the same to the last bit.
__device__ inline float sum8(float x) {
    for (int bit = 1; bit < 8; bit *= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
    return x;
}

// Two bf16 in a word, low half first, and back.
__device__ inline uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
}
__device__ inline float2 unpack(uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

// kernel<<<blocks, threads, smem, stream>>>(args...) as plain C++. Returns the cudaError_t: 0, or why nothing ran.
template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t smem, void* stream, Args... args) {
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;  // before it is narrowed to 32 bits
    if (smem > 48 * 1024) {  // more than every card has by default: it must be asked for, per kernel and device
        const int bytes = static_cast<int>(smem);
        const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error) return error;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = smem;
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, args...);
}
