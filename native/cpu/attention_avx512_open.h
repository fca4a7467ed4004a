/* attention_avx512_open.h: what attention over open pages (attention_x86_open.h) needs, for AVX-512. */
#pragma once

#include "attention_pages.h"
#include "vec_avx512.h"
#include "xquant.h"

#include <algorithm>
#include <cstring>

namespace xq {
namespace {

/* Tokens at a time: a vector of p. */
constexpr int open_tokens = 16;

/* Sums of 16 vectors, as one vector: halves of every two are added until one is left. */
XQ_INLINE __m512 sums(const __m512 v[16]) {
    __m512 four[4], two[2];
    XQ_UNROLL for (int i = 0; i < 4; ++i) {
        const __m512 *x = v + 4 * i;
        const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
        const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
        four[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    XQ_UNROLL for (int i = 0; i < 2; ++i) {
        const __m512 a = four[2 * i], b = four[2 * i + 1];
        two[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xdd));
}

/* ---- numbers of open pages, for attention_x86_open.h: n_floats at a time ---- */

using floats = __m512;
constexpr int n_floats = 16;

XQ_INLINE floats half_to_floats(const uint16_t *p /* [16] */) {
    return load_half(p);
}
XQ_INLINE floats bytes_to_floats(const int8_t *p /* [16] */) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
XQ_INLINE floats splat(float x) {
    return _mm512_set1_ps(x);
}
XQ_INLINE floats multiply_add(floats a, floats b, floats c) {
    return _mm512_fmadd_ps(a, b, c);
}
XQ_INLINE void store(float *p, floats x) {
    _mm512_store_ps(p, x);
}

/* scores[row][t0 .. t0 + n_k - 1] of R rows against n_k keys, a multiple of 16. */
template <int R>
inline void dot_rows(int d, const float *const *q, const float *k, int t0, int n_k, float *const *scores) {
    constexpr int K = 16 / R; // keys at a time: 16 accumulators
    for (int t = 0; t < n_k; t += K) {
        __m512 acc[16];
        XQ_UNROLL for (int i = 0; i < 16; ++i) {
            acc[i] = _mm512_setzero_ps();
        }
        for (int i = 0; i < d; i += 16) {
            __m512 x[R];
            XQ_UNROLL for (int r = 0; r < R; ++r) {
                x[r] = _mm512_loadu_ps(q[r] + i);
            }
            XQ_UNROLL for (int c = 0; c < K; ++c) {
                const __m512 key = _mm512_load_ps(k + (t + c) * d + i);
                XQ_UNROLL for (int r = 0; r < R; ++r) {
                    acc[r * K + c] = _mm512_fmadd_ps(x[r], key, acc[r * K + c]);
                }
            }
        }
        alignas(64) float out[16];
        _mm512_store_ps(out, sums(acc));
        for (int r = 0; r < R; ++r) {
            memcpy(scores[r] + t0 + t, out + r * K, K * sizeof(float));
        }
    }
}

/* out[row][j .. j + 16 C - 1] += sum of p[row][t] v[t][j] for R rows and n_v values. */
template <int R, int C>
inline void add_columns(int e, const float *const *p, const float *v, int t0, int n_v, float *const *out, int j) {
    __m512 acc[R][C];
    XQ_UNROLL for (int r = 0; r < R; ++r) {
        XQ_UNROLL for (int c = 0; c < C; ++c) {
            acc[r][c] = _mm512_loadu_ps(out[r] + j + 16 * c);
        }
    }
    for (int t = 0; t < n_v; ++t) {
        __m512 value[C];
        XQ_UNROLL for (int c = 0; c < C; ++c) {
            value[c] = _mm512_load_ps(v + t * e + j + 16 * c);
        }
        XQ_UNROLL for (int r = 0; r < R; ++r) {
            const __m512 x = _mm512_set1_ps(p[r][t0 + t]);
            XQ_UNROLL for (int c = 0; c < C; ++c) {
                acc[r][c] = _mm512_fmadd_ps(x, value[c], acc[r][c]);
            }
        }
    }
    XQ_UNROLL for (int r = 0; r < R; ++r) {
        XQ_UNROLL for (int c = 0; c < C; ++c) {
            _mm512_storeu_ps(out[r] + j + 16 * c, acc[r][c]);
        }
    }
}

template <int R>
inline void add_rows(int e, const float *const *p, const float *v, int t0, int n_v, float *const *out) {
    int j = 0;
    for (; j + 64 <= e; j += 64) {
        add_columns<R, 4>(e, p, v, t0, n_v, out, j);
    }
    for (; j < e; j += 16) {
        add_columns<R, 1>(e, p, v, t0, n_v, out, j);
    }
}

/* Which of the tokens from t0 on any of n rows sees, a bit each. */
inline uint32_t seen_tokens(int n, const float *const *p, int t0) {
    __mmask16 seen = 0;
    for (int row = 0; row < n; ++row) {
        seen |= _mm512_cmp_ps_mask(_mm512_load_ps(p[row] + t0), _mm512_setzero_ps(), _CMP_NEQ_UQ);
    }
    return seen;
}

#include "attention_x86_open.h"

} // namespace
} // namespace xq
