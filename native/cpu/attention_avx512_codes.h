/* attention_avx512_codes.h: y[j] += sum_i x_i (zero_i + scale_i c[i][j]) over packed codes for several rows x, with
 * AVX-512 and VNNI.  What is rounded, and why codes are centred, is said in attention_parameters.h.
 *
 * A unit of 64 bytes is 16 columns j by 32 / B rows i (xquant.h), one register: the 4-byte word of column j holds four
 * consecutive rows, the next four rows lie in the next higher bits.  vpdpbusd multiplies the four codes of each of 16
 * columns with four a_i and adds them in 32 bits.  Sums of up to 8 rows and 2 blocks of columns stay in registers.
 */
#pragma once

#include "attention_parameters.h"
#include "codec_format.h"
#include "vec_avx2.h"
#include "vec_avx512.h"

#include <cstring>
#include <immintrin.h>

namespace xq {
namespace {

constexpr int max_vectors = 8; // rows that share one pass over the codes

/* ---- folding ---- */

struct vector {
    using type = __m512;
    static constexpr int lanes = 16;

    static type load_half(const uint8_t *p) { return xq::load_half(p); }
    static type add_product(type z, type s, float x) { return _mm512_fmadd_ps(s, _mm512_set1_ps(x), z); }
    static void store(float *p, type x) { _mm512_store_ps(p, x); }
    static XQ_INLINE void prefetch(const void *p) { xq::prefetch(p); }

    /* 2^((e - 161) / 8), and q / 8 times that. */
    static void load_log8(const uint8_t *e, const uint8_t *q, type &s, type &c) {
        const __m512i k =
            _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)e)), _mm512_set1_epi32(161));
        const __m512 steps = _mm512_castps256_ps512(_mm256_loadu_ps(log8_steps));
        const __m512 fraction = _mm512_permutexvar_ps(_mm512_and_si512(k, _mm512_set1_epi32(7)), steps);
        const __m512i exponent = _mm512_slli_epi32(_mm512_srai_epi32(k, 3), 23);
        s = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(fraction), exponent));
        const __m512 eighths = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)q)));
        c = _mm512_mul_ps(eighths, _mm512_mul_ps(s, _mm512_set1_ps(0.125f)));
    }
};

using parameters = parameters_of<vector>;

/* One row to multiply codes with: y[j] = step * sum_i a[i] c[i][j] + offset. */
struct folded {
    alignas(64) int8_t a[max_i]; /* zeros from n to a multiple of 64 */
    float step, offset;
};

/* Folds the scales into x [n]: the largest a of a row and its constant; then, so that rows do not wait for each other,
 * the numbers themselves. */
XQ_INLINE void fold_range(const parameters &p, const float *x, folded &out) {
    constexpr int larger_absolute = 0xb; // of vrangeps
    __m512 constant = _mm512_setzero_ps(), top = _mm512_setzero_ps();
    for (int i = 0; i < p.n; i += 16) {
        const __m512 v = _mm512_loadu_ps(x + i);
        constant = _mm512_fmadd_ps(v, _mm512_load_ps(p.centre + i), constant);
        top = _mm512_range_ps(top, _mm512_mul_ps(v, _mm512_load_ps(p.scale + i)), larger_absolute);
    }
    out.offset = _mm512_reduce_add_ps(constant);
    out.step = _mm512_reduce_max_ps(top) / 127.0f;
}

XQ_INLINE void fold(const parameters &p, const float *x, folded &out) {
    if (!(out.step > 1e-32f)) { // nothing but centres, also with 0 bits
        memset(out.a, 0, (size_t)(p.n + 63) / 64 * 64);
        out.step = 0.0f;
        return;
    }
    const __m512 inverse = _mm512_set1_ps(1.0f / out.step);
    __m512i sum = _mm512_setzero_si512(); // of the wider numbers: the bytes are still on their way to memory
    for (int i = 0; i < p.n; i += 16) {
        const __m512 a = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_load_ps(p.scale + i));
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
        _mm_store_si128((__m128i *)(out.a + i), _mm512_cvtsepi32_epi8(whole));
        sum = _mm512_add_epi32(sum, whole);
    }
    for (int i = p.n; i % 64 != 0; i += 16) {
        _mm_store_si128((__m128i *)(out.a + i), _mm_setzero_si128());
    }
    out.offset -= out.step * p.middle * (float)_mm512_reduce_add_epi32(sum);
}

/* ---- codes ---- */

/* Unit u of a block of 16 columns with B-bit codes. */
template <int B> struct unit {
    static constexpr int groups = B == 3 ? 4 : 8 / B, rows = 4 * groups;
    __m512i low, high; /* high: the third bit of 3-bit codes, in the low half of each byte */

    XQ_INLINE unit(const uint8_t *block, int u, int units) {
        low = _mm512_loadu_si512(block + 64 * u);
        if (B == 3) { // two units share the 64 bytes of high bits
            high = _mm512_srl_epi16(_mm512_loadu_si512(block + 64 * (units + u / 2)), _mm_cvtsi32_si128(u % 2 * 4));
        }
    }
    /* Codes of rows 4 g to 4 g + 3. */
    XQ_INLINE __m512i group(int g) const {
        const __m512i low_bits = _mm512_set1_epi8(B == 3 ? 3 : (1 << B) - 1);
        const __m512i c = _mm512_and_si512(_mm512_srli_epi16(low, (unsigned)((B == 3 ? 2 : B) * g)), low_bits);
        if (B != 3) {
            return c;
        }
        const __m512i third =
            g < 2 ? _mm512_slli_epi16(high, (unsigned)(2 - g)) : _mm512_srli_epi16(high, (unsigned)(g - 2));
        return _mm512_ternarylogic_epi32(c, third, _mm512_set1_epi8(4), 0xf8); // c | third & 4
    }
};

