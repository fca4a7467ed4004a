/* attention_neon_latent.h: what attention_latent.h needs, for the three NEON sets.
 *
 * 16 bytes of codes are four tokens by four channels (a plane of a unit).  Turned, they are words of one channel and
 * four tokens: what attention_neon_dot.h multiplies with four p.
 */
#pragma once

#include "attention_neon_codes.h"
#include "attention_pages.h"

namespace xq {
namespace {

/* p of a tile, in 8 bits. */
struct weights {
    int8_t p[XQ_PAGE];
    float step, total, whole;
};

static inline void fold_weights(const float *p /* [n], at least 0 */, int n, weights &out) {
    float32x4_t top = vdupq_n_f32(0.0f), total = top;
    for (int t = 0; t < n; t += 4) {
        const float32x4_t x = vld1q_f32(p + t);
        top = vmaxnmq_f32(top, x);
        total = vaddq_f32(total, x);
    }
    const float largest = vmaxvq_f32(top);
    const bool any = largest > 1e-32f;
    const float inverse = any ? 127.0f / largest : 0.0f;
    int32x4_t whole = vdupq_n_s32(0);
    for (int t = 0; t < n; t += 8) {
        const int32x4_t a = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(p + t), inverse));
        const int32x4_t b = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(p + t + 4), inverse));
        whole = vaddq_s32(whole, vaddq_s32(a, b));
        vst1_s8(out.p + t, vqmovn_s16(vcombine_s16(vqmovn_s32(a), vqmovn_s32(b))));
    }
    out.step = any ? largest / 127.0f : 0.0f;
    out.total = vaddvq_f32(total);
    out.whole = (float)vaddvq_s32(whole);
}

/* The V-th 16 channels of a step: of groups of four channels g the sums of R rows, over 16 tokens. */
template <int B, int V, int R>
XQ_INLINE void add_tokens16(sums<R> &s, const uint8_t *block, int step, int units, const int8x16_t *p) {
    static constexpr uint8_t order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const uint8x16_t turn = vld1q_u8(order);
    const codes c[4] = {load_codes<B, V>(block, step, 0, units), load_codes<B, V>(block, step, 1, units),
                        load_codes<B, V>(block, step, 2, units), load_codes<B, V>(block, step, 3, units)};
    for (int g = 0; g < 4; ++g) {
        s.add(g,
              {{vqtbl1q_s8(c[0].group[g], turn), vqtbl1q_s8(c[1].group[g], turn), vqtbl1q_s8(c[2].group[g], turn),
                vqtbl1q_s8(c[3].group[g], turn)}},
              p);
    }
}

/* Channels i .. i + 15 of R rows, the V-th 16 of a step. */
template <int B, int V, int R>
static void add_channels16(const parameters &x, int i, int n_blocks, const uint8_t *block, const weights *w,
                           float *const *out) {
    constexpr int blocks_a_settle = sums<R>::products_a_settle / (127 * ((1 << B) - 1)) / 4;
    const int64_t column = column_bytes(B, x.n);
    const int units = (x.n + 15) / 16, step = i / 16 / sixteens<B>;
    sums<R> s;
    for (int b = 0; b < n_blocks;) {
        for (const int end = least(b + least(blocks_a_settle, n_blocks), n_blocks); b < end; ++b) {
            int8x16_t p[max_vectors];
            for (int r = 0; r < max_vectors; ++r) {
                p[r] = vld1q_s8(w[least(r, R - 1)].p + 16 * b);
            }
            add_tokens16<B, V>(s, block + b * column, step, units, p);
        }
        s.settle();
    }
    for (int r = 0; r < R; ++r) {
        const float32x4_t middle = vdupq_n_f32(n_blocks == 0 ? 0.0f : x.middle * w[r].whole);
        for (int g = 0; g < 4; ++g) {
            const float32x4_t scale = vmulq_n_f32(vld1q_f32(x.scale + i + 4 * g), w[r].step);
            const float32x4_t sum = vcvtq_f32_s32(s.get(r, g));
            const float32x4_t about = vsubq_f32(B == 1 ? vnegq_f32(sum) : sum, middle); // 1 bit: a code is 0 or -1
            float *at = out[r] + i + 4 * g;
            const float32x4_t y = vfmaq_n_f32(vld1q_f32(at), vld1q_f32(x.centre + i + 4 * g), w[r].total);
            vst1q_f32(at, vfmaq_f32(y, scale, about));
        }
    }
}

/* out[r][i] (i < e) += what n_blocks blocks of 16 tokens of B-bit codes say; w [R]. */
template <int B, int R>
static void add_channels(const parameters &x, int e, int n_blocks, const uint8_t *block, const weights *w,
                         float *const *out) {
    constexpr int V = R < max_vectors ? R : max_vectors;
    for (int r = 0; r < R; r += V) {
        for (int i = 0; i < e; i += 16) {
            if (sixteens<B> == 2 && i / 16 % 2 == 1) {
                add_channels16<B, sixteens<B> - 1, V>(x, i, n_blocks, block, w + r, out + r);
            } else {
                add_channels16<B, 0, V>(x, i, n_blocks, block, w + r, out + r);
            }
        }
    }
}

#include "attention_latent.h"

} // namespace
} // namespace xq
