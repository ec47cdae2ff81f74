// A cuda_runtime.h that runs kernels on a CPU: g++ -x c++ -DCUDA_ON_CPU -Itests/cuda_on_cpu kernel.cu
//
// What it is for: the file that ships is executed by tests on a machine without a GPU, and its mistakes are found by
// means a GPU does not offer: poisoned memory, chosen schedules, sanitizers, an error that names lines and threads.
//
// HOW. One block runs at a time. Each of its threads is a fiber: a stack of its own and a saved stack pointer; a
// switch costs a dozen instructions. A fiber runs until it has to wait for others, and waiting has one form, the
// *meeting*: all members of a group (the block for __syncthreads, the lanes of a mask for warp functions) must arrive
// at the same call, that is the same function on the same source line. Whoever comes early sleeps; the last to arrive
// computes the results of all (they lie on the sleepers' stacks) and wakes them. When nobody can run and not all have
// returned, the kernel is wrong: a barrier in divergent code, a return before a barrier, a shuffle by half a warp. The
// launch then returns 719 and cuda_cpu_error() says who waits where. Nothing aborts; the next launch starts afresh.
//
//   shared memory   only dynamic, from dyn_smem(): a heap block of exactly the launched size, so ASan sees the first
//                   byte too far; filled with 0xff before each block, which is NaN in fp32, bf16 and fp16.
//                   `__shared__` is not defined: kernels here do not use static shared memory.
//   schedules       environment variable CUDA_CPU_ORDER, read at each launch: among the threads that can run, take
//                   0 (default) the one that has waited longest, 1 the last to become ready, N > 1 one at random with
//                   seed N; blocks run upwards, downwards, shuffled. A race is a result that depends on it. One
//                   schedule proves nothing: a missing barrier can be harmless in 0 and in 1.
//   cp.async        copies as late as it may, when its group is waited for; in order 1 at once; in order N > 1 one or
//                   the other. A group that nobody waits for is an error.
//   stricter        than a GPU: 48 KB of shared memory, or up to 99 KB (what the smallest cards have) once the kernel
//                   was allowed it; and no meeting of __syncwarps on different lines.
//   absent          all that no kernel uses yet; a new intrinsic is a compile error, never silently skipped. A warp
//                   function is a struct of operands and results and a `meet` with what the last lane does: see
//                   __shfl_xor_sync. Its place is after that one.
//   unseen          real timing, memory that becomes visible late, bank conflicts, fused multiply-add (nvcc fuses, g++
//                   does not: compare with a GPU within a tolerance, bit by bit only between schedules). ptx.h, which
//                   runs what nvcc made of a kernel in its place, sees the last, and races in whatever schedule.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include <sys/mman.h>
#if !defined(__x86_64__) || defined(CUDA_CPU_UCONTEXT)
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

