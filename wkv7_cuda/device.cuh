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

// kernel<<<blocks, threads, smem, stream>>>(args...) as plain C++. Returns the cudaError_t: 0, or why nothing ran.
template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t smem, void* stream, Args... args) {
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;  // before it is narrowed to 32 bits
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = smem;
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, args...);
}
