/* vec_avx512.h: exp and loads of AVX-512 vectors. */
#pragma once

#include "inline.h"

#include <cstdint>
#include <immintrin.h>

#define XQ_UNROLL _Pragma("GCC unroll 16")

namespace xq {
namespace {

XQ_INLINE __m512 load_half(const void *p /* F16 [16] */) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

/* 2^x for x <= 0, relative error below 3e-7; 0 below -126 (and for -infinity).  2^n 2^r with 0 <= r < 1, the second
 * factor by a polynomial of degree 5 with the least largest relative error. */
XQ_INLINE __m512 exp2_non_positive(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 y = _mm512_set1_ps(0.0018775768f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.00898934f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.055826318f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.24015361f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.6931531f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.99999994f));
    const __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
    return _mm512_maskz_scalef_ps(seen, y, x);
}

} // namespace
} // namespace xq