// ---------------------------------------------------------------------------------------------- the language

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 : uint3 {
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
typedef struct CUstream_st* cudaStream_t;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

// Everything is private to the library that includes this file: several such libraries may be open in one process.
namespace {

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_cpu {

// ---------------------------------------------------------------------------------------------- fibers

constexpr size_t STACK = 256 * 1024;  // bytes per thread; a page of it is real once touched

#if defined(__x86_64__) && !defined(CUDA_CPU_UCONTEXT)
using Fiber = void*;  // the stack pointer; the registers that a call must preserve lie on the stack above it

__attribute__((naked, noinline)) void switch_stack(Fiber*, Fiber) {  // (rdi: where to save, rsi: what to load)
    asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
        "movq %rsp, (%rdi); movq %rsi, %rsp\n\t"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
void switch_fiber(Fiber& from, Fiber& to) { switch_stack(&from, to); }
void prepare(Fiber& fiber, char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + STACK);  // a multiple of 16, as the ABI wants it at a call
    top[-2] = reinterpret_cast<void*>(entry);              // what `ret` pops; [-1] stands for a return address
    fiber = top - 8;                                       // below it six registers, of any value
}
#else
using Fiber = ucontext_t;  // anywhere else; slower, because it saves the signal mask as well

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from, &to); }
void prepare(Fiber& fiber, char* stack, void (*entry)()) {
    getcontext(&fiber);
    fiber.uc_stack.ss_sp = stack, fiber.uc_stack.ss_size = STACK, fiber.uc_link = nullptr;
    makecontext(&fiber, entry, 0);
}
#endif

// ---------------------------------------------------------------------------------------------- a block

struct Site {  // a call that waits
    const char *what, *file;
    int line;
    bool operator==(const Site& other) const {
        return line == other.line && !strcmp(what, other.what) && !strcmp(file, other.file);
    }
};
struct Copy {  // a cp.async that was started
    void* to;
    const void* from;  // null: zeros
    int group;
    bool done = false;
    void run() {
        if (!done) from ? memcpy(to, from, 16) : memset(to, 0, 16);
        done = true;
    }
};
struct Thread {
    Fiber fiber;
    uint3 index;
    Site site;      // where it waits
    void* operand;  // what it brings to the meeting, on its stack
    enum { can_run, waits, returned } state;
    std::vector<Copy> copies;
    int groups = 0;  // committed so far
};
struct Meeting {  // that not all have reached
    int first, size;  // the members are among threads first .. first + size - 1
    unsigned mask;    // of a warp; ~0u for the block
    Site site;
    int missing;
};

std::mutex one_launch_at_a_time;
std::function<void()> body;
std::map<const void*, size_t> allowed;  // kernel -> its limit of shared memory
using Code = void (*)(const char* const* params);
std::map<const void*, Code> translated; // kernel -> what runs in its place: its PTX, if tests/ptx.py translated it
size_t shared_limit, shared_size;        // of the kernel that runs: what it may have, what it was launched with
std::vector<Thread> threads;
std::vector<Meeting> meetings;
std::deque<int> ready;
Fiber launcher;
int current, alive;
unsigned long order, launches, blocks;  // the schedule; how many there were so far
std::mt19937 random_engine;
char* shared_memory;
std::string error;

int thread_count() { return static_cast<int>(threads.size()); }

int take_ready() {
    if (order > 1) std::swap(ready[random_engine() % ready.size()], ready.back());
    const int next = order == 0 ? ready.front() : ready.back();
    order == 0 ? ready.pop_front() : ready.pop_back();
    return next;
}

// "threads 0-6 wait in __syncthreads (x.cu:12); threads 7-63 have returned"
std::string who() {
    std::string text;
    for (int t = 0, next; t < thread_count(); t = next) {
        const Thread& thread = threads[t];
        const auto same = [&](const Thread& other) {
            return other.state == thread.state && (thread.state != Thread::waits || other.site == thread.site);
        };
        for (next = t + 1; next < thread_count() && same(threads[next]);) next++;
        text += (text.empty() ? "threads " : "; threads ") + std::to_string(t);
        if (next > t + 1) text += "-" + std::to_string(next - 1);
        if (thread.state == Thread::waits) {
            const char* slash = strrchr(thread.site.file, '/');
            text += std::string(" wait in ") + thread.site.what + " (" + (slash ? slash + 1 : thread.site.file) + ":" +
                    std::to_string(thread.site.line) + ")";
        } else {
            text += thread.state == Thread::returned ? " have returned" : " can run";
        }
    }
    return text;
}

// Give up the block: its fibers are never resumed (kernels own nothing that needs a destructor).
void fail(const std::string& what) {
    char block[64];
    snprintf(block, sizeof block, "block (%u,%u,%u): ", blockIdx.x, blockIdx.y, blockIdx.z);
    error = block + what + ": " + who();
    switch_fiber(threads[current].fiber, launcher);
}

// The current thread cannot go on for now: run another.
void pass_on() {
    if (ready.empty()) fail("no thread can go on");
    const int previous = current;
    current = take_ready();
    threads[current].state = Thread::can_run;
    threadIdx = threads[current].index;
    switch_fiber(threads[previous].fiber, threads[current].fiber);
}

void run_thread() {
    body();
    if (!threads[current].copies.empty()) fail("thread " + std::to_string(current) + " did not wait for its cp.async");
    threads[current].state = Thread::returned;
    if (--alive == 0) switch_fiber(threads[current].fiber, launcher);
    pass_on();
}

// Wait until all of `mask` among threads first .. first + size - 1 are here. The last calls last(); then all go on.
template <typename Last>
void meet(int first, int size, unsigned mask, Site site, void* operand, Last last) {
    threads[current].site = site, threads[current].operand = operand, threads[current].state = Thread::waits;
    const bool whole_block = size == thread_count() && mask == ~0u;
    if (!whole_block && !(mask >> (current - first) & 1)) {
        fail("thread " + std::to_string(current) + " is not in the mask it passes");
    }
    auto meeting = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) {
        return m.first == first && m.size == size && m.mask == mask && m.site == site;
    });
    if (meeting == meetings.end()) {
        const int members = whole_block ? size : __builtin_popcount(mask);
        meeting = meetings.insert(meetings.end(), {first, size, mask, site, members});
    }
    if (--meeting->missing) return pass_on();
    meetings.erase(meeting);
    last();
    threads[current].state = Thread::can_run;
    for (int t = 0; t < size; t++) {
        if (first + t != current && (whole_block || mask >> t & 1)) {
            threads[first + t].state = Thread::can_run;
            ready.push_back(first + t);
        }
    }
}

