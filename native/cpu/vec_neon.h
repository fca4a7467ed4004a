/* vec_neon.h: exp and tanh of NEON vectors, and F16 to F32. */
#pragma once

#include <arm_neon.h>
#include <cstdint>
#include <cstring>

namespace xq {
namespace {

static inline float32x4_t load_half(const uint16_t *p /* [4] */) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

static inline float32x4_t load_bytes(const int8_t *p /* [4] */) {
    uint32_t four;
    memcpy(&four, p, sizeof(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
}

/* exp(x) for x <= 0, relative error below 2e-7; 0 below -87 (and for -infinity).
 * x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) by its Taylor polynomial of degree 6. */
static inline float32x4_t exp_non_positive(float32x4_t x) {
    const float32x4_t lowest = vdupq_n_f32(-87.0f), clamped = vmaxnmq_f32(x, lowest);
    const float32x4_t n = vrndnq_f32(vmulq_n_f32(clamped, 1.44269504f));
    float32x4_t r = vfmsq_f32(clamped, n, vdupq_n_f32(0.693359375f));
    r = vfmsq_f32(r, n, vdupq_n_f32(-2.12194440e-4f));
    constexpr float polynomial[] = {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
    float32x4_t y = vdupq_n_f32(1.0f / 720.0f);
    for (const float c : polynomial) {
        y = vfmaq_f32(vdupq_n_f32(c), y, r);
    }
    const int32x4_t scaled = vaddq_s32(vreinterpretq_s32_f32(y), vshlq_n_s32(vcvtq_s32_f32(n), 23));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_s32(scaled), vcgeq_f32(x, lowest)));
}

/* tanh(x) = sign(x) (1 - u) / (1 + u) with u = exp(-2 |x|) */
static inline float32x4_t tanh(float32x4_t x) {
    const float32x4_t one = vdupq_n_f32(1.0f), u = exp_non_positive(vmulq_n_f32(vabsq_f32(x), -2.0f));
    const float32x4_t y = vdivq_f32(vsubq_f32(one, u), vaddq_f32(one, u));
    return vbslq_f32(vdupq_n_u32(0x80000000u), x, y);
}

} // namespace
} // namespace xq
