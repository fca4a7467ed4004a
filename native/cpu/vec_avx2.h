/* vec_avx2.h: exp, tanh and sums of AVX2 vectors; what x86 kernels share. */
#pragma once

#include "inline.h"

#include <cstdint>
#include <immintrin.h>

namespace xq {
namespace {

/* Into the second cache: a page and the work on it fill the first.  Always in line: gcc takes a call of a function that
 * only prefetches for one without effect, and drops it. */
static XQ_INLINE void prefetch(const void *p) {
    _mm_prefetch((const char *)p, _MM_HINT_T1);
}

/* Memory that will be read soon, fetched a few lines at a time between other work: in one go it would only wait. */
struct lookahead {
    const uint8_t *at, *end;

    XQ_INLINE void lines(int n) {
        for (int i = 0; i < n && at < end; ++i, at += 64) {
            prefetch(at);
        }
    }
};

static inline float horizontal_sum(__m256 x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline float horizontal_max(__m256 x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

/* exp(x) for x <= 0, relative error below 3e-7 (2e-7 and what x * log2(e) is rounded by); 0 below -87 (and for
 * -infinity).  2^n 2^r with |r| <= 1/2, the second factor by a polynomial of degree 5 with the least largest relative
 * error. */
static inline __m256 exp_non_positive(__m256 x) {
    const __m256 t = _mm256_mul_ps(x, _mm256_set1_ps(1.44269504f));
    const __m256 n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 r = _mm256_sub_ps(t, n);
    constexpr float polynomial[] = {0.00967554096f, 0.0555071309f, 0.240221202f, 0.693146944f, 1.0f};
    __m256 y = _mm256_set1_ps(0.00132764725f);
    for (const float c : polynomial) {
        y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c));
    }
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
    return _mm256_and_ps(y, _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_GE_OQ));
}

/* tanh(x) = sign(x) (1 - u) / (1 + u) with u = exp(-2 |x|) */
static inline __m256 tanh(__m256 x) {
    const __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    const __m256 u = exp_non_positive(_mm256_mul_ps(_mm256_set1_ps(-2.0f), _mm256_andnot_ps(sign, x)));
    const __m256 y = _mm256_div_ps(_mm256_sub_ps(one, u), _mm256_add_ps(one, u));
    return _mm256_or_ps(y, _mm256_and_ps(sign, x));
}

} // namespace
} // namespace xq
