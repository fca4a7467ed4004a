/* attention_avx2.cpp: attention for AVX2, FMA and F16C.  See attention_pages.h for the equations.
 *
 * Open pages: exact in single precision.  A few tokens at a time are converted to F32 on the stack, for all rows.
 *
 * Sealed pages: a[i] = q_i s_i (or p_i s_i) is rounded to 8 bits with one scale a row and group, and multiplied with
 * the unsigned codes (vpmaddubsw), several products in 16 bits before they are widened.  What this rounding costs is
 * measured in tests/test_attention.py; the codes are centred first, which keeps it small:
 *
 *     sum_i a_i c_ij = step * (sum_i a8_i c_ij - middle * sum_i a8_i) + middle * sum_i a_i
 */
#include "attention_avx2_codes.h"
#include "attention_pages.h"

namespace xq {

namespace avx2_attention {

/* ---- open pages ---- */

/* Sums of eight vectors, as one vector. */
static inline __m256 sums(const __m256 v[8]) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

static inline void to_float(const uint16_t *half, int n /* multiple of 8 */, float *out) {
    for (int i = 0; i < n; i += 8) {
        _mm256_store_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + i))));
    }
}

/* scores[row][t0 .. t0 + n_k - 1] of R rows against n_k keys, a multiple of 8 / R rounded up to pairs. */
template <int R>
static inline void dot_rows(int d, const float *const *q, const float *k, int t0, int n_k, float *const *scores) {
    constexpr int K = 8 / R; // keys at a time: 8 accumulators
    for (int t = 0; t < n_k; t += K) {
        __m256 acc[8];
        for (auto &x : acc) {
            x = _mm256_setzero_ps();
        }
        for (int i = 0; i < d; i += 8) {
            __m256 key[K];
            for (int c = 0; c < K; ++c) {
                key[c] = _mm256_load_ps(k + (t + c) * d + i);
            }
            for (int r = 0; r < R; ++r) {
                const __m256 x = _mm256_loadu_ps(q[r] + i);
                for (int c = 0; c < K; ++c) {
                    acc[r * K + c] = _mm256_fmadd_ps(x, key[c], acc[r * K + c]);
                }
            }
        }
        alignas(32) float out[8];
        _mm256_store_ps(out, sums(acc));
        for (int r = 0; r < R; ++r) {
            memcpy(scores[r] + t0 + t, out + r * K, K * sizeof(float));
        }
    }
}

/* out[row][j] += sum of p[row][t] v[t][j] for R rows and n_v values. */
template <int R>
static inline void add_rows(int e, const float *const *p, const float *v, int t0, int n_v, float *const *out) {
    for (int j = 0; j < e; j += 16) {
        __m256 acc[R][2];
        for (int r = 0; r < R; ++r) {
            acc[r][0] = _mm256_loadu_ps(out[r] + j);
            acc[r][1] = _mm256_loadu_ps(out[r] + j + 8);
        }
        for (int t = 0; t < n_v; ++t) {
            const __m256 a = _mm256_load_ps(v + t * e + j), b = _mm256_load_ps(v + t * e + j + 8);
            for (int r = 0; r < R; ++r) {
                const __m256 x = _mm256_broadcast_ss(p[r] + t0 + t);
                acc[r][0] = _mm256_fmadd_ps(x, a, acc[r][0]);
                acc[r][1] = _mm256_fmadd_ps(x, b, acc[r][1]);
            }
        }
        for (int r = 0; r < R; ++r) {
            _mm256_storeu_ps(out[r] + j, acc[r][0]);
            _mm256_storeu_ps(out[r] + j + 8, acc[r][1]);
        }
    }
}

/* Calls f<R>(first row) over n rows, four at a time while there are four. */
template <typename F> static inline void by_rows(int n, const F &f) {
    int row = 0;
    for (; row + 4 <= n; row += 4) {
        f(std::integral_constant<int, 4>(), row);
    }
    if (n - row >= 2) {
        f(std::integral_constant<int, 2>(), row);
        row += 2;
    }
    if (n - row >= 1) {
        f(std::integral_constant<int, 1>(), row);
    }
}

