/* attention_avx2_codes.h: y[j] += sum_i a[i] c[i][j] over packed codes for several vectors a of 8 bits.
 *
 * Codes are units of 64 bytes, 16 columns j by 32 / B rows i (xquant.h): the 4-byte word of column j holds four
 * consecutive rows, the next four rows lie in the next higher bits.  One load serves all vectors and, shifted and
 * masked, 8 / B groups of four rows i.  How they are multiplied with a: attention_avx2_fold.h.
 */
#pragma once

#include "attention_avx2_fold.h"
#include "codec_format.h"

#include <utility>

namespace xq {
namespace {

/* Vectors a that share one pass over the codes: what the registers hold. */
constexpr int max_vectors = 6;

/* Unit u of a column block with B-bit codes: groups of four rows, one at a time. */
template <int B> struct unit {
    static constexpr int groups = B == 3 ? 4 : 8 / B, rows = 4 * groups;
    __m256i low[2], high[2]; /* 8 columns each; high: the third bit of 3-bit codes, in the low half of each byte */

    XQ_INLINE unit(const uint8_t *block, int u, int units) {
        for (int h = 0; h < 2; ++h) {
            low[h] = _mm256_loadu_si256((const __m256i *)(block + 64 * u + 32 * h));
            if (B == 3) { // two units share the 64 bytes of high bits
                const uint8_t *bits = block + 64 * (units + u / 2) + 32 * h;
                high[h] = _mm256_srl_epi16(_mm256_loadu_si256((const __m256i *)bits), _mm_cvtsi32_si128(u % 2 * 4));
            }
        }
    }

    template <int G> XQ_INLINE __m256i group(int h) const {
        const __m256i low_bits = _mm256_set1_epi8(B == 3 ? 3 : (1 << B) - 1);
        const __m256i c = _mm256_and_si256(_mm256_srli_epi16(low[h], (B == 3 ? 2 : B) * G), low_bits);
        if (B != 3) {
            return c;
        }
        const __m256i third = G < 2 ? _mm256_slli_epi16(high[h], G < 2 ? 2 - G : 0) : _mm256_srli_epi16(high[h], G - 2);
        return _mm256_or_si256(c, _mm256_and_si256(third, _mm256_set1_epi8(4)));
    }
};

/* Sums of R vectors for 16 columns j, 8 each.  One vector and the rest, not an array and a loop, and in line: so they
 * stay in registers. */
template <int R> struct accumulators {
    __m256i left = _mm256_setzero_si256(), right = _mm256_setzero_si256();
    accumulators<R - 1> rest;

    /* a [R]: four rows from a[r][i] on times the codes of 8 and 8 columns */
    XQ_INLINE void add(const int8_t *const *a, int i, __m256i codes_left, __m256i codes_right) {
        int32_t four;
        memcpy(&four, a[0] + i, 4);
        const __m256i x = _mm256_set1_epi32(four);
        left = add_products(left, codes_left, x);
        right = add_products(right, codes_right, x);
        // one after the other: a compiler that adds up in a tree runs out of registers
        asm volatile("" : "+x"(left), "+x"(right));
        rest.add(a + 1, i, codes_left, codes_right);
    }
    /* total [R][16] += the sums, in 32 bits */
    XQ_INLINE void widen(int32_t *total) const {
        auto *at = (__m256i *)total;
        _mm256_store_si256(at, _mm256_add_epi32(_mm256_load_si256(at), widened(left)));
        _mm256_store_si256(at + 1, _mm256_add_epi32(_mm256_load_si256(at + 1), widened(right)));
        rest.widen(total + 16);
    }
};
template <> struct accumulators<0> {
    void add(const int8_t *const *, int, __m256i, __m256i) {}
    void widen(int32_t *) const {}
};

template <int B, int R, int... G>
XQ_INLINE static void add_unit(accumulators<R> &sums, const unit<B> &u, const int8_t *const *a, int i,
                               std::integer_sequence<int, G...>) {
    (sums.add(a, i + 4 * G, u.template group<G>(0), u.template group<G>(1)), ...);
}

/* B bits, R vectors f [R]: n_j columns into y[r] [n_j]. */
template <int B, int R>
static void multiply_vectors(int n_i, int n_j, const uint8_t *codes, lookahead ahead, const folded *f, float *const *y,
                             bool overwrite) {
    using unit_t = unit<B>;
    constexpr int units_a_flush = products_a_sum(B) / unit_t::groups;
    const int units = (n_i + unit_t::rows - 1) / unit_t::rows;
    const int64_t column = column_bytes(B, n_i);
    const int8_t *a[R];
    for (int r = 0; r < R; ++r) {
        a[r] = f[r].a;
    }
    for (int j = 0; j < n_j; j += 16, codes += column) {
        alignas(32) int32_t total[R * 16] = {};
        for (int u = 0; u < units;) {
            accumulators<R> sums;
            for (const int end = least(u + units_a_flush, units); u < end; ++u) {
                ahead.lines(1);
                add_unit<B>(sums, unit_t(codes, u, units), a, u * unit_t::rows,
                            std::make_integer_sequence<int, unit_t::groups>());
            }
            sums.widen(total);
        }
        for (int r = 0; r < R; ++r) {
            for (int h = 0; h < 2; ++h) {
                float *at = y[r] + j + 8 * h;
                const __m256 sums = _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i *)(total + 16 * r + 8 * h)));
                const __m256 value = _mm256_fmadd_ps(sums, _mm256_set1_ps(f[r].step), _mm256_set1_ps(f[r].offset));
                _mm256_storeu_ps(at, overwrite ? value : _mm256_add_ps(value, _mm256_loadu_ps(at)));
            }
        }
    }
}

