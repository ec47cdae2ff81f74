// What tests/ptx.py makes of PTX calls these: instructions of which C++ has no word, and all that touch memory.
//
// MEMORY is checked, in one schedule for all schedules. Aligned: an access of 16 bytes to a multiple of 16, and so on,
// or a GPU ends the kernel. Inside: of shared memory, what the launch asked for. Ordered: of two accesses to a byte, one
// of them a write, by different threads, the later must come after a barrier that both passed: the block's or, within a
// warp, the warp's (__syncwarp; not a shuffle, not mma: these order no memory). Threads of different blocks never are
// ordered. A copy by cp.async reads and writes from when it is issued until its thread has waited for its group; in
// between nobody may touch the bytes it writes, nor write those it reads. Each byte remembers its last write and the
// reads since.
#pragma once

#include <array>
#include <cfenv>
#include <memory>
#include <unordered_map>

#include "device.cuh"

namespace {
namespace ptx {

constexpr uint32_t SMEM = 0x1000;  // the address of dynamic shared memory; of 0 nobody would notice the lack
enum Space { PARAM, GLOBAL, SHARED };
enum Action { READ, WRITE };

struct Where {
    const char* source;  // file.cu:line
    int line;            // of the PTX
};

struct Translated {
    template <typename... Params>
    Translated(void (*kernel)(Params...), cuda_cpu::Code code) {
        cuda_cpu::translated[reinterpret_cast<const void*>(kernel)] = code;
    }
};

// Registers have no type but a size: the bits are taken for what an instruction says.
template <typename T, typename X>
T as(X x) {
    if constexpr (std::is_floating_point_v<T> == std::is_floating_point_v<X>) {
        return static_cast<T>(x);
    } else {
        static_assert(sizeof(T) == sizeof(X));
        T y;
        memcpy(&y, &x, sizeof y);
        return y;
    }
}
template <typename R, typename T>
void put(R& target, T x) {
    target = as<R>(x);
}

// ---------------------------------------------------------------------------------------------- who touched a byte

struct Clock {  // barriers passed
    int block = 0, warp = 0;
};
constexpr int NOBODY = -2, SEVERAL = -1;
struct Access {
    int block = NOBODY, warp = 0, lane = 0;  // who: a thread, or several of a warp, of a block, of a grid
    Clock clock;
    Where where;
};
struct Cell {
    Access write, read;
    int copier = NOBODY;  // the thread whose cp.async to it is under way
    int copied = 0;       // by so many cp.async that are under way
};

bool ordered(const Access& earlier, const Access& later) {
    if (earlier.block == NOBODY) return true;
    if (earlier.block == SEVERAL || earlier.block != later.block) return false;
    if (earlier.clock.block < later.clock.block) return true;
    if (earlier.warp == SEVERAL || earlier.warp != later.warp) return false;
    return earlier.clock.warp < later.clock.warp || (earlier.lane != SEVERAL && earlier.lane == later.lane);
}

// Reads that are not ordered, as one by all of them.
Access both(Access x, const Access& y) {
    if (x.block != y.block) x.block = SEVERAL;
    if (x.block == SEVERAL || x.warp != y.warp) x.warp = SEVERAL;
    if (x.warp == SEVERAL || x.lane != y.lane) x.lane = SEVERAL;
    return x;
}

constexpr size_t PAGE = 4096;
std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> global_cells;  // by page, of this launch
std::vector<Cell> shared_cells;                                       // of this block
unsigned long seen_launches, seen_blocks;

Cell& cell(Space space, uintptr_t byte) {
    if (space == SHARED) return shared_cells[byte - SMEM];
    std::unique_ptr<Cell[]>& page = global_cells[byte / PAGE];
    if (!page) page.reset(new Cell[PAGE]);
    return page[byte % PAGE];
}

std::string told(const Access& x) {
    const std::string by = x.block == SEVERAL ? "several blocks" : x.warp == SEVERAL ? "several warps"
                         : x.lane == SEVERAL ? "warp " + std::to_string(x.warp)
                         : "thread " + std::to_string(32 * x.warp + x.lane);
    return by + " at " + x.where.source + " (PTX " + std::to_string(x.where.line) + ")";
}

// Every access, for ptx.py to count what it costs; written down where PTX_TRACE names a file, when a launch begins.
struct Traced {
    int32_t kernel, block, thread, line;
    int64_t address;
    int32_t space, size;
};
FILE* trace;

// ---------------------------------------------------------------------------------------------- a thread

struct Self {
    const int kernel, thread = cuda_cpu::current;
    Clock clock;

