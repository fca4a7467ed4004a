/* attention_avx2_open.h: what attention over open pages (attention_x86_open.h) needs, for AVX2 with FMA and F16C.
 *
 * Everything has internal linkage: files that are compiled for different instructions share nothing.
 */
#pragma once

#include "attention_pages.h"
#include "vec_avx2.h"
#include "xquant.h"

#include <algorithm>
#include <cstring>

namespace xq {
namespace {

/* Tokens at a time: two vectors of p. */
constexpr int open_tokens = 16;

/* Sums of eight vectors, as one vector. */
inline __m256 sums(const __m256 v[8]) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

/* ---- numbers of open pages, for attention_x86_open.h: n_floats at a time ---- */

using floats = __m256;
constexpr int n_floats = 8;

inline floats half_to_floats(const uint16_t *p /* [8] */) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
inline floats bytes_to_floats(const int8_t *p /* [8] */) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
inline floats splat(float x) {
    return _mm256_set1_ps(x);
}
inline floats multiply_add(floats a, floats b, floats c) {
    return _mm256_fmadd_ps(a, b, c);
}
inline void store(float *p, floats x) {
    _mm256_store_ps(p, x);
}

/* scores[row][t0 .. t0 + n_k - 1] of R rows against n_k keys, a multiple of 8 / R rounded up to pairs. */
template <int R>
inline void dot_rows(int d, const float *const *q, const float *k, int t0, int n_k, float *const *scores) {
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
inline void add_rows(int e, const float *const *p, const float *v, int t0, int n_v, float *const *out) {
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

/* Which of the tokens from t0 on any of n rows sees, a bit each. */
inline uint32_t seen_tokens(int n, const float *const *p, int t0) {
    const __m256 zero = _mm256_setzero_ps();
    __m256 seen[2] = {zero, zero};
    for (int row = 0; row < n; ++row) {
        seen[0] = _mm256_or_ps(seen[0], _mm256_load_ps(p[row] + t0));
        seen[1] = _mm256_or_ps(seen[1], _mm256_load_ps(p[row] + t0 + 8));
    }
    return (uint32_t)(_mm256_movemask_ps(_mm256_cmp_ps(seen[0], zero, _CMP_NEQ_UQ)) |
                      _mm256_movemask_ps(_mm256_cmp_ps(seen[1], zero, _CMP_NEQ_UQ)) << 8);
}

#include "attention_x86_open.h"

} // namespace
} // namespace xq