using multiply_function = decltype(&multiply_vectors<1, 1>);

template <int B> static multiply_function multiply_for(int n_vectors) {
    static constexpr multiply_function by_vectors[max_vectors] = {multiply_vectors<B, 1>, multiply_vectors<B, 2>,
                                                                  multiply_vectors<B, 3>, multiply_vectors<B, 4>,
                                                                  multiply_vectors<B, 5>, multiply_vectors<B, 6>};
    return by_vectors[n_vectors - 1];
}

/* y[row][j] (+)= sum_i x[row][i] (zero_i + scale_i c[i][j]) for n rows and n_j columns, j from j0.  bits 0: no codes.
 * The same codes of the next page lie `ahead` bytes on. */
static inline void multiply(int bits, const parameters &p, int n_j, const uint8_t *codes, int64_t ahead, int n,
                            const float *const *x, int j0, float *const *y, bool overwrite) {
    folded f[max_vectors];
    float *out[max_vectors];
    lookahead next = {codes + ahead, codes + ahead + n_j / 16 * column_bytes(bits, p.n)};
    const int passes = (n + max_vectors - 1) / max_vectors;
    for (int pass = 0, row = 0, n_vectors; pass < passes; ++pass, row += n_vectors) {
        n_vectors = (n - row + passes - pass - 1) / (passes - pass); // seven rows are 4 + 3, not 6 + 1
        for (int r = 0; r < n_vectors; ++r) {
            fold_range(p, x[row + r], f[r]);
        }
        for (int r = 0; r < n_vectors; ++r) {
            fold(p, x[row + r], f[r]);
            out[r] = y[row + r] + j0;
        }
        const multiply_function function = bits <= 1   ? multiply_for<1>(n_vectors)
                                           : bits == 2 ? multiply_for<2>(n_vectors)
                                           : bits == 3 ? multiply_for<3>(n_vectors)
                                                       : multiply_for<4>(n_vectors);
        // 0 bits: the offsets alone
        function(bits == 0 ? 0 : p.n, n_j, codes, next, f, out, overwrite);
        next.at = next.end;
    }
}

} // namespace
} // namespace xq
