// 16x16 blocks: of matrices of bf16 in shared memory, as factors of products on tensor cores, as sums in fp32. What
// wkv7_fast.cu and wkv6.cu have in common.
#pragma once

#include "device.cuh"

namespace {

using bf16 = __nv_bfloat16;

constexpr int N = 64;  // head size
constexpr int L = 32;  // tokens of a chunk
constexpr int WARPS = 4, THREADS = 32 * WARPS;

// What is walked: T tokens of every head (numbered b H + h), cut into chunks; segment_chunks of these, or at the end
// fewer, are a segment. `cells`: all heads' segments. Divided on the host: 64 bits take a GPU a hundred instructions.
struct Sizes {
    int64_t T, cells;
    unsigned H, heads, chunks, segment_chunks, segments;

    Sizes(int64_t B, int64_t T, int64_t H, int64_t segment_chunks)
        : T(T), H(H), heads(B * H), chunks((T + L - 1) / L), segment_chunks(segment_chunks),
          segments((chunks + segment_chunks - 1) / segment_chunks) {
        cells = B * H * segments;
    }
    // Of the first token of a head in [B,T,H,N].
    __device__ int64_t offset(unsigned head) const { return (head / H * T * H + head % H) * N; }
};

__device__ inline int64_t lesser(int64_t x, int64_t y) { return x < y ? x : y; }

// 64 channels of a token, or one row of any other 64 columns: 128 bytes, the 32 banks of shared memory. Its eight
// 16-byte units stand in an order that depends on the row: the same unit of 8 rows lies in 8 different groups of banks.
struct alignas(16) Row {
    bf16 x[64];
};
__device__ inline bf16* at(Row* tile, unsigned row, unsigned column) {
    return tile[row].x + ((column / 8 ^ row % 8) * 8 + column % 8);
}
__device__ inline const bf16* at(const Row* tile, unsigned row, unsigned column) {
    return at(const_cast<Row*>(tile), row, column);
}
using Word __attribute__((may_alias)) = uint32_t;  // (a memcpy would be two loads where nvcc sees no alignment)
__device__ inline uint32_t word_at(const Row* tile, int row, int column) {  // two numbers; column even
    return *reinterpret_cast<const Word*>(at(tile, row, column));
}
__device__ inline float2 pair_at(const Row* tile, int row, int column) { return unpack(word_at(tile, row, column)); }
__device__ inline void put_pair(Row* tile, int row, int column, uint32_t word) {
    *reinterpret_cast<Word*>(at(tile, row, column)) = word;
}

struct Lane {  // where a thread's numbers stand in a 16x16 block of sums: rows i, i + 8, columns j, j + 1, j + 8, j + 9
    int lane = threadIdx.x % 32, i = lane / 4, j = lane % 4 * 2;
    __device__ Lane() {}  // (or nvcc 11 warns of every const Lane)
};

struct Factor {  // a 16x16 block of bf16, as the left or the right factor of a product
    uint32_t x[4];
};

struct Block {  // a 16x16 block of fp32 sums: x[4 h + 2 l + e] is row i + 8 l, column j + 8 h + e
    float x[8] = {};

    __device__ void add(const Factor& left, const Factor& right) {
        mma_bf16(reinterpret_cast<float(&)[4]>(x[0]), left.x, right.x[0], right.x[1]);
        mma_bf16(reinterpret_cast<float(&)[4]>(x[4]), left.x, right.x[2], right.x[3]);
    }
    __device__ Factor round() const {  // to a left factor
        return {{pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])}};
    }
    __device__ void scale_columns(const float* s) {  // s: of this block's 16 columns
        const Lane at;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float2 f = *reinterpret_cast<const float2*>(s + at.j + 8 * h);
#pragma unroll
            for (int l = 0; l < 2; l++) x[4 * h + 2 * l] *= f.x, x[4 * h + 2 * l + 1] *= f.y;
        }
    }
};

// The block of a tile whose corner is (row, column), as a factor. left: itself; left_t: its transpose; right, right_t
// too.
__device__ inline Factor left(const Row* tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    Factor f;
    ldmatrix(f.x, at(tile, row + lane % 16, column + lane / 16 * 8));
    return f;
}
__device__ inline Factor right(const Row* tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    Factor f;
    ldmatrix_trans(f.x, at(tile, row + lane % 16, column + lane / 16 * 8));
    return f;
}
__device__ inline Factor left_t(const Row* tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    Factor f;
    ldmatrix_trans(f.x, at(tile, row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
    return f;
}
__device__ inline Factor right_t(const Row* tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    Factor f;
    ldmatrix(f.x, at(tile, row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
    return f;
}

__device__ inline void put(Row* tile, int row, int column, const Factor& f) {
    const Lane lane;
#pragma unroll
    for (int n = 0; n < 4; n++) put_pair(tile, row + lane.i + n % 2 * 8, column + lane.j + n / 2 * 8, f.x[n]);
}

__device__ inline Factor transposed(const Factor& f) {  // of a left factor, also one
    return {{transpose(f.x[0]), transpose(f.x[2]), transpose(f.x[1]), transpose(f.x[3])}};
}

// Of a left factor's rows i + 8 l: each lane gets four consecutive numbers of its row, two of which were its
// neighbour's; so four lanes hold a row, 32 bytes.
struct Four {
    int row, column;  // in the block
    uint2 words;
};
__device__ inline Four four_in_a_row(const Factor& f, int l) {
    const Lane lane;
    const bool odd = lane.lane % 2;
    const uint32_t others = __shfl_xor_sync(0xffffffffu, odd ? f.x[l] : f.x[l + 2], 1);
    return {lane.i + 8 * l, lane.j + 6 * odd, odd ? uint2{others, f.x[l + 2]} : uint2{f.x[l], others}};
}

// The rows 16 warp .. of a state [value,key] in fp32.
__device__ inline void load_state(Block (&S)[4], const float* state, int warp) {
    const Lane lane;
#pragma unroll
    for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
            const float2 s = *reinterpret_cast<const float2*>(
                state + (16 * warp + lane.i + pair % 2 * 8) * N + 16 * m + lane.j + pair / 2 * 8);
            S[m].x[2 * pair] = s.x, S[m].x[2 * pair + 1] = s.y;
        }
    }
}
__device__ inline void store_state(const Block (&S)[4], float* state, int warp) {
    const Lane lane;
#pragma unroll
    for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
            *reinterpret_cast<float2*>(
                state + (16 * warp + lane.i + pair % 2 * 8) * N + 16 * m + lane.j + pair / 2 * 8) =
                {S[m].x[2 * pair], S[m].x[2 * pair + 1]};
        }
    }
}
// x = high + low to 16 bits, both bf16.
__device__ inline void split(const Block& x, Factor& high, Factor& low) {
    high = x.round();
    Block rest;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const float2 h = unpack(high.x[n]);
        rest.x[2 * n] = x.x[2 * n] - h.x, rest.x[2 * n + 1] = x.x[2 * n + 1] - h.y;
    }
    low = rest.round();
}

}  // namespace
