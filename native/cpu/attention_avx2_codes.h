/* attention_avx2_codes.h: y[j] += sum_i a[i] c[i][j] over packed codes for several vectors a, with 8-bit a.
 *
 * Codes are units of 64 bytes, 16 columns j by 32 / B rows i (xquant.h): the 4-byte word of column j holds four
 * consecutive rows, the next four rows lie in the next higher bits.  One load serves all rows of the query and, shifted
 * and masked, 8 / B groups of four rows i.
 */
#pragma once

#include "vec_avx2.h"
#include "xquant.h"

#include <algorithm>
#include <cstring>

namespace xq {
namespace avx2_attention {

/* Vectors a that share one pass over the codes. */
constexpr int max_vectors = 4;
/* i is padded to whole units. */
constexpr int max_i = XQ_MAX_HEAD_DIM;

static inline int64_t column_bytes(int bits, int n_i) { // of 16 columns
    const auto units = [n_i](int b) { return (n_i * b + 31) / 32; };
    return bits == 0 ? 0 : 64 * (int64_t)(bits == 3 ? units(2) + units(1) : units(bits));
}

/* What a group of codes is multiplied with: the parameters of n numbers i. */
struct folding {
    const xq_side &side;
    int n;
    const uint8_t *param;
};

/* One folded vector: a_i = x_i scale_i in 8 bits, and what is exact about it. */
struct folded {
    alignas(32) int8_t a[max_i];
    float step;   /* a_i = step * a[i] */
    float offset; /* what every y[j] starts from: sum_i x_i zero_i, and what centring the codes leaves */
};

/* 2^((e - 161) / 8) and centre of 8 numbers in LOG8 form. */
static inline void load_log8(const uint8_t *param, int n, int i, __m256 &scale, __m256 &centre) {
    const __m256i k =
        _mm256_sub_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(param + i))), _mm256_set1_epi32(161));
    const __m256 steps =
        _mm256_setr_ps(1.0f, 1.09050775f, 1.18920708f, 1.29683959f, 1.41421354f, 1.54221082f, 1.68179286f, 1.83400810f);
    const __m256 fraction = _mm256_permutevar8x32_ps(steps, _mm256_and_si256(k, _mm256_set1_epi32(7)));
    const __m256i exponent = _mm256_slli_epi32(_mm256_srai_epi32(k, 3), 23);
    scale = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(fraction), exponent));
    const __m256 q = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(param + n + i))));
    centre = _mm256_mul_ps(q, _mm256_mul_ps(scale, _mm256_set1_ps(0.125f)));
}

/* Folds the scales into x [n]; pads with zeros to padded. */
static inline void fold(const folding &f, const float *x, int padded, folded &out) {
    const float middle = (float)((1 << f.side.bits) - 1) * 0.5f;
    alignas(32) float a[max_i];
    __m256 constant = _mm256_setzero_ps(), top = _mm256_setzero_ps();
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int i = 0; i < f.n; i += 8) {
        const __m256 v = _mm256_loadu_ps(x + i);
        __m256 scale, centre;
        if (f.side.bits == 0) {
            constant =
                _mm256_fmadd_ps(v, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(f.param + 2 * i))), constant);
            continue;
        } else if (f.side.param == XQ_PARAM_F16) {
            scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(f.param + 2 * i)));
            const __m256 zero = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(f.param + 2 * f.n + 2 * i)));
            centre = _mm256_fmadd_ps(scale, _mm256_set1_ps(middle), zero);
        } else {
            load_log8(f.param, f.n, i, scale, centre);
        }
        const __m256 folded_x = _mm256_mul_ps(v, scale);
        constant = _mm256_fmadd_ps(v, centre, constant);
        top = _mm256_max_ps(top, _mm256_andnot_ps(sign, folded_x));
        _mm256_store_ps(a + i, folded_x);
    }
    out.offset = horizontal_sum(constant);
    out.step = 0.0f;
    const float largest = horizontal_max(top);
    if (f.side.bits == 0 || largest == 0.0f) {
        memset(out.a, 0, (size_t)padded);
        return;
    }
    out.step = largest / 127.0f;
    const __m256 inverse = _mm256_set1_ps(127.0f / largest);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < f.n; i += 16) {
        const __m256i u = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(a + i), inverse));
        const __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(a + i + 8), inverse));
        sum = _mm256_add_epi32(sum, _mm256_add_epi32(u, v));
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(u, v), 0xd8);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_store_si128((__m128i *)(out.a + i), bytes);
    }
    if (padded > f.n) {
        memset(out.a + f.n, 0, (size_t)(padded - f.n));
    }
    // centred codes: sum a8 (c - middle) = sum a8 c - middle * sum a8, so that the rounding of a meets small factors
    out.offset -= out.step * middle * horizontal_sum(_mm256_cvtepi32_ps(sum));
}

