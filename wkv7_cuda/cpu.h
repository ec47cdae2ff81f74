// What wkv7_cpu.cpp and wkv6_cpu.cpp share: sizes, the exponential, threads, the C interface.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

// N: head size. SEGMENT: tokens from one saved state to the next. ROWS: of a state, that a backward takes at once.
constexpr int N = 64, SEGMENT = 16, ROWS = 4;

// About the logarithm of the smallest normal number.
template <class F> constexpr F LOWEST = sizeof(F) == 4 ? -87 : -708;

// exp(x) for x <= 0; below the smallest normal number it stays there. 2^n e^r with |r| <= ln(2)/2, the latter by Taylor's
// series to the last bit of F. So near is the result, too, in float; in double r has the error of a rounded ln(2), n
// times: as much as if x itself were rounded. Branch-free, so that loops over it vectorise, unlike those over std::exp.
template <class F> inline F exp_negative(F x) {
    constexpr bool single = sizeof(F) == 4;
    using Int = std::conditional_t<single, std::int32_t, std::int64_t>;
    x = x < LOWEST<F> ? LOWEST<F> : x;
    const Int n = static_cast<Int>(x * F(1.4426950408889634) - F(0.5));      // to nearest: a cast drops the fraction
    const F r = static_cast<F>(x - static_cast<double>(n) * 0.6931471805599453);  // in float it would lose digits
    F sum = 1;
    for (int m = single ? 7 : 13; m > 0; m--) sum = 1 + sum * r / F(m);
    const Int bits = (n + (single ? 127 : 1023)) << (single ? 23 : 52);
    F power;
    std::memcpy(&power, &bits, sizeof power);
    return sum * power;
}

template <class F> void transpose(F* out, const F* in) {
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) out[j * N + i] = in[i * N + j];
}

// Run work(head) for head = 0..heads-1 on `threads` threads, this one included.
template <class Work> void parallel(long heads, int threads, Work work) {
    std::atomic<long> next{0};
    auto loop = [&] { for (long head; (head = next++) < heads;) work(head); };
    std::vector<std::thread> others;
    try {
        for (long n = 1; n < threads && n < heads; n++) others.emplace_back(loop);
    } catch (const std::system_error&) {}  // the system grants no further thread: those that run do all the work
    loop();
    for (auto& other : others) other.join();
}

}  // namespace

// NAME_forward_float32 and so on, C functions that cpu.py calls: the templates `forward` and `backward` of a source.
#define EXPORT_AS(name, type, F)                                                                            \
    void name##_forward_##type(long B, long T, long H, int threads, const F* const* in, F* const* out) {    \
        forward(B, T, H, threads, in, out);                                                                 \
    }                                                                                                       \
    void name##_backward_##type(long B, long T, long H, int threads, const F* const* in, F* const* out) {   \
        backward(B, T, H, threads, in, out);                                                                \
    }
#define EXPORT(name) extern "C" { EXPORT_AS(name, float32, float) EXPORT_AS(name, float64, double) }
