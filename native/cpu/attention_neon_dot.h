/* attention_neon_dot.h: sums of products of 8-bit vectors with codes, 16 columns j at a time, by the widest
 * instruction that the kernel set may use.
 *
 *     s[r][j] += sum over 16 rows i of a[r][i] c[i][j]      r < R
 *
 * Codes come as four groups of four rows, each the bytes of four columns k: [4 columns][4 rows].
 *
 *     neon     smlal, two bytes of codes a lane: 16-bit sums, which are widened before they can overflow
 *     dotprod  sdot, four rows of four columns
 *     i8mm     smmla, eight rows of two columns for two vectors; for one vector sdot is as good
 */
#pragma once

#include "inline.h"

#include <arm_neon.h>

namespace xq {
namespace {

struct codes {
    int8x16_t group[4]; /* [4 columns][4 rows] each */
};

#if defined(XQ_NEON_DOTPROD)

constexpr int max_vectors = 4; // that share one pass over the codes: what the registers hold

template <int R> struct sums {
    static constexpr int products_a_settle = 1 << 30; // 32 bits hold any page
    int32x4_t s[R][4];

    XQ_INLINE sums() {
        for (auto &row : s) {
            for (auto &x : row) {
                x = vdupq_n_s32(0);
            }
        }
    }
    /* columns 4 k .. 4 k + 3; a [R][16 rows] */
    XQ_INLINE void add(int k, const codes &c, const int8x16_t *a) {
        for (int r = 0; r < R; ++r) {
            s[r][k] = vdotq_laneq_s32(s[r][k], c.group[0], a[r], 0);
            s[r][k] = vdotq_laneq_s32(s[r][k], c.group[1], a[r], 1);
            s[r][k] = vdotq_laneq_s32(s[r][k], c.group[2], a[r], 2);
            s[r][k] = vdotq_laneq_s32(s[r][k], c.group[3], a[r], 3);
        }
    }
    XQ_INLINE void settle() {}
    XQ_INLINE int32x4_t get(int r, int k) const { return s[r][k]; }
};

#else

constexpr int max_vectors = 2;

template <int R> struct sums {
    static constexpr int products_a_settle = 32767; // the sum of absolute products that 16 bits hold
    int16x8_t s[R][4][2];                           /* [2 columns][4 rows] each */
    int32x4_t total[R][4];

    XQ_INLINE sums() {
        for (int r = 0; r < R; ++r) {
            for (int k = 0; k < 4; ++k) {
                s[r][k][0] = s[r][k][1] = vdupq_n_s16(0);
                total[r][k] = vdupq_n_s32(0);
            }
        }
    }
    XQ_INLINE void add(int k, const codes &c, const int8x16_t *a) {
        for (int r = 0; r < R; ++r) {
            const int32x4_t rows = vreinterpretq_s32_s8(a[r]);
            add_group(s[r][k], c.group[0], vdupq_laneq_s32(rows, 0));
            add_group(s[r][k], c.group[1], vdupq_laneq_s32(rows, 1));
            add_group(s[r][k], c.group[2], vdupq_laneq_s32(rows, 2));
            add_group(s[r][k], c.group[3], vdupq_laneq_s32(rows, 3));
        }
    }
    XQ_INLINE void settle() {
        for (int r = 0; r < R; ++r) {
            for (int k = 0; k < 4; ++k) {
                const int32x4_t left = vpaddlq_s16(s[r][k][0]), right = vpaddlq_s16(s[r][k][1]);
                total[r][k] = vaddq_s32(total[r][k], vpaddq_s32(left, right));
                s[r][k][0] = s[r][k][1] = vdupq_n_s16(0);
            }
        }
    }
    XQ_INLINE int32x4_t get(int r, int k) const { return total[r][k]; }

  private:
    static XQ_INLINE void add_group(int16x8_t sum[2], int8x16_t c, int32x4_t rows) {
        const int8x16_t a = vreinterpretq_s8_s32(rows);
        sum[0] = vmlal_s8(sum[0], vget_low_s8(c), vget_low_s8(a));
        sum[1] = vmlal_high_s8(sum[1], c, a);
    }
};

#endif

#if defined(XQ_NEON_I8MM)

/* Two or four vectors; three are four, of which nobody reads the last. */
template <int R> struct pair_sums {
    static constexpr int products_a_settle = 1 << 30;
    int32x4_t s[R / 2][4][2]; /* [2 columns][2 vectors] each */

    XQ_INLINE pair_sums() {
        for (auto &pair : s) {
            for (auto &k : pair) {
                k[0] = k[1] = vdupq_n_s32(0);
            }
        }
    }
    XQ_INLINE void add(int k, const codes &c, const int8x16_t *a) {
        for (int g = 0; g < 4; g += 2) { // eight rows
            const int32x4_t first = vreinterpretq_s32_s8(c.group[g]), next = vreinterpretq_s32_s8(c.group[g + 1]);
            const int8x16_t left = vreinterpretq_s8_s32(vzip1q_s32(first, next));
            const int8x16_t right = vreinterpretq_s8_s32(vzip2q_s32(first, next));
            for (int pair = 0; pair < R / 2; ++pair) {
                const int64x2_t a0 = vreinterpretq_s64_s8(a[2 * pair]), a1 = vreinterpretq_s64_s8(a[2 * pair + 1]);
                const int8x16_t both = vreinterpretq_s8_s64(g == 0 ? vzip1q_s64(a0, a1) : vzip2q_s64(a0, a1));
                s[pair][k][0] = vmmlaq_s32(s[pair][k][0], left, both);
                s[pair][k][1] = vmmlaq_s32(s[pair][k][1], right, both);
            }
        }
    }
    XQ_INLINE void settle() {}
    XQ_INLINE int32x4_t get(int r, int k) const {
        const int32x4_t *both = s[r / 2][k];
        return r % 2 == 0 ? vuzp1q_s32(both[0], both[1]) : vuzp2q_s32(both[0], both[1]);
    }
};
template <> struct sums<2> : pair_sums<2> {};
template <> struct sums<4> : pair_sums<4> {};
template <> struct sums<3> : pair_sums<4> {};

#endif

} // namespace
} // namespace xq