struct avx2_set {
    static void open_scores(int d, int n, const float *const *q, const uint16_t *k, float *const *scores) {
        constexpr int tokens = 16;
        alignas(32) float keys[tokens * XQ_MAX_HEAD_DIM];
        for (int t0 = 0; t0 < XQ_PAGE; t0 += tokens) {
            to_float(k + t0 * d, tokens * d, keys);
            by_rows(n, [&](auto rows, int row) { dot_rows<rows>(d, q + row, keys, t0, tokens, scores + row); });
        }
    }

    static void open_values(int e, int n, const float *const *p, const uint16_t *v, float *const *out) {
        constexpr int tokens = 16;
        alignas(32) float values[tokens * XQ_MAX_HEAD_DIM];
        for (int t0 = 0; t0 < XQ_PAGE; t0 += tokens) {
            // tokens that no row sees may hold anything: 0 times a not-a-number must not happen
            __m256 seen[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
            for (int row = 0; row < n; ++row) {
                seen[0] = _mm256_or_ps(seen[0], _mm256_load_ps(p[row] + t0));
                seen[1] = _mm256_or_ps(seen[1], _mm256_load_ps(p[row] + t0 + 8));
            }
            const __m256 zero = _mm256_setzero_ps();
            const int none = _mm256_movemask_ps(_mm256_cmp_ps(seen[0], zero, _CMP_EQ_OQ)) |
                             _mm256_movemask_ps(_mm256_cmp_ps(seen[1], zero, _CMP_EQ_OQ)) << 8;
            if (none == 0xffff) {
                continue;
            }
            to_float(v + t0 * e, tokens * e, values);
            for (int t = 0; t < tokens; ++t) {
                if (none >> t & 1) {
                    std::fill(values + t * e, values + (t + 1) * e, 0.0f);
                }
            }
            by_rows(n, [&](auto rows, int row) { add_rows<rows>(e, p + row, values, t0, tokens, out + row); });
        }
    }

    static void sealed_scores(const xq_attention &a, int page, int n, const float *const *q, float *const *scores) {
        const uint8_t *param = a.k_param + page * a.k_param_stride, *codes = a.k_codes + page * a.k_codes_stride;
        const int64_t column = column_bytes(a.k_code_bits, a.d);
        for (int t0 = 0; t0 < XQ_PAGE; t0 += a.k.group, param += group_param_bytes(a.k, a.d)) {
            multiply(a.k.bits, parameters(a.k, a.d, param), a.k.group, codes + t0 / 16 * column, n, q, t0, scores,
                     true);
        }
    }

    static void sealed_values(const xq_attention &a, int page, int n, const float *const *p, float *const *out) {
        const uint8_t *param = a.v_param + page * a.v_param_stride, *codes = a.v_codes + page * a.v_codes_stride;
        const int group = group_length(a.v, a.e);
        const int64_t column = column_bytes(a.v_code_bits, XQ_PAGE);
        for (int j0 = 0; j0 < a.e; j0 += group, param += group_param_bytes(a.v, XQ_PAGE)) {
            multiply(a.v.bits, parameters(a.v, XQ_PAGE, param), group, codes + j0 / 16 * column, n, p, j0, out, false);
        }
    }

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
        __m256 total = _mm256_setzero_ps();
        for (int t = 0; t < XQ_PAGE; t += 8) {
            const __m256 p = exp_non_positive(_mm256_sub_ps(_mm256_load_ps(s + t), _mm256_set1_ps(highest)));
            _mm256_store_ps(s + t, p);
            total = _mm256_add_ps(total, p);
        }
        *sum = (highest > *max ? *sum * std::exp(*max - highest) : *sum) + horizontal_sum(total);
        *max = highest;
        return true;
    }
};

} // namespace avx2_attention

void attend_avx2(const xq_attention &args) {
    attend<avx2_attention::avx2_set>(args);
}

} // namespace xq