void run_block(size_t smem, char* stacks) {
    if (posix_memalign(reinterpret_cast<void**>(&shared_memory), 16, smem)) abort();
    memset(shared_memory, 0xff, smem);
    shared_size = smem, blocks++;
    ready.clear(), meetings.clear();
    alive = thread_count();
    for (int t = 0; t < alive; t++) {
        threads[t].index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
        threads[t].state = Thread::can_run, threads[t].copies.clear(), threads[t].groups = 0;
        prepare(threads[t].fiber, stacks + t * STACK, run_thread);
        ready.push_back(t);
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stacks, alive * STACK);  // frames of fibers that were left or given up
#endif
    current = take_ready();
    threadIdx = threads[current].index;
    switch_fiber(launcher, threads[current].fiber);  // returns when all threads have, or from fail()
    free(shared_memory);
}

bool wrong_size(dim3 grid, dim3 block, size_t smem) {
    const uint64_t count = uint64_t{block.x} * block.y * block.z;
    return count == 0 || count > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
           grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 || smem > shared_limit;
}

int run_grid(const cudaLaunchConfig_t& config) {
    gridDim = config.gridDim, blockDim = config.blockDim, error.clear();
    if (wrong_size(gridDim, blockDim, config.dynamicSmemBytes)) {
        char text[160];
        snprintf(text, sizeof text, "launch of (%u,%u,%u) blocks of (%u,%u,%u) threads with %zu bytes of shared memory",
                 gridDim.x, gridDim.y, gridDim.z, blockDim.x, blockDim.y, blockDim.z, config.dynamicSmemBytes);
        error = text;
        return cudaErrorLaunchFailure;
    }
    const char* variable = getenv("CUDA_CPU_ORDER");
    order = variable ? strtoul(variable, nullptr, 10) : 0;
    random_engine.seed(static_cast<unsigned>(order));
    std::vector<unsigned> blocks(size_t{gridDim.x} * gridDim.y * gridDim.z);
    std::iota(blocks.begin(), blocks.end(), 0);
    if (order == 1) std::reverse(blocks.begin(), blocks.end());
    if (order > 1) std::shuffle(blocks.begin(), blocks.end(), random_engine);

    threads.assign(blockDim.x * blockDim.y * blockDim.z, Thread{});
    const size_t bytes = threads.size() * STACK;
    void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) abort();
    for (size_t i = 0; i < blocks.size() && error.empty(); i++) {
        blockIdx = {blocks[i] % gridDim.x, blocks[i] / gridDim.x % gridDim.y, blocks[i] / gridDim.x / gridDim.y};
        run_block(config.dynamicSmemBytes, static_cast<char*>(stacks));
    }
    munmap(stacks, bytes);
    return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace cuda_cpu

// ---------------------------------------------------------------------------------------------- what kernels call

char* dyn_smem() { return cuda_cpu::shared_memory; }

void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    cuda_cpu::meet(0, cuda_cpu::thread_count(), ~0u, {"__syncthreads", file, line}, nullptr, [] {});
}

void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    cuda_cpu::meet(cuda_cpu::current / 32 * 32, 32, mask, {"__syncwarp", file, line}, nullptr, [] {});
}

