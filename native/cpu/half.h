/* half.h: F16 to F32 and back, one number at a time, for code that has no instruction for it. */
#pragma once

#include <cstdint>
#include <cstring>

namespace xq {

static inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

static inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = h >> 10 & 0x1fu, mantissa = h & 0x3ffu;
    if (exponent == 0) { // zero or subnormal: mantissa * 2^-24
        const float value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    return from_bits(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13);
}

/* Rounds half to even; what is too large becomes the largest F16, 65504. x must not be a NaN. */
static inline uint16_t float_to_half(float x) {
    const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, abs = bits & 0x7fffffffu;
    if (abs >= 0x477fe000u) {
        return (uint16_t)(sign | 0x7bffu);
    }
    if (abs < 0x38800000u) { // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
        return (uint16_t)(sign | (to_bits(from_bits(abs) + 0.5f) - 0x3f000000u));
    }
    const uint32_t rounded = abs + 0xfffu + (abs >> 13 & 1u);
    return (uint16_t)(sign | ((rounded >> 13) - (112u << 10)));
}

} // namespace xq