/* Sums of R rows for 16 columns j: in 16 bits, pairs of rows i side by side, then in 32 bits. */
template <int R> struct accumulators {
    __m256i word[R][2]; /* 8 columns each */
    __m256i total[R][2];

    void clear() {
        for (int r = 0; r < R; ++r) {
            word[r][0] = word[r][1] = total[r][0] = total[r][1] = _mm256_setzero_si256();
        }
    }
    void add(const folded *const *f, int i, __m256i c0, __m256i c1) {
        for (int r = 0; r < R; ++r) {
            int32_t four;
            memcpy(&four, f[r]->a + i, 4);
            const __m256i a = _mm256_set1_epi32(four);
            word[r][0] = _mm256_add_epi16(word[r][0], _mm256_maddubs_epi16(c0, a));
            word[r][1] = _mm256_add_epi16(word[r][1], _mm256_maddubs_epi16(c1, a));
        }
    }
    void widen() {
        const __m256i ones = _mm256_set1_epi16(1);
        for (int r = 0; r < R; ++r) {
            for (int h = 0; h < 2; ++h) {
                total[r][h] = _mm256_add_epi32(total[r][h], _mm256_madd_epi16(word[r][h], ones));
                word[r][h] = _mm256_setzero_si256();
            }
        }
    }
};

template <int R, int B>
static inline void dot_column(int n_i, const uint8_t *block, const folded *const *f, accumulators<R> &acc) {
    constexpr int planes = 8 / B, rows = 4 * planes; // of a unit
    // a product of two pairs is at most 2 * 127 * (2^B - 1): so many units fit into 16 bits
    constexpr int units_a_flush = 32767 / (2 * 127 * ((1 << B) - 1)) / planes;
    const __m256i mask = _mm256_set1_epi8((1 << B) - 1);
    const int units = (n_i + rows - 1) / rows;
    for (int u0 = 0; u0 < units; u0 += units_a_flush) {
        const int u1 = std::min(u0 + units_a_flush, units);
        for (int u = u0; u < u1; ++u) {
            const __m256i x0 = _mm256_loadu_si256((const __m256i *)(block + 64 * u));
            const __m256i x1 = _mm256_loadu_si256((const __m256i *)(block + 64 * u + 32));
            for (int g = 0; g < planes; ++g) {
                acc.add(f, u * rows + 4 * g, _mm256_and_si256(_mm256_srli_epi16(x0, B * g), mask),
                        _mm256_and_si256(_mm256_srli_epi16(x1, B * g), mask));
            }
        }
        acc.widen();
    }
}

