/* attention_avx512_latent.h: what attention_latent.h needs, for AVX-512 with VNNI.
 *
 * A unit of codes is one register: four lanes of 16 bytes, of each four tokens by four channels (a plane of the unit).
 * Turning the bytes of each lane, in place, gives words of one channel and four tokens, which vpdpbusd multiplies with
 * the lane's four p; the four lanes are added at last.
 */
#pragma once

#include "attention_avx512_codes.h"
#include "attention_pages.h"

namespace xq {
namespace {

/* p of a tile: of every 16 tokens four lanes, each its four tokens' bytes four times. */
struct weights {
    alignas(64) int8_t p[XQ_PAGE / 16][64];
    float step, total, whole;
};

XQ_INLINE void fold_weights(const float *p /* [n], at least 0 */, int n, weights &out) {
    const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    __m512 top = _mm512_setzero_ps(), total = _mm512_setzero_ps();
    for (int t = 0; t < n; t += 16) {
        const __m512 x = _mm512_load_ps(p + t);
        top = _mm512_max_ps(top, x);
        total = _mm512_add_ps(total, x);
    }
    const float largest = _mm512_reduce_max_ps(top);
    const bool any = largest > 1e-32f;
    const __m512 inverse = _mm512_set1_ps(any ? 127.0f / largest : 0.0f);
    __m512i whole = _mm512_setzero_si512();
    for (int t = 0; t < n; t += 16) {
        const __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(p + t), inverse));
        const __m512i bytes = _mm512_castsi128_si512(_mm512_cvtsepi32_epi8(x));
        _mm512_store_si512(out.p[t / 16], _mm512_permutexvar_epi32(each, bytes));
        whole = _mm512_add_epi32(whole, x);
    }
    out.step = any ? largest / 127.0f : 0.0f;
    out.total = _mm512_reduce_add_ps(total);
    out.whole = (float)_mm512_reduce_add_epi32(whole);
}

/* c[g]: channels 16 s + 4 g .. + 3 of a block of 16 tokens, [4 tokens of the lane] of each. */
template <int B> XQ_INLINE void load_channels(const uint8_t *block, int s, int units, __m512i (&c)[4]) {
    const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    if (B == 1) { // a unit holds two sixteens
        const __m512i all = _mm512_srl_epi16(_mm512_loadu_si512(block + 64 * (s / 2)), _mm_cvtsi32_si128(s % 2 * 4));
        XQ_UNROLL for (int g = 0; g < 4; ++g) {
            c[g] = _mm512_and_si512(_mm512_srli_epi16(all, (unsigned)g), _mm512_set1_epi8(1));
        }
    } else if (B == 4) { // two units hold one
        const unit<B> first(block, 2 * s, units), second(block, 2 * s + 1, units);
        c[0] = first.group(0), c[1] = first.group(1), c[2] = second.group(0), c[3] = second.group(1);
    } else {
        const unit<B> one(block, s, units);
        XQ_UNROLL for (int g = 0; g < 4; ++g) {
            c[g] = one.group(g);
        }
    }
    XQ_UNROLL for (int g = 0; g < 4; ++g) {
        c[g] = _mm512_shuffle_epi8(c[g], turn);
    }
}

/* The four lanes of each of four registers added up: [register][word of the lane]. */
XQ_INLINE __m512i add_lanes(const __m512i (&x)[4]) {
    __m512i two[2];
    XQ_UNROLL for (int i = 0; i < 2; ++i) {
        two[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(x[2 * i], x[2 * i + 1], 0x44),
                                  _mm512_shuffle_i32x4(x[2 * i], x[2 * i + 1], 0xee));
    }
    return _mm512_add_epi32(_mm512_shuffle_i32x4(two[0], two[1], 0x88), _mm512_shuffle_i32x4(two[0], two[1], 0xdd));
}

/* out[r][i] (i < e) += what n_blocks blocks of 16 tokens of B-bit codes say; w [R]. */
template <int B, int R>
void add_channels(const parameters &x, int e, int n_blocks, const uint8_t *codes, const weights *w, float *const *out) {
    const int64_t column = column_bytes(B, x.n);
    const int units = units_of(B == 3 ? 2 : B, x.n);
    for (int s = 0; s < e / 16; ++s) {
        __m512i sum[R][4];
        XQ_UNROLL for (int r = 0; r < R; ++r) {
            XQ_UNROLL for (int g = 0; g < 4; ++g) {
                sum[r][g] = _mm512_setzero_si512();
            }
        }
        for (int b = 0; b < n_blocks; ++b) {
            __m512i c[4];
            load_channels<B>(codes + b * column, s, units, c);
            XQ_UNROLL for (int r = 0; r < R; ++r) {
                const __m512i p = _mm512_load_si512(w[r].p[b]);
                XQ_UNROLL for (int g = 0; g < 4; ++g) {
                    sum[r][g] = _mm512_dpbusd_epi32(sum[r][g], c[g], p);
                }
            }
        }
        const __m512 scale = _mm512_load_ps(x.scale + 16 * s), centre = _mm512_load_ps(x.centre + 16 * s);
        XQ_UNROLL for (int r = 0; r < R; ++r) {
            const __m512 about = _mm512_sub_ps(_mm512_cvtepi32_ps(add_lanes(sum[r])),
                                               _mm512_set1_ps(n_blocks == 0 ? 0.0f : x.middle * w[r].whole));
            __m512 y = _mm512_loadu_ps(out[r] + 16 * s);
            y = _mm512_fmadd_ps(centre, _mm512_set1_ps(w[r].total), y);
            y = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(w[r].step)), about, y);
            _mm512_storeu_ps(out[r] + 16 * s, y);
        }
    }
}

#include "attention_latent.h"

} // namespace
} // namespace xq