// One rounding each, never fused into one (volatile: on no machine, with no flag).
float __fmul_rn(float x, float y) {
    const volatile float product = x * y;
    return product;
}
float __fadd_rn(float x, float y) {
    const volatile float sum = x + y;
    return sum;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
    struct Operand {
        T value, result;
        int lane_mask;
    } mine = {value, value, lane_mask};
    const int warp = cuda_cpu::current / 32 * 32;
    cuda_cpu::meet(warp, 32, mask, {"__shfl_xor_sync", file, line}, &mine, [&] {
        const auto of = [&](int lane) -> Operand& {
            return *static_cast<Operand*>(cuda_cpu::threads[warp + lane].operand);
        };
        for (int lane = 0; lane < 32; lane++) {
            if (!(mask >> lane & 1)) continue;
            const int source = lane ^ of(lane).lane_mask;
            if (source < 0 || source > 31 || !(mask >> source & 1)) {
                cuda_cpu::fail("lane " + std::to_string(lane) + " shuffles from a lane outside its mask");
            }
            of(lane).result = of(source).value;
        }
    });
    return mine.result;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    T mine = value;
    const int warp = cuda_cpu::current / 32 * 32;
    if (source < 0 || source > 31 || !(mask >> source & 1)) cuda_cpu::fail("a shuffle from a lane outside its mask");
    cuda_cpu::meet(warp, 32, mask, {"__shfl_sync", file, line}, &mine, [&] {
        const T sent = *static_cast<T*>(cuda_cpu::threads[warp + source].operand);
        for (int lane = 0; lane < 32; lane++) {
            if (mask >> lane & 1) *static_cast<T*>(cuda_cpu::threads[warp + lane].operand) = sent;
        }
    });
    return mine;
}

// The functions that wrap PTX on a GPU (device.cuh), with the same meaning. A warp is 32 lanes, all of which must come.
// Fragments: lane l holds, of an 8x8 matrix of 16-bit numbers, row l/4, columns 2 (l%4) and + 1, packed low half first.

namespace cuda_cpu {

// All 32 lanes bring an Operand; the last one calls work(of), where of(lane) is that lane's.
template <typename Operand, typename Work>
void warp_meets(const char* what, const char* file, int line, Operand& mine, Work work) {
    const int warp = current / 32 * 32;
    meet(warp, 32, ~0u, {what, file, line}, &mine, [&] {
        work([&](int lane) -> Operand& { return *static_cast<Operand*>(threads[warp + lane].operand); });
    });
}

float half_of(uint32_t pair, int high) {
    const uint32_t bits = high ? pair & 0xffff0000u : pair << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

void load_matrices(uint32_t (&x)[4], const void* row, bool transposed, const char* file, int line) {
    struct Operand {
        const void* row;
        uint32_t x[4];
    } mine = {row, {}};
    warp_meets("ldmatrix", file, line, mine, [&](auto of) {
        uint16_t rows[4][8][8];
        for (int lane = 0; lane < 32; lane++) {
            if (reinterpret_cast<uintptr_t>(of(lane).row) % 16) fail("ldmatrix of a row not aligned to 16 bytes");
            memcpy(rows[lane / 8][lane % 8], of(lane).row, 16);
        }
        for (int lane = 0; lane < 32; lane++) {
            const int i = lane / 4, j = lane % 4 * 2;
            for (int m = 0; m < 4; m++) {
                const uint16_t low = transposed ? rows[m][j][i] : rows[m][i][j];
                const uint16_t high = transposed ? rows[m][j + 1][i] : rows[m][i][j + 1];
                of(lane).x[m] = low | uint32_t{high} << 16;
            }
        }
    });
    memcpy(x, mine.x, sizeof x);
}

uint32_t transpose_matrix(uint32_t x, const char* file, int line) {
    warp_meets("movmatrix", file, line, x, [](auto of) {
        uint16_t rows[8][8];
        for (int lane = 0; lane < 32; lane++) memcpy(&rows[lane / 4][lane % 4 * 2], &of(lane), 4);
        for (int lane = 0; lane < 32; lane++) {
            const int i = lane / 4, j = lane % 4 * 2;
            of(lane) = rows[j][i] | uint32_t{rows[j + 1][i]} << 16;
        }
    });
    return x;
}

void wait_for_copies(int newest) {
    Thread& thread = threads[current];
    while (!thread.copies.empty() && thread.copies.front().group < thread.groups - newest) {
        thread.copies.front().run();
        thread.copies.erase(thread.copies.begin());
    }
}

}  // namespace cuda_cpu

void ldmatrix(uint32_t (&x)[4], const void* row, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    cuda_cpu::load_matrices(x, row, false, file, line);
}
void ldmatrix_trans(uint32_t (&x)[4], const void* row, const char* file = __builtin_FILE(),
                    int line = __builtin_LINE()) {
    cuda_cpu::load_matrices(x, row, true, file, line);
}
uint32_t transpose(uint32_t x, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return cuda_cpu::transpose_matrix(x, file, line);
}

// c (16x8) += a (16x16) b (16x8), products of bf16 summed in fp32, in the order of k.
void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
    struct Operand {
        uint32_t a[4], b[2];
        float c[4];
    } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    cuda_cpu::warp_meets("mma", file, line, mine, [&](auto of) {
        float left[16][16], right[8][16];
        for (int lane = 0; lane < 32; lane++) {
            const int i = lane / 4, j = lane % 4 * 2;
            for (int e = 0; e < 2; e++) {
                for (int m = 0; m < 4; m++) {
                    left[i + m % 2 * 8][j + m / 2 * 8 + e] = cuda_cpu::half_of(of(lane).a[m], e);
                }
                for (int m = 0; m < 2; m++) right[i][j + m * 8 + e] = cuda_cpu::half_of(of(lane).b[m], e);
            }
        }
        for (int lane = 0; lane < 32; lane++) {
            for (int m = 0; m < 4; m++) {
                const float *x = left[lane / 4 + m / 2 * 8], *y = right[lane % 4 * 2 + m % 2];
                float& sum = of(lane).c[m];
                for (int k = 0; k < 16; k++) sum += x[k] * y[k];
            }
        }
    });
    memcpy(c, mine.c, sizeof c);
}

