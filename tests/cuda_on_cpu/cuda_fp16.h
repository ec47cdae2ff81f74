// fp16: 1 sign, 5 exponent, 10 fraction bits. Rounding to nearest, ties to even, as the GPU does it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

static inline float __half2float(__half x) {
    uint32_t bits = uint32_t{x.bits & 0x7fffu} << 13;  // in place, but with the exponent biased by 15 instead of 127
    float value;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;                                 // exact, for subnormals too
    if ((x.bits & 0x7c00) == 0x7c00) value = x.bits & 0x3ff ? NAN : INFINITY;
    return x.bits & 0x8000 ? -value : value;
}

static inline __half __float2half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    uint32_t half;
    if (x != x) return {0x7fff};
    if (size >= 0x47800000) {         // 2^16 and above
        half = 0x7c00;
    } else if (size < 0x38800000) {   // subnormal: a multiple of 2^-24
        half = static_cast<uint32_t>(std::nearbyint(std::fabs(x) * 0x1p24f));
    } else {                          // a carry out of the fraction raises the exponent, at the top to infinity
        half = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    }
    return {static_cast<uint16_t>(sign | half)};
}
