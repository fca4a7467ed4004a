/* attention_avx512.cpp: attention for AVX-512 (F, BW, DQ, VL) with VNNI.  See attention_pages.h for the equations and
 * attention_avx512_codes.h for the product with codes.
 */
#include "attention_avx512_latent.h"
#include "attention_avx512_open.h"
#include "attention_pages.h"

namespace xq {

namespace {

#include "attention_sealed.h"

struct avx512_set : open_pages, sealed_pages, latent_pages {
    static bool softmax(float *s, float scale, float softcap, const uint16_t *mask, float slope, float *max,
                        float *sum) {
        constexpr int n = XQ_PAGE / 16;
        constexpr float log2_e = 1.44269504f;
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
            const __m512 p =
                exp2_non_positive(_mm512_fmsub_ps(x[i], _mm512_set1_ps(log2_e), _mm512_set1_ps(highest * log2_e)));
            _mm512_store_ps(s + 16 * i, p);
            total = _mm512_add_ps(total, p);
        }
        *sum = (highest > *max ? *sum * expf(*max - highest) : *sum) + _mm512_reduce_add_ps(total);
        *max = highest;
        return true;
    }

  private:
    /* x = softcap tanh(x / softcap), tanh(y) = sign(y) (1 - u) / (1 + u) with u = exp(-2 |y|), -2 log2(e) = -2.885 */
    static void cap(__m512 x[XQ_PAGE / 16], float softcap) {
        const __m512 one = _mm512_set1_ps(1.0f), sign = _mm512_set1_ps(-0.0f);
        for (int i = 0; i < XQ_PAGE / 16; ++i) {
            const __m512 y = _mm512_div_ps(x[i], _mm512_set1_ps(softcap));
            const __m512 u = exp2_non_positive(_mm512_mul_ps(_mm512_set1_ps(-2.88539008f), _mm512_abs_ps(y)));
            const __m512 size = _mm512_div_ps(_mm512_sub_ps(one, u), _mm512_add_ps(one, u));
            x[i] = _mm512_mul_ps(_mm512_set1_ps(softcap), _mm512_or_ps(size, _mm512_and_ps(sign, y)));
        }
    }
};

} // namespace

void attend_avx512(const attention &args) {
    attend<avx512_set>(args);
}

} // namespace xq
