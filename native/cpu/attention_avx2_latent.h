/* attention_avx2_latent.h: what attention_latent.h needs, for AVX2.
 *
 * Half a unit of codes is one register: two lanes of 16 bytes, of each four tokens by four channels (a plane of the
 * unit).  Turning the bytes of each lane, in place, gives words of one channel and four tokens, which vpmaddubsw
 * multiplies with the lane's four p and adds in pairs, in 16 bits: eight of its results fit.
 */
#pragma once

#include "attention_avx2_codes.h"
#include "attention_pages.h"

namespace xq {
namespace {

/* p of a tile: of every 8 tokens two lanes, each its four tokens' bytes four times. */
struct weights {
    alignas(32) int8_t p[XQ_PAGE / 8][32];
    float step, total, whole;
};

static inline void fold_weights(const float *p /* [n], at least 0 */, int n, weights &out) {
    __m256 top = _mm256_setzero_ps(), total = _mm256_setzero_ps();
    for (int t = 0; t < n; t += 8) {
        const __m256 x = _mm256_load_ps(p + t);
        top = _mm256_max_ps(top, x);
        total = _mm256_add_ps(total, x);
    }
    const float largest = horizontal_max(top);
    const bool any = largest > 1e-32f;
    const __m256 inverse = _mm256_set1_ps(any ? 127.0f / largest : 0.0f);
    __m256i whole = _mm256_setzero_si256();
    for (int t = 0; t < n; t += 8) {
        const __m256i x = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(p + t), inverse));
        // of each lane of four numbers the four bytes, in all its words
        const __m256i bytes = _mm256_shuffle_epi8(x, _mm256_set1_epi32(0x0c080400));
        _mm256_store_si256((__m256i *)out.p[t / 8], bytes);
        whole = _mm256_add_epi32(whole, x);
    }
    out.step = any ? largest / 127.0f : 0.0f;
    out.total = horizontal_sum(total);
    out.whole = horizontal_sum(_mm256_cvtepi32_ps(whole));
}

/* Channels 16 s + 4 G .. + 3 of tokens 8 h .. + 7 of a block, [4 tokens of the lane] of each. */
template <int B, int G> XQ_INLINE __m256i load_channels(const uint8_t *block, int s, int units, int h) {
    const __m256i turn =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m256i c;
    if constexpr (B == 1) { // a unit holds two sixteens
        const __m256i all = _mm256_loadu_si256((const __m256i *)(block + 64 * (s / 2) + 32 * h));
        c = _mm256_srli_epi16(_mm256_srl_epi16(all, _mm_cvtsi32_si128(s % 2 * 4)), G);
        c = _mm256_and_si256(c, _mm256_set1_epi8(1));
    } else if constexpr (B == 4) { // two units hold one
        c = unit<B>(block, 2 * s + G / 2, units).template group<G % 2>(h);
    } else {
        c = unit<B>(block, s, units).template group<G>(h);
    }
    return _mm256_shuffle_epi8(c, turn);
}

/* Four channels of R rows: [R][4], sums of p8 c. */
template <int B, int G, int R>
XQ_INLINE void sum_channels(const uint8_t *codes, int64_t column, int s, int units, int n_blocks, const weights *w,
                            __m128 (&out)[R]) {
    __m256i total[R];
    for (int r = 0; r < R; ++r) {
        total[r] = _mm256_setzero_si256();
    }
    for (int b = 0; b < n_blocks;) {
        __m256i sum[R];
        for (int r = 0; r < R; ++r) {
            sum[r] = _mm256_setzero_si256();
        }
        for (const int end = least(b + products_a_sum(B) / 2, n_blocks); b < end; ++b) {
            for (int h = 0; h < 2; ++h) {
                const __m256i c = load_channels<B, G>(codes + b * column, s, units, h);
                for (int r = 0; r < R; ++r) {
                    const __m256i p = _mm256_load_si256((const __m256i *)w[r].p[2 * b + h]);
                    sum[r] = add_products(sum[r], c, p);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            total[r] = _mm256_add_epi32(total[r], widened(sum[r]));
        }
    }
    for (int r = 0; r < R; ++r) {
        out[r] =
            _mm_cvtepi32_ps(_mm_add_epi32(_mm256_castsi256_si128(total[r]), _mm256_extracti128_si256(total[r], 1)));
    }
}

/* out[r][i] (i < e) += what n_blocks blocks of 16 tokens of B-bit codes say; w [R]. */
template <int B, int R>
static void add_channels(const parameters &x, int e, int n_blocks, const uint8_t *codes, const weights *w,
                         float *const *out) {
    const int64_t column = column_bytes(B, x.n);
    const int units = units_of(B == 3 ? 2 : B, x.n);
    const auto add = [&](int i, const __m128(&sum)[R]) {
        const __m128 scale = _mm_load_ps(x.scale + i), centre = _mm_load_ps(x.centre + i);
        for (int r = 0; r < R; ++r) {
            const __m128 about = _mm_sub_ps(sum[r], _mm_set1_ps(n_blocks == 0 ? 0.0f : x.middle * w[r].whole));
            const __m128 y = _mm_fmadd_ps(centre, _mm_set1_ps(w[r].total), _mm_loadu_ps(out[r] + i));
            _mm_storeu_ps(out[r] + i, _mm_fmadd_ps(_mm_mul_ps(scale, _mm_set1_ps(w[r].step)), about, y));
        }
    };
    for (int s = 0; s < e / 16; ++s) {
        __m128 sum[R];
        sum_channels<B, 0>(codes, column, s, units, n_blocks, w, sum);
        add(16 * s, sum);
        sum_channels<B, 1>(codes, column, s, units, n_blocks, w, sum);
        add(16 * s + 4, sum);
        sum_channels<B, 2>(codes, column, s, units, n_blocks, w, sum);
        add(16 * s + 8, sum);
        sum_channels<B, 3>(codes, column, s, units, n_blocks, w, sum);
        add(16 * s + 12, sum);
    }
}

#include "attention_latent.h"

} // namespace
} // namespace xq