    explicit Self(int kernel) : kernel(kernel) {
        if (seen_launches != cuda_cpu::launches) {
            if (trace) fclose(trace);
            trace = getenv("PTX_TRACE") ? fopen(getenv("PTX_TRACE"), "ab") : nullptr;
        }
        if (seen_launches != cuda_cpu::launches) global_cells.clear();
        if (seen_blocks != cuda_cpu::blocks) shared_cells.assign(cuda_cpu::shared_size, {});
        seen_launches = cuda_cpu::launches, seen_blocks = cuda_cpu::blocks;
    }

    Access access(Where where, bool whole_warp = false) const {
        return {static_cast<int>(blockIdx.x), thread / 32, whole_warp ? SEVERAL : thread % 32, clock, where};
    }

    char* pointer(Space space, uintptr_t address, size_t size, Where where) const {
        const auto wrong = [&](const char* what) {
            char text[160];
            snprintf(text, sizeof text, "%zu bytes at address %#zx %s (PTX %d, %s)", size, address, what, where.line,
                     where.source);
            cuda_cpu::fail(text);
        };
        if (address % size) wrong("are not aligned");
        if (space != SHARED) return reinterpret_cast<char*>(address);
        if (address < SMEM || address + size > SMEM + cuda_cpu::shared_size) wrong("are not in shared memory");
        return cuda_cpu::shared_memory + (address - SMEM);
    }

    void touch(Space space, uintptr_t address, size_t size, Action action, const Access& now) const {
        if (trace) {
            const Traced x = {kernel, now.block, thread, now.where.line, static_cast<int64_t>(address), space,
                              static_cast<int32_t>(size)};
            fwrite(&x, sizeof x, 1, trace);
        }
        for (uintptr_t byte = address; byte < address + size; byte++) {
            Cell& it = cell(space, byte);
            const bool clash = !ordered(it.write, now);
            if (it.copier != NOBODY || clash || (action == WRITE && (it.copied || !ordered(it.read, now)))) {
                const Access& before = it.copier != NOBODY || clash ? it.write : it.read;
                const bool by_copy = it.copier != NOBODY || (&before == &it.read && it.copied);
                cuda_cpu::fail(std::string(action == WRITE ? "a write" : "a read") + " by " + told(now) + " races with " +
                               (by_copy ? "a copy" : &before == &it.write ? "a write" : "a read") + " by " +
                               told(before) + " of byte " + std::to_string(space == SHARED ? byte - SMEM : byte));
            }
            if (action == WRITE) {
                it.write = now, it.read = Access();
            } else {
                it.read = ordered(it.read, now) ? now : both(it.read, now);
            }
        }
    }

    template <typename T, int n, typename... Rs>
    void load(Space space, uintptr_t address, Where where, Rs&... registers) const {
        const char* from = pointer(space, address, sizeof(T) * n, where);
        if (space != PARAM) touch(space, address, sizeof(T) * n, READ, access(where));
        T values[n];
        memcpy(values, from, sizeof values);
        const T* next = values;
        (put(registers, *next++), ...);
    }
    template <typename T, int n, typename... Rs>
    void store(Space space, uintptr_t address, Where where, Rs... registers) const {
        char* to = pointer(space, address, sizeof(T) * n, where);
        touch(space, address, sizeof(T) * n, WRITE, access(where));
        const T values[n] = {as<T>(registers)...};
        memcpy(to, values, sizeof values);
    }

    // bar.sync is .aligned: a warp's threads come to it at one place, warps may at different ones.
    void barrier(Where where) {
        if (cuda_cpu::thread_count() % 32 == 0) meet_warp("bar.sync", where);
        cuda_cpu::meet(0, cuda_cpu::thread_count(), ~0u, {"bar.sync", "", 0}, nullptr, [] {});
        clock.block++;
    }
    void warp_barrier(Where where) {
        meet_warp("bar.warp.sync", where);
        clock.warp++;
    }
    void meet_warp(const char* what, Where where) const {
        cuda_cpu::meet(thread / 32 * 32, 32, ~0u, {what, where.source, where.line}, nullptr, [] {});
    }

    template <typename... Rs>
    void ldmatrix(bool transposed, uintptr_t address, Where where, Rs&... registers) const {
        const char* row = pointer(SHARED, address, 16, where);
        touch(SHARED, address, 16, READ, access(where, true));
        uint32_t x[4], *next = x;
        cuda_cpu::load_matrices(x, row, transposed, where.source, where.line);
        (put(registers, *next++), ...);
    }