/* 3 bits: units of 2 bits, then half as many of the high bit. */
template <int R>
static inline void dot_column_3(int n_i, const uint8_t *block, const folded *const *f, accumulators<R> &acc) {
    constexpr int units_a_flush = 32767 / (2 * 127 * 7) / 4;
    const __m256i two = _mm256_set1_epi8(3), four = _mm256_set1_epi8(4);
    const int units = (n_i + 15) / 16;
    const uint8_t *high = block + 64 * units;
    for (int u0 = 0; u0 < units; u0 += units_a_flush) {
        const int u1 = std::min(u0 + units_a_flush, units);
        for (int u = u0; u < u1; ++u) {
            const __m256i x0 = _mm256_loadu_si256((const __m256i *)(block + 64 * u));
            const __m256i x1 = _mm256_loadu_si256((const __m256i *)(block + 64 * u + 32));
            const int down = u % 2 * 4; // this unit's half of the high bits, moved to bits 2 to 5 below
            const __m256i h0 = _mm256_slli_epi16(
                _mm256_srli_epi16(_mm256_and_si256(_mm256_loadu_si256((const __m256i *)(high + 64 * (u / 2))),
                                                   _mm256_set1_epi8((char)(15 << down))),
                                  down),
                2);
            const __m256i h1 = _mm256_slli_epi16(
                _mm256_srli_epi16(_mm256_and_si256(_mm256_loadu_si256((const __m256i *)(high + 64 * (u / 2) + 32)),
                                                   _mm256_set1_epi8((char)(15 << down))),
                                  down),
                2);
            for (int g = 0; g < 4; ++g) {
                const auto code = [&](__m256i x, __m256i h) {
                    return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(x, 2 * g), two),
                                           _mm256_and_si256(_mm256_srli_epi16(h, g), four));
                };
                acc.add(f, u * 16 + 4 * g, code(x0, h0), code(x1, h1));
            }
        }
        acc.widen();
    }
}

/* y[row][j0 .. j0 + n_j - 1] (+)= sum_i a[row][i] c[i][j] for R rows. */
template <int R>
static inline void multiply_rows(int bits, int n_i, int n_j, const uint8_t *codes, const folded *const *f, int j0,
                                 float *const *y, bool overwrite) {
    const int64_t column = column_bytes(bits, n_i);
    for (int j = 0; j < n_j; j += 16) {
        accumulators<R> acc;
        acc.clear();
        const uint8_t *block = codes + j / 16 * column;
        switch (bits) {
        case 1:
            dot_column<R, 1>(n_i, block, f, acc);
            break;
        case 2:
            dot_column<R, 2>(n_i, block, f, acc);
            break;
        case 3:
            dot_column_3<R>(n_i, block, f, acc);
            break;
        case 4:
            dot_column<R, 4>(n_i, block, f, acc);
            break;
        default: // 0 bits: the parameters alone
            break;
        }
        for (int r = 0; r < R; ++r) {
            for (int h = 0; h < 2; ++h) {
                float *at = y[r] + j0 + j + 8 * h;
                __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc.total[r][h]), _mm256_set1_ps(f[r]->step),
                                               _mm256_set1_ps(f[r]->offset));
                _mm256_storeu_ps(at, overwrite ? value : _mm256_add_ps(value, _mm256_loadu_ps(at)));
            }
        }
    }
}

/* The same for n rows x [n][n_i]: folds, then multiplies, a few rows at a time. */
static inline void multiply(int bits, int n_i, int n_j, const uint8_t *codes, const folding &how, int n,
                            const float *const *x, int j0, float *const *y, bool overwrite) {
    const int padded = (n_i + 31) / 32 * 32;
    const int passes = (n + max_vectors - 1) / max_vectors;
    folded vectors[max_vectors];
    const folded *f[max_vectors] = {vectors, vectors + 1, vectors + 2, vectors + 3};
    for (int pass = 0, row = 0; pass < passes; ++pass) {
        const int count = (n - row + passes - pass - 1) / (passes - pass); // as even as it gets
        for (int r = 0; r < count; ++r) {
            fold(how, x[row + r], padded, vectors[r]);
        }
        switch (count) {
        case 1:
            multiply_rows<1>(bits, n_i, n_j, codes, f, j0, y + row, overwrite);
            break;
        case 2:
            multiply_rows<2>(bits, n_i, n_j, codes, f, j0, y + row, overwrite);
            break;
        case 3:
            multiply_rows<3>(bits, n_i, n_j, codes, f, j0, y + row, overwrite);
            break;
        default:
            multiply_rows<4>(bits, n_i, n_j, codes, f, j0, y + row, overwrite);
            break;
        }
        row += count;
    }
}

} // namespace avx2_attention
} // namespace xq
