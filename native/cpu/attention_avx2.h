/* attention_avx2.h: attention for AVX2, FMA and F16C.  See attention_pages.h for the equations, attention_x86_open.h
 * for open pages, and attention_avx2_codes.h for the product with codes, whose instruction is what the two files that
 * include this differ in.  What its rounding costs is measured in tests/kernels/test_attend.py.
 */
#pragma once

#include "attention_avx2_latent.h"
#include "attention_avx2_open.h"
#include "attention_pages.h"

namespace xq {

namespace {

#include "attention_sealed.h"

struct avx2_set : open_pages, sealed_pages, latent_pages {
    static bool softmax(float *s, float scale, float softcap, const uint16_t *mask, float slope, float *max,
                        float *sum) {
        const __m256 infinite = _mm256_set1_ps(-INFINITY);
        __m256 top = _mm256_set1_ps(*max);
        for (int t = 0; t < XQ_PAGE; t += 8) {
            __m256 x = _mm256_mul_ps(_mm256_load_ps(s + t), _mm256_set1_ps(scale));
            if (softcap > 0.0f) {
                x = _mm256_mul_ps(_mm256_set1_ps(softcap), tanh(_mm256_div_ps(x, _mm256_set1_ps(softcap))));
            }
            if (mask) {
                const __m256 m = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(mask + t)));
                x = _mm256_blendv_ps(_mm256_fmadd_ps(m, _mm256_set1_ps(slope), x), infinite,
                                     _mm256_cmp_ps(m, infinite, _CMP_EQ_OQ));
            }
            _mm256_store_ps(s + t, x);
            top = _mm256_max_ps(x, top);
        }
        const float highest = horizontal_max(top);
        if (highest == -INFINITY) {
            return false;
        }
        __m256 totals[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int t = 0; t < XQ_PAGE; t += 16) {
            for (int h = 0; h < 2; ++h) {
                const __m256 x = _mm256_load_ps(s + t + 8 * h);
                const __m256 p = exp_non_positive(_mm256_sub_ps(x, _mm256_set1_ps(highest)));
                _mm256_store_ps(s + t + 8 * h, p);
                totals[h] = _mm256_add_ps(totals[h], p);
            }
        }
        const __m256 total = _mm256_add_ps(totals[0], totals[1]);
        *sum = (highest > *max ? *sum * expf(*max - highest) : *sum) + horizontal_sum(total);
        *max = highest;
        return true;
    }
};

} // namespace

} // namespace xq