    void cp_async(uintptr_t to, uintptr_t from, int size, uint32_t there, Where where) const {
        char* target = pointer(SHARED, to, size, where);
        const char* source = there ? pointer(GLOBAL, from, size, where) : nullptr;
        if (size != 16 || (there && there != 16)) cuda_cpu::fail("cp.async of another size than 16 or 0");
        if (there) touch(GLOBAL, from, 16, READ, access(where));
        touch(SHARED, to, 16, WRITE, access(where));
        for (int i = 0; i < 16; i++) cell(SHARED, to + i).copier = thread;
        for (int i = 0; i < 16 && there; i++) cell(GLOBAL, from + i).copied++;
        cp_async16(target, source, there);
    }
    void cp_async_wait(int newest) const {
        const cuda_cpu::Thread& me = cuda_cpu::threads[thread];
        for (const cuda_cpu::Copy& copy : me.copies) {
            if (copy.group >= me.groups - newest) continue;
            const uintptr_t to = SMEM + (static_cast<char*>(copy.to) - cuda_cpu::shared_memory);
            for (int i = 0; i < 16; i++) {
                Cell& it = cell(SHARED, to + i);
                it.copier = NOBODY, it.write.clock = clock;
                if (!copy.from) continue;
                Cell& source = cell(GLOBAL, reinterpret_cast<uintptr_t>(copy.from) + i);
                const Access now = access(source.read.where);          // it has read until now
                source.copied--, source.read = ordered(source.read, now) ? now : both(source.read, now);
            }
        }
        cuda_cpu::wait_for_copies(newest);
    }
    void prefetch(uintptr_t) const {}
};

// ---------------------------------------------------------------------------------------------- values

void mma(std::array<float*, 4> c, std::array<uint32_t, 4> a, std::array<uint32_t, 2> b, std::array<float, 4> before,
         Where where) {
    float sums[4];
    uint32_t left[4];
    memcpy(sums, before.data(), sizeof sums), memcpy(left, a.data(), sizeof left);
    mma_bf16(sums, left, b[0], b[1], where.source, where.line);
    for (int n = 0; n < 4; n++) *c[n] = sums[n];
}

void movmatrix(uint32_t& target, uint32_t x, Where where) { target = transpose(x, where.source, where.line); }

// clamp 31, no segments: the whole warp
void shuffle_xor(uint32_t& target, uint32_t x, uint32_t bits, uint32_t clamp, uint32_t mask, Where where) {
    if (clamp != 31) cuda_cpu::fail("a shuffle in segments");
    target = __shfl_xor_sync(mask, x, bits, where.source, where.line);
}
void shuffle(uint32_t& target, uint32_t x, uint32_t lane, uint32_t clamp, uint32_t mask, Where where) {
    if (clamp != 31) cuda_cpu::fail("a shuffle in segments");
    target = __shfl_sync(mask, x, lane, where.source, where.line);
}

float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
float quotient(float x, float y) {  // div.approx: x times the reciprocal, which is 0 for a large y
    return std::fabs(y) > 0x1p126f && std::isfinite(y) ? x * std::copysign(0.0f, y) : x / y;
}
float fma_down(float x, float y, float z) {  // rounded towards minus infinity
    const int usual = fegetround();
    fesetround(FE_DOWNWARD);
    const volatile float a = x, b = y, c = z, result = std::fma(a, b, c);
    fesetround(usual);
    return result;
}
template <typename T>
T lesser(T x, T y) { return std::is_floating_point_v<T> ? static_cast<T>(std::fmin(x, y)) : std::min(x, y); }
template <typename T>
T greater(T x, T y) { return std::is_floating_point_v<T> ? static_cast<T>(std::fmax(x, y)) : std::max(x, y); }
template <typename T>
T shifted_right(T x, uint32_t by) {
    constexpr uint32_t bits = 8 * sizeof(T);
    return by < bits ? x >> by : std::is_signed_v<T> ? x >> (bits - 1) : 0;
}
uint32_t inserted(uint32_t x, uint32_t into, uint32_t at, uint32_t length) {  // bfi
    if ((at &= 255) > 31) return into;
    const uint32_t bits = (length < 32 ? (1u << length) - 1 : ~0u) << at;
    return (into & ~bits) | (x << at & bits);
}
uint32_t permuted(uint32_t x, uint32_t y, uint32_t which) {  // prmt: four nibbles, each the number of a byte of y:x
    const uint64_t bytes = uint64_t{y} << 32 | x;
    uint32_t result = 0;
    for (int n = 0; n < 4; n++) {
        const uint32_t nibble = which >> 4 * n & 15, byte = bytes >> 8 * (nibble & 7) & 255;
        result |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * n;  // 8: its sign, eight times
    }
    return result;
}

}  // namespace ptx
}  // namespace
