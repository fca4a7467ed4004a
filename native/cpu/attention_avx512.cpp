/* attention_avx512.cpp: attention for AVX-512 (F, BW, DQ, VL) with VNNI.  See attention_pages.h for the equations and
 * attention_avx512_codes.h for the product with codes.  Open pages are those of the AVX2 set.
 */
#include "attention_avx2_open.h"
#include "attention_avx512_codes.h"
#include "attention_pages.h"

namespace xq {

namespace {

/* exp(x) for x <= 0, relative error below 3e-7; 0 below -87 (and for -infinity).  2^n 2^r with |r| <= 1/2, the second
 * factor by a polynomial of degree 5 with the least largest relative error. */
XQ_INLINE __m512 exp_non_positive(__m512 x) {
    const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(t, n);
    __m512 y = _mm512_set1_ps(0.00132764725f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.00967554096f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.0555071309f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.240221202f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.693146944f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    const __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
    return _mm512_maskz_scalef_ps(seen, y, n);
}

#include "attention_x86_sealed.h"

struct avx512_set : avx2_open_pages, sealed_pages {
    static bool softmax(float *s, float scale, float softcap, const uint16_t *mask, float slope, float *max,
                        float *sum) {
        constexpr int n = XQ_PAGE / 16;
        const __m512 infinite = _mm512_set1_ps(-INFINITY);
        __m512 x[n], top = _mm512_set1_ps(*max);
        XQ_UNROLL for (int i = 0; i < n; ++i) {
            x[i] = _mm512_mul_ps(_mm512_load_ps(s + 16 * i), _mm512_set1_ps(scale));
        }
        if (softcap > 0.0f) {
            cap(x, softcap);
        }
        if (mask) {
            XQ_UNROLL for (int i = 0; i < n; ++i) {
                const __m512 m = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(mask + 16 * i)));
                const __mmask16 seen = _mm512_cmp_ps_mask(m, infinite, _CMP_NEQ_UQ);
                x[i] = _mm512_mask_mov_ps(infinite, seen, _mm512_fmadd_ps(m, _mm512_set1_ps(slope), x[i]));
            }
        }
        XQ_UNROLL for (int i = 0; i < n; ++i) {
            top = _mm512_max_ps(x[i], top);
        }
        const float highest = _mm512_reduce_max_ps(top);
        if (highest == -INFINITY) {
            return false;
        }
        __m512 total = _mm512_setzero_ps();
        XQ_UNROLL for (int i = 0; i < n; ++i) {
            const __m512 p = exp_non_positive(_mm512_sub_ps(x[i], _mm512_set1_ps(highest)));
            _mm512_store_ps(s + 16 * i, p);
            total = _mm512_add_ps(total, p);
        }
        *sum = (highest > *max ? *sum * std::exp(*max - highest) : *sum) + _mm512_reduce_add_ps(total);
        *max = highest;
        return true;
    }

  private:
    /* x = softcap tanh(x / softcap), tanh(y) = sign(y) (1 - u) / (1 + u) with u = exp(-2 |y|) */
    static void cap(__m512 x[XQ_PAGE / 16], float softcap) {
        const __m512 one = _mm512_set1_ps(1.0f), sign = _mm512_set1_ps(-0.0f);
        for (int i = 0; i < XQ_PAGE / 16; ++i) {
            const __m512 y = _mm512_div_ps(x[i], _mm512_set1_ps(softcap));
            const __m512 u = exp_non_positive(_mm512_mul_ps(_mm512_set1_ps(-2.0f), _mm512_abs_ps(y)));
            const __m512 size = _mm512_div_ps(_mm512_sub_ps(one, u), _mm512_add_ps(one, u));
            x[i] = _mm512_mul_ps(_mm512_set1_ps(softcap), _mm512_or_ps(size, _mm512_and_ps(sign, y)));
        }
    }
};

} // namespace

void attend_avx512(const xq_attention &args) {
    attend<avx512_set>(args);
}

} // namespace xq
