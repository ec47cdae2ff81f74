// A matrix held as codes -> the matrix, in one pass. The formats are those of section 4 of pissa_rwkv.py.
//
// EQUATION. Weight i of n, in row-major order; 64 weights in a row share a scale, the last few may be fewer:
//
//     int8     w_i = code_i * scale_(i / 64)                 code  int8                             scale   fp16
//     nf4      w_i = NF4[code_i] * absmax_(i / 64)           code  4 bits, the first of a byte in   absmax  fp32
//                                                                  its high half
//     nf4dq    as nf4, with  absmax_j = DYNAMIC[c_j] * absmax_max_(j / 256) + offset
//                                                            c     uint8           absmax_max, offset       fp32
//
// BYTES of memory per weight: 1.031 (int8), 0.563 (nf4) or 0.516 (nf4dq) read, 2 written (4 in fp32), nothing else:
// the kernel waits for memory and for nothing but memory, so it is laid out by how it reaches memory.
//
// HOW IT IS CUT. A warp makes 2048 weights, that is 32 scales: one for each lane. A block is 2 warps, and the grid
// covers the matrix; blocks depend on nothing, so that whatever multiprocessor is free takes the next.
//
//   grid              block         a thread                                         shared memory
//   ceil(n / 4096)    64 threads    loads 2 (nf4) or 4 (int8) times 16 bytes of      codes of the block, 2 or 4 KB;
//                                   codes and one scale, all before it waits for     its 64 scales; the 16 levels
//                                   any; makes 64 weights, 16 bytes at a time
//
// Why shared memory: 16 bytes of codes are 16 or 32 weights, 16 bytes of result are 8 (16-bit) or 4 (fp32). If a lane
// stored the weights of the codes it loaded, neighbouring lanes would write 32 to 128 bytes apart. So lanes hand the
// codes on: each store of a warp writes 512 consecutive bytes, each load reads as many.
//
//   what                                     who reads it together                            bank conflicts
//   codes, 2 to 8 bytes a lane               32 lanes, consecutive bytes                      none
//   scales                                   lanes of the same 64 weights, the same word      none
//   levels: 16 words, so in 16 banks         any lane any of them; an equal word is shared    none, whatever the codes
//
// This look-up is one shared load per weight, as much as a shuffle would cost. At 3.3 TB/s an H100 has to make 6 weights
// per multiprocessor and clock, and its shared memory answers 32.
//
// NUMERICS. Bit for bit what PyTorch makes of the same parts: the product in fp32, rounded once to the output's type,
// to nearest even. absmax_j takes two roundings: __fmul_rn and __fadd_rn are not fused as a * b + c is. Of a NaN (from
// a scale that is one) only that it is one is promised.
//
// LIMITS. n >= 1, at most 2^31 - 1 blocks, thus 8.8e12 weights. Codes and output aligned to 16 bytes (the binding sees
// to it). A last warp that is not full reads bytes and writes weights one by one.
#include "device.cuh"

namespace {

constexpr int SHARE = 64;            // weights that share a scale
constexpr int WARPS = 2;             // of a block
constexpr int OF_WARP = 32 * SHARE;  // weights
constexpr int LEVELS = 16;

// ---------------------------------------------------------------------------------------------- the formats

// Each gives PER_BYTE codes, scale j, and level(word, i): what code i of a little-endian word stands for.
struct Int8 {
    static constexpr int PER_BYTE = 1;
    static constexpr bool TABLE = false;
    const __half* scales;

    __device__ float scale(int64_t j) const { return to_float(scales[j]); }
    __device__ static float level(uint64_t word, int i, const float*) { return static_cast<int8_t>(word >> 8 * i); }
};

struct Nf4 {
    static constexpr int PER_BYTE = 2;
    static constexpr bool TABLE = true;
    const float* absmax;

    __device__ float scale(int64_t j) const { return absmax[j]; }
    __device__ static float level(uint64_t word, int i, const float* levels) {
        return levels[word >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15];
    }
};

struct Nf4Twice : Nf4 {
    const uint8_t* codes;
    const float *largest, *offset, *dynamic;  // absmax_max, offset; the 256 levels of c