void cp_async16(void* to, const void* from, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16)) {
        cuda_cpu::fail("cp.async not aligned to 16 bytes");
    }
    cuda_cpu::Thread& thread = cuda_cpu::threads[cuda_cpu::current];
    thread.copies.push_back({to, valid ? from : nullptr, thread.groups});
    if (cuda_cpu::order == 1 || (cuda_cpu::order > 1 && cuda_cpu::random_engine() % 2)) thread.copies.back().run();
}
void cp_async_commit() { cuda_cpu::threads[cuda_cpu::current].groups++; }
template <int NEWEST>
void cp_async_wait() { cuda_cpu::wait_for_copies(NEWEST); }

void store(void* to, uint2 x) { *static_cast<uint2*>(to) = x; }
void store(void* to, uint4 x) { *static_cast<uint4*>(to) = x; }
void prefetch(const void* from) { (void)*static_cast<const volatile char*>(from); }  // (a sanitizer sees it)

float __expf(float x) { return std::exp(x); }
float __fdividef(float x, float y) { return x / y; }
float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// ---------------------------------------------------------------------------------------------- what the host calls

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    cuda_cpu::allowed[reinterpret_cast<const void*>(kernel)] = std::min(bytes, 99 * 1024);
    return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
    const std::lock_guard<std::mutex> lock(cuda_cpu::one_launch_at_a_time);
    const void* const key = reinterpret_cast<const void*>(kernel);
    const auto code = cuda_cpu::translated.find(key);
    cuda_cpu::body = [=] {
        if (code == cuda_cpu::translated.end()) return kernel(args...);
        std::apply([&](const Params&... x) {
            const char* const params[] = {reinterpret_cast<const char*>(&x)...};
            code->second(params);
        }, std::tuple<Params...>(args...));
    };
    cuda_cpu::launches++;
    const auto limit = cuda_cpu::allowed.find(key);
    cuda_cpu::shared_limit = limit == cuda_cpu::allowed.end() ? 48 * 1024 : limit->second;
    return static_cast<cudaError_t>(cuda_cpu::run_grid(*config));
}

}  // namespace

extern "C" const char* cuda_cpu_error() { return cuda_cpu::error.c_str(); }

static const char* cudaGetErrorString(cudaError_t code) {
    return code == cudaErrorLaunchFailure ? cuda_cpu_error() : code ? "invalid configuration" : "no error";
}
