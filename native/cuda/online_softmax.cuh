/* online_softmax.cuh: scores of pages to probabilities, in registers, in the layout of codes_mma.cuh's sums: a lane
 * holds query rows r = 2 t and 2 t + 1, and of every chunk of 32 tokens its tokens 4 g .. 4 g + 3.
 *
 *     m' = max(m, scores)     p = 2^(score - m')     sum, zero, out *= 2^(m - m')
 *
 * Scores use base 2.  PLAIN: no cap on the scores and no slope (ALiBi).
 */
#pragma once

#include "codes_mma.cuh"

#include <cmath>

namespace xq {

constexpr float log2e = 1.44269504f;
/* No scale of values is as small: 2^-24 is F16's smallest. */
constexpr int least_exponent = -40;

/* 2^x within 2^-22; 0 below the smallest normal number. */
__device__ inline float quick_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Running softmax over pages and CHUNKS times 32 channels; a lane holds query rows 2 t and 2 t + 1. */
template <int CHUNKS> struct state {
    float max[2], sum[2], zero[2]; /* sum, zero: this lane's share */
    float out[CHUNKS][2][4];       /* in units of 2^-24 2^-13 2^exponent where codes are summed */
    float offset[2];               /* LOG8, in these units: sum of p times zero points */
    int exponent;

    __device__ void clear() {
        exponent = least_exponent;
        for (int r = 0; r < 2; ++r) {
            max[r] = -INFINITY;
            sum[r] = zero[r] = offset[r] = 0.0f;
        }
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            for (int k = 0; k < 8; ++k) {
                out[c][k / 4][k % 4] = 0.0f;
            }
        }
    }
    __device__ void scale(float row0, float row1) {
        offset[0] *= row0;
        offset[1] *= row1;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            for (int k = 0; k < 8; ++k) { // out[.][.][0], [2]: query row 2 t; [1], [3]: 2 t + 1
                out[c][k / 4][k % 4] *= k % 2 == 0 ? row0 : row1;
            }
        }
    }
};

/* What a lane needs of the query rows. */
struct rows {
    const __half *mask[2]; /* of rows 2 t and 2 t + 1; null: none */
    float slope[2];        /* times log2 e */
    float softcap;         /* times log2 e */
    float factor[2];       /* of a product with the rounded q to a score of base 2; above 0 */
    float absent[2];       /* 0, or -inf for a row that does not exist */
};

/* Scores of base 2, s [row][N], that are still to be multiplied by a factor and moved by a constant. */
struct affine {
    float factor[2], constant[2];
};

/* Caps and masks N scores of each row; mask: F16 [row][N], as many as fit into words. */
template <int N, bool PLAIN>
__device__ inline void finish_scores(float (&s)[2][N], const affine &to, const rows &q,
                                     const uint32_t (&mask)[2][N / 2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float x = s[r][k] * to.factor[r] + to.constant[r];
            if (!PLAIN && q.softcap > 0.0f) {
                x = x == -INFINITY ? x : q.softcap * tanhf(x / q.softcap);
            }
            const float2 two = __half22float2(as_half2(mask[r][k / 2]));
            const float m = k % 2 == 0 ? two.x : two.y;
            s[r][k] = m == -INFINITY ? -INFINITY : x + (PLAIN ? log2e : q.slope[r]) * m;
        }
    }
}

/* Maximum over the lanes that share t. */
__device__ inline float over_tokens(float x) {
    for (int step = 4; step < 32; step *= 2) {
        x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    }
    return x;
}

/* Maximum of N scores of each row, over the warp. */
template <int N> __device__ inline void score_max(float (&max)[2], const float (&s)[2][N], const affine &to) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        max[r] = s[r][0];
#pragma unroll
        for (int k = 1; k < N; ++k) {
            max[r] = fmaxf(max[r], s[r][k]);
        }
        max[r] = over_tokens(max[r]) * to.factor[r] + to.constant[r];
    }
}

/* s [row][N]: scores become 2^(score - maximum so far); max: of these scores, at least. */
template <int N, int CHUNKS>
__device__ inline void exponentiate(state<CHUNKS> &st, float (&s)[2][N], const affine &to, const float (&max)[2]) {
    if (__any_sync(~0u, max[0] > st.max[0] || max[1] > st.max[1])) {
        float alpha[2];
        for (int r = 0; r < 2; ++r) {
            const float top = fmaxf(st.max[r], max[r]);
            alpha[r] = top == -INFINITY ? 1.0f : quick_exp2(st.max[r] - top);
            st.max[r] = top;
            st.sum[r] *= alpha[r];
            st.zero[r] *= alpha[r];
        }
        st.scale(alpha[0], alpha[1]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float shift = to.constant[r] - (st.max[r] == -INFINITY ? 0.0f : st.max[r]);
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < N; ++k) {
            s[r][k] = quick_exp2(s[r][k] * to.factor[r] + shift);
            sum[k % 2] += s[r][k];
        }
        st.sum[r] += sum[0] + sum[1];
    }
}

} // namespace xq
