/* attention_avx2_fold.h: a_i = x_i scale_i in 8 bits (attention_parameters.h), and how they are multiplied with codes.
 *
 * vpmaddubsw multiplies unsigned codes with signed a and adds pairs of products in 16 bits; as many of its results are
 * added there as are sure to fit, then widened.  AVX-VNNI has vpdpbusd, which adds four products in 32 bits at once.
 */
#pragma once

#include "attention_parameters.h"
#include "vec_avx2.h"

#include <cstring>

namespace xq {
namespace {

struct vector {
    using type = __m256;
    static constexpr int lanes = 8;

    static type load_half(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
    static type add_product(type z, type s, float x) { return _mm256_fmadd_ps(s, _mm256_set1_ps(x), z); }
    static void store(float *p, type x) { _mm256_store_ps(p, x); }
    static XQ_INLINE void prefetch(const void *p) { xq::prefetch(p); }

    /* 2^((e - 161) / 8), and q / 8 times that. */
    static void load_log8(const uint8_t *e, const uint8_t *q, type &s, type &c) {
        const __m256i k =
            _mm256_sub_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)e)), _mm256_set1_epi32(161));
        const __m256 fraction =
            _mm256_permutevar8x32_ps(_mm256_loadu_ps(log8_steps), _mm256_and_si256(k, _mm256_set1_epi32(7)));
        const __m256i exponent = _mm256_slli_epi32(_mm256_srai_epi32(k, 3), 23);
        s = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(fraction), exponent));
        const __m256 eighths = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)q)));
        c = _mm256_mul_ps(eighths, _mm256_mul_ps(s, _mm256_set1_ps(0.125f)));
    }
};

#ifdef XQ_AVX_VNNI
constexpr int64_t most_of_a_sum = INT32_MAX, products_of_one = 4;

XQ_INLINE __m256i add_products(__m256i sum, __m256i codes, __m256i a) {
    return _mm256_dpbusd_avx_epi32(sum, codes, a);
}
XQ_INLINE __m256i widened(__m256i sum) {
    return sum;
}
#else
constexpr int64_t most_of_a_sum = INT16_MAX, products_of_one = 2;

XQ_INLINE __m256i add_products(__m256i sum, __m256i codes, __m256i a) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, a));
}
XQ_INLINE __m256i widened(__m256i sum) {
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}
#endif

/* Calls of add_products() whose sum fits, for B-bit codes. */
constexpr int products_a_sum(int bits) {
    return (int)(most_of_a_sum / (products_of_one * 127 * ((1 << bits) - 1)));
}

using parameters = parameters_of<vector>;

/* One vector to multiply codes with: y[j] = step * sum_i a[i] c[i][j] + offset. */
struct folded {
    alignas(32) int8_t a[max_i]; /* zeros from n to a multiple of 32 */
    float step, offset;
};

/* Folds the scales into x [n]: the largest a of a row and its constant; then, so that rows do not wait for each other,
 * the numbers themselves. */
static inline void fold_range(const parameters &p, const float *x, folded &out) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 constant[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, top[2] = {constant[0], constant[0]};
    for (int i = 0; i < p.n; i += 16) {
        for (int h = 0; h < 2; ++h) {
            const __m256 v = _mm256_loadu_ps(x + i + 8 * h);
            const __m256 a = _mm256_mul_ps(v, _mm256_load_ps(p.scale + i + 8 * h));
            constant[h] = _mm256_fmadd_ps(v, _mm256_load_ps(p.centre + i + 8 * h), constant[h]);
            top[h] = _mm256_max_ps(top[h], _mm256_andnot_ps(sign, a));
        }
    }
    out.offset = horizontal_sum(_mm256_add_ps(constant[0], constant[1]));
    out.step = horizontal_max(_mm256_max_ps(top[0], top[1])) / 127.0f;
}

static inline void fold(const parameters &p, const float *x, folded &out) {
    if (!(out.step > 1e-32f)) { // nothing but centres, also with 0 bits
        memset(out.a, 0, (size_t)(p.n + 31) / 32 * 32);
        out.step = 0.0f;
        return;
    }
    const __m256 inverse = _mm256_set1_ps(1.0f / out.step);
    const auto whole = [&](int i) {
        const __m256 a = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_load_ps(p.scale + i));
        return _mm256_cvtps_epi32(_mm256_mul_ps(a, inverse));
    };
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < p.n; i += 16) {
        const __m256i a0 = whole(i), a1 = whole(i + 8);
        sum = _mm256_add_epi32(sum, _mm256_add_epi32(a0, a1));
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a0, a1), 0xd8);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_store_si128((__m128i *)(out.a + i), bytes);
    }
    if (p.n % 32 != 0) {
        memset(out.a + p.n, 0, 16);
    }
    out.offset -= out.step * p.middle * horizontal_sum(_mm256_cvtepi32_ps(sum));
}

} // namespace
} // namespace xq
