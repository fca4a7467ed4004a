/* attention_neon_codes.h: y[j] += sum_i a[i] c[i][j] over packed codes for several vectors a of 8 bits.
 *
 * Codes are units of 64 bytes, 16 columns j by 32 / B rows i (xquant.h): the 4-byte word of column j holds four
 * consecutive rows, the next four rows lie in the next higher bits.  One load, shifted and masked, gives four columns
 * of 8 / B groups of four rows to all vectors.
 */
#pragma once

#include "attention_neon_dot.h"
#include "attention_neon_fold.h"
#include "codec_format.h"

namespace xq {
namespace {

/* Rows of a step, in sixteens: as many as one unit of the narrowest part holds, or two units of four bits.  The last
 * step may read past the rows into the part that follows in the same 16 columns; a is 0 there. */
template <int B> constexpr int sixteens = B == 1 || B == 3 ? 2 : 1;

/* 16 rows (the V-th of a step) of columns 4 k .. 4 k + 3.  1 bit: a code is 0 or -1.  units: of the low bits. */
template <int B, int V> XQ_INLINE codes load_codes(const uint8_t *block, int step, int k, int units) {
    const auto load = [&](int unit) { return vld1q_u8(block + 64 * unit + 16 * k); };
    uint8x16_t c0, c1, c2, c3;
    if constexpr (B == 4) {
        const uint8x16_t a = load(2 * step), b = load(2 * step + 1), m = vdupq_n_u8(15);
        c0 = vandq_u8(a, m), c1 = vshrq_n_u8(a, 4), c2 = vandq_u8(b, m), c3 = vshrq_n_u8(b, 4);
    } else if constexpr (B == 1) {
        const uint8x16_t a = load(step);
        c0 = vtstq_u8(a, vdupq_n_u8(1 << (4 * V))), c1 = vtstq_u8(a, vdupq_n_u8(2 << (4 * V)));
        c2 = vtstq_u8(a, vdupq_n_u8(4 << (4 * V))), c3 = vtstq_u8(a, vdupq_n_u8(8 << (4 * V)));
    } else {
        const uint8x16_t a = load(B == 3 ? 2 * step + V : step), m = vdupq_n_u8(3);
        c0 = vandq_u8(a, m), c1 = vandq_u8(vshrq_n_u8(a, 2), m), c2 = vandq_u8(vshrq_n_u8(a, 4), m);
        c3 = vshrq_n_u8(a, 6);
        if constexpr (B == 3) { // the high bit becomes bit 2
            uint8x16_t high = load(units + step);
            if constexpr (V == 1) {
                high = vshrq_n_u8(high, 4);
            }
            const uint8x16_t third = vdupq_n_u8(4);
            c0 = vbslq_u8(third, vshlq_n_u8(high, 2), c0), c1 = vbslq_u8(third, vshlq_n_u8(high, 1), c1);
            c2 = vbslq_u8(third, high, c2), c3 = vbslq_u8(third, vshrq_n_u8(high, 1), c3);
        }
    }
    return {{vreinterpretq_s8_u8(c0), vreinterpretq_s8_u8(c1), vreinterpretq_s8_u8(c2), vreinterpretq_s8_u8(c3)}};
}

/* The V-th 16 rows of a step into the sums of 16 columns. */
template <int B, int V, int R>
XQ_INLINE void add_rows16(sums<R> &s, const uint8_t *block, int step, int units, const int8_t *const *a) {
    int8x16_t rows[max_vectors];
    for (int r = 0; r < max_vectors; ++r) {
        rows[r] = vld1q_s8(a[r] + 16 * (step * sixteens<B> + V));
    }
    s.add(0, load_codes<B, V>(block, step, 0, units), rows);
    s.add(1, load_codes<B, V>(block, step, 1, units), rows);
    s.add(2, load_codes<B, V>(block, step, 2, units), rows);
    s.add(3, load_codes<B, V>(block, step, 3, units), rows);
}

/* B bits, R vectors f [R]: n_j columns into y[r] [n_j]. */
template <int B, int R>
static void multiply_vectors(int n_i, int n_j, const uint8_t *block, const folded *f, float *const *y, bool overwrite) {
    // each step adds one product a group of four rows to a 16-bit sum
    constexpr int steps_a_settle = sums<R>::products_a_settle / (127 * ((1 << B) - 1)) / (4 * sixteens<B>);
    const int units = (n_i + 15) / 16, steps = (units + sixteens<B> - 1) / sixteens<B>;
    const int64_t column = column_bytes(B, n_i);
    const int8_t *a[max_vectors];
    for (int r = 0; r < max_vectors; ++r) {
        a[r] = f[least(r, R - 1)].a;
    }
    for (int j = 0; j < n_j; j += 16, block += column) {
        sums<R> s;
        for (int step = 0; step < steps;) {
            for (const int end = least(step + least(steps_a_settle, steps), steps); step < end; ++step) {
                add_rows16<B, 0, R>(s, block, step, units, a);
                if constexpr (sixteens<B> == 2) {
                    add_rows16<B, 1, R>(s, block, step, units, a);
                }
            }
            s.settle();
        }
        for (int r = 0; r < R; ++r) {
            const float32x4_t offset = vdupq_n_f32(f[r].offset), scale = vdupq_n_f32(B == 1 ? -f[r].step : f[r].step);
            for (int k = 0; k < 4; ++k) {
                float *at = y[r] + j + 4 * k;
                const float32x4_t value = vfmaq_f32(offset, vcvtq_f32_s32(s.get(r, k)), scale);
                vst1q_f32(at, overwrite ? value : vaddq_f32(value, vld1q_f32(at)));
            }
        }
    }
}

using multiply_function = decltype(&multiply_vectors<1, 1>);

template <int B> static multiply_function multiply_for(int n_vectors) {
    static constexpr multiply_function by_vectors[max_vectors] = {
        multiply_vectors<B, 1>,
        multiply_vectors<B, 2>,
#if defined(XQ_NEON_DOTPROD)
        multiply_vectors<B, 3>,
        multiply_vectors<B, 4>,
#endif
    };
    return by_vectors[n_vectors - 1];
}

/* y[row][j] (+)= sum_i x[row][i] (zero_i + scale_i c[i][j]) for n rows and n_j columns, j from j0.  bits 0: no codes.
 * Where the codes of the next page lie is not looked at: what helps on real CPUs was not measured. */
static inline void multiply(int bits, const parameters &p, int n_j, const uint8_t *block, int64_t, int n,
                            const float *const *x, int j0, float *const *y, bool overwrite) {
    folded f[max_vectors];
    float *out[max_vectors];
    for (int row = 0; row < n; row += max_vectors) {
        const int n_vectors = least(max_vectors, n - row);
        for (int r = 0; r < n_vectors; ++r) {
            fold(p, x[row + r], f[r]);
            out[r] = y[row + r] + j0;
        }
        const multiply_function function = bits <= 1   ? multiply_for<1>(n_vectors)
                                           : bits == 2 ? multiply_for<2>(n_vectors)
                                           : bits == 3 ? multiply_for<3>(n_vectors)
                                                       : multiply_for<4>(n_vectors);
        function(bits == 0 ? 0 : p.n, n_j, block, f, out, overwrite); // 0 bits: the offsets alone
    }
}

} // namespace
} // namespace xq
