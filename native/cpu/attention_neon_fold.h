/* attention_neon_fold.h: a_i = x_i scale_i in 8 bits (attention_parameters.h), for the product with codes in
 * attention_neon_codes.h.
 */
#pragma once

#include "attention_parameters.h"
#include "vec_neon.h"

#include <cstring>

namespace xq {
namespace {

struct vector {
    using type = float32x4_t;
    static constexpr int lanes = 4;

    static type load_half(const uint8_t *p) { return xq::load_half((const uint16_t *)p); }
    static type add_product(type z, type s, float x) { return vfmaq_n_f32(z, s, x); }
    static void store(float *p, type x) { vst1q_f32(p, x); }
    static void prefetch(const void *) {} // what helps on real CPUs was not measured

    /* 2^((e - 161) / 8), and q / 8 times that. */
    static void load_log8(const uint8_t *e, const uint8_t *q, type &s, type &c) {
        const uint8x16x2_t table = {
            {vreinterpretq_u8_f32(vld1q_f32(log8_steps)), vreinterpretq_u8_f32(vld1q_f32(log8_steps + 4))}};
        const int32x4_t k =
            vsubq_s32(vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four(e))))), vdupq_n_s32(161));
        const uint32x4_t index = vandq_u32(vreinterpretq_u32_s32(k), vdupq_n_u32(7)); // of four bytes
        const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100u), index, 0x04040404u);
        const uint8x16_t fraction = vqtbl2q_u8(table, vreinterpretq_u8_u32(bytes));
        s = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_u8(fraction), vshlq_n_s32(vshrq_n_s32(k, 3), 23)));
        const int32x4_t eighths = vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(four(q)))));
        c = vmulq_f32(vcvtq_f32_s32(eighths), vmulq_n_f32(s, 0.125f));
    }

  private:
    static uint8x8_t four(const uint8_t *p) {
        uint32_t bytes;
        memcpy(&bytes, p, sizeof(bytes));
        return vcreate_u8(bytes);
    }
};

using parameters = parameters_of<vector>;

/* One vector to multiply codes with: y[j] = step * sum_i a[i] c[i][j] + offset. */
struct folded {
    int8_t a[max_i]; /* zeros from n to a multiple of 32 */
    float step, offset;
};

/* Folds the scales into x [n]. */
static inline void fold(const parameters &p, const float *x, folded &out) {
    float a[max_i];
    float32x4_t constant = vdupq_n_f32(0.0f), top = vdupq_n_f32(0.0f);
    for (int i = 0; i < p.n; i += 4) {
        const float32x4_t v = vld1q_f32(x + i), product = vmulq_f32(v, vld1q_f32(p.scale + i));
        constant = vfmaq_f32(constant, v, vld1q_f32(p.centre + i));
        top = vmaxnmq_f32(top, vabsq_f32(product));
        vst1q_f32(a + i, product);
    }
    out.offset = vaddvq_f32(constant);
    const float largest = vmaxvq_f32(top);
    if (!(largest > 1e-30f)) { // nothing but centres, also with 0 bits
        memset(out.a, 0, (size_t)(p.n + 31) / 32 * 32);
        out.step = 0.0f;
        return;
    }
    out.step = largest / 127.0f;
    const float inverse = 127.0f / largest;
    int32x4_t sum = vdupq_n_s32(0);
    for (int i = 0; i < p.n; i += 8) {
        const int32x4_t a0 = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(a + i), inverse));
        const int32x4_t a1 = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(a + i + 4), inverse));
        sum = vaddq_s32(sum, vaddq_s32(a0, a1));
        vst1_s8(out.a + i, vqmovn_s16(vcombine_s16(vqmovn_s32(a0), vqmovn_s32(a1))));
    }
    if (p.n % 32 != 0) {
        memset(out.a + p.n, 0, 16);
    }
    out.offset -= out.step * p.middle * (float)vaddvq_s32(sum);
}

} // namespace
} // namespace xq