    __device__ float scale(int64_t j) const {
        return __fadd_rn(__fmul_rn(dynamic[codes[j]], largest[j / 256]), *offset);
    }
};

// ---------------------------------------------------------------------------------------------- the kernel

template <typename Format>
struct Tile {
    static constexpr int BYTES = OF_WARP / Format::PER_BYTE;
    alignas(16) uint8_t codes[WARPS][BYTES];
    float scales[WARPS][32];
    float levels[LEVELS];
};

// An unsigned integer of that many bytes: the codes of one 16-byte store.
template <int BYTES>
using Word = std::conditional_t<BYTES == 8, uint64_t, std::conditional_t<BYTES == 4, uint32_t, uint16_t>>;

template <typename Format, typename IO>
__global__ void __launch_bounds__(32 * WARPS)
dequant_kernel(Format format, int64_t n, const uint8_t* __restrict__ codes, const float* __restrict__ levels,
               IO* __restrict__ out) {
    constexpr int BYTES = Tile<Format>::BYTES, LOADS = BYTES / 16 / 32;
    constexpr int AT_ONCE = 16 / sizeof(IO);  // weights that one store writes
    using Codes = Word<AT_ONCE / Format::PER_BYTE>;

    Tile<Format>& tile = *reinterpret_cast<Tile<Format>*>(dyn_smem());
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t first = (int64_t{blockIdx.x} * WARPS + warp) * OF_WARP;  // weight of this warp, maybe beyond the end
    const int64_t begin = first / Format::PER_BYTE, end = (n + Format::PER_BYTE - 1) / Format::PER_BYTE;  // bytes

    // Load. Of the results of all these loads none is needed before the last has started.
    const bool whole = first + OF_WARP <= n;  // all warps but the matrix's last, which fetches what there is of bytes
    uint4 loaded[LOADS];
    if (whole) {
#pragma unroll
        for (int e = 0; e < LOADS; e++) {
            loaded[e] = *reinterpret_cast<const uint4*>(codes + begin + 16 * (32 * e + lane));
        }
    }
    const int64_t j = first / SHARE + lane;
    const float scale = j * SHARE < n ? format.scale(j) : 0.0f;
    const bool brings_level = Format::TABLE && threadIdx.x < LEVELS;
    const float level = brings_level ? levels[threadIdx.x] : 0.0f;

    // Hand on.
    if (brings_level) tile.levels[threadIdx.x] = level;
    if (whole) {
#pragma unroll
        for (int e = 0; e < LOADS; e++) {
            *reinterpret_cast<uint4*>(tile.codes[warp] + 16 * (32 * e + lane)) = loaded[e];
        }
    } else {
#pragma unroll 1
        for (int64_t i = lane; begin + i < end; i += 32) tile.codes[warp][i] = codes[begin + i];
    }
    tile.scales[warp][lane] = scale;
    __syncthreads();

    // Multiply and store.
    const auto make = [&](int place, IO (&w)[AT_ONCE]) {  // the weights from `place` on, counted in the warp's
        const Codes word = *reinterpret_cast<const Codes*>(tile.codes[warp] + place / Format::PER_BYTE);
        const float scale = tile.scales[warp][place / SHARE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) w[i] = from_float<IO>(__fmul_rn(format.level(word, i, tile.levels), scale));
    };
    IO w[AT_ONCE];
    if (whole) {
#pragma unroll
        for (int place = lane * AT_ONCE; place < OF_WARP; place += 32 * AT_ONCE) {
            make(place, w);
            uint4 packed;
            memcpy(&packed, w, sizeof packed);
            store(out + first + place, packed);
        }
    } else {
#pragma unroll 1
        for (int place = lane * AT_ONCE; first + place < n; place += 32 * AT_ONCE) {
            make(place, w);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                if (first + place + i < n) out[first + place + i] = w[i];
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------- launches

template <typename Format, typename IO>
int start(Format format, int64_t n, const void* codes, const float* levels, void* out, void* stream) {
    return launch(dequant_kernel<Format, IO>, (n + WARPS * OF_WARP - 1) / (WARPS * OF_WARP), 32 * WARPS,
                  sizeof(Tile<Format>), stream, format, n, static_cast<const uint8_t*>(codes), levels,
                  static_cast<IO*>(out));
}

template <typename Format>
int start(int dtype, Format format, int64_t n, const void* codes, const float* levels, void* out, void* stream) {
    const auto run = dtype == 0   ? start<Format, float>
                     : dtype == 1 ? start<Format, __nv_bfloat16>
                                  : start<Format, __half>;
    return run(format, n, codes, levels, out, stream);
}

}  // namespace

// C interface, bound in dequant.py. quant: 0 int8, 1 nf4, 2 nf4dq; `parts` its tensors, in the order of PARTS there.
// dtype of out: 0 fp32, 1 bf16, 2 fp16. levels and dynamic: NF4 (16) and DYNAMIC (256), fp32. All pointers but `parts`
// are the device's. Returns the cudaError_t of the launch.
extern "C" {

int dequant(int quant, int dtype, int64_t n, const void* const* parts, const float* levels, const float* dynamic,
            void* out, void* stream) {
    if (quant == 0) return start(dtype, Int8{static_cast<const __half*>(parts[1])}, n, parts[0], levels, out, stream);
    if (quant == 1) return start(dtype, Nf4{static_cast<const float*>(parts[1])}, n, parts[0], levels, out, stream);
    const Nf4Twice twice = {{nullptr}, static_cast<const uint8_t*>(parts[1]), static_cast<const float*>(parts[2]),
                            static_cast<const float*>(parts[3]), dynamic};
    return start(dtype, twice, n, parts[0], levels, out, stream);
}

const char* dequant_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // extern "C"