/* B bits, R rows, C blocks of 16 columns. */
template <int B, int R, int C>
XQ_INLINE void multiply_columns(int units, int64_t column, const uint8_t *codes, lookahead &ahead, const folded *f,
                                float *const *y, int j, bool overwrite) {
    __m512i sum[R][C];
    XQ_UNROLL for (int r = 0; r < R; ++r) {
        XQ_UNROLL for (int c = 0; c < C; ++c) {
            sum[r][c] = _mm512_setzero_si512();
        }
    }
    for (int u = 0; u < units; ++u) {
        const unit<B> first(codes, u, units), second(codes + (C - 1) * column, u, units);
        ahead.lines(C);
        const int i = u * unit<B>::rows;
        XQ_UNROLL for (int g = 0; g < unit<B>::groups; ++g) {
            const __m512i left = first.group(g), right = second.group(g);
            XQ_UNROLL for (int r = 0; r < R; ++r) {
                int32_t four;
                memcpy(&four, f[r].a + i + 4 * g, 4);
                const __m512i a = _mm512_set1_epi32(four);
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], left, a);
                if (C == 2) {
                    sum[r][C - 1] = _mm512_dpbusd_epi32(sum[r][C - 1], right, a);
                }
            }
        }
    }
    XQ_UNROLL for (int r = 0; r < R; ++r) {
        XQ_UNROLL for (int c = 0; c < C; ++c) {
            float *at = y[r] + j + 16 * c;
            const __m512 value =
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][c]), _mm512_set1_ps(f[r].step), _mm512_set1_ps(f[r].offset));
            _mm512_storeu_ps(at, overwrite ? value : _mm512_add_ps(value, _mm512_loadu_ps(at)));
        }
    }
}

/* B bits, R rows f [R]: n_j columns from j on of y[r]. */
template <int B, int R>
void multiply_vectors(int n_i, int n_j, const uint8_t *codes, lookahead ahead, const folded *f, float *const *y, int j,
                      bool overwrite) {
    const int units = (n_i + unit<B>::rows - 1) / unit<B>::rows, end = j + n_j;
    const int64_t column = column_bytes(B, n_i);
    for (; j + 32 <= end; j += 32, codes += 2 * column) {
        multiply_columns<B, R, 2>(units, column, codes, ahead, f, y, j, overwrite);
    }
    if (j < end) {
        multiply_columns<B, R, 1>(units, column, codes, ahead, f, y, j, overwrite);
    }
}

using multiply_function = decltype(&multiply_vectors<1, 1>);

template <int B> multiply_function multiply_for(int n_vectors) {
    static constexpr multiply_function by_vectors[max_vectors] = {
        multiply_vectors<B, 1>, multiply_vectors<B, 2>, multiply_vectors<B, 3>, multiply_vectors<B, 4>,
        multiply_vectors<B, 5>, multiply_vectors<B, 6>, multiply_vectors<B, 7>, multiply_vectors<B, 8>};
    return by_vectors[n_vectors - 1];
}

/* y[row][j] (+)= sum_i x[row][i] (zero_i + scale_i c[i][j]) for n rows and n_j columns, j from j0.  bits 0: no codes.
 * The same codes of the next page lie `ahead` bytes on. */
inline void multiply(int bits, const parameters &p, int n_j, const uint8_t *codes, int64_t ahead, int n,
                     const float *const *x, int j0, float *const *y, bool overwrite) {
    folded f[max_vectors];
    lookahead next = {codes + ahead, codes + ahead + n_j / 16 * column_bytes(bits, p.n)};
    const int passes = (n + max_vectors - 1) / max_vectors;
    for (int pass = 0, row = 0, n_vectors; pass < passes; ++pass, row += n_vectors) {
        n_vectors = (n - row + passes - pass - 1) / (passes - pass); // nine rows are 5 + 4, not 8 + 1
        for (int r = 0; r < n_vectors; ++r) {
            fold_range(p, x[row + r], f[r]);
        }
        for (int r = 0; r < n_vectors; ++r) {
            fold(p, x[row + r], f[r]);
        }
        const multiply_function function = bits <= 1   ? multiply_for<1>(n_vectors)
                                           : bits == 2 ? multiply_for<2>(n_vectors)
                                           : bits == 3 ? multiply_for<3>(n_vectors)
                                                       : multiply_for<4>(n_vectors);
        // 0 bits: the offsets alone
        function(bits == 0 ? 0 : p.n, n_j, codes, next, f, y + row, j0, overwrite);
        next.at = next.end;
    }
}

} // namespace
} // namespace xq
